# SPDX-License-Identifier: BSD-3-Clause
"""What a producer returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """The kernels of one backend.

    compiler: name and version of what compiled them.
    kernels: one dictionary a kernel and architecture, with the keys of `row`.
    """

    compiler: str
    kernels: list[dict[str, Any]] = field(default_factory=list)


def row(
    name: str,
    backend: str,
    arch: str,
    *,
    registers: int,
    spill_bytes: int,
    stack_bytes: int,
    shared_bytes: int,
    ctas_per_sm: int,
    sass: dict[str, int],
    simulated: dict[str, float] | None = None,
    problem: str | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """A row of the table.

    sass: counts of instructions, among them "tensor", "load" and "local".
    simulated: figures by name; `problem` says on which problem they were counted.
    note: why a figure falls short of its goal.
    """
    return {
        "name": name,
        "backend": backend,
        "arch": arch,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "stack_bytes": stack_bytes,
        "shared_bytes": shared_bytes,
        "ctas_per_sm": ctas_per_sm,
        "sass": sass,
        "simulated": simulated or {},
        "problem": problem,
        "note": note,
    }
