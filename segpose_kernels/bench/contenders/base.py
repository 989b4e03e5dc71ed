# SPDX-License-Identifier: BSD-3-Clause
"""What a contender is: a name, and how it gets ready for a case."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from ..cases import Case

__all__ = ["Contender", "Prepared", "Unavailable", "require"]


class Unavailable(Exception):  # noqa: N818 - a reason to leave a contender out, no error
    """A contender cannot take part in a case; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A contender ready for one case.

    Attributes:
        call: one call, as it is timed; returns when the work is done (CPU) or enqueued (CUDA).
        results: what a call computes, by the names of `subjects.results_of`.
        memory_call: the same for measuring memory, with the parameters' gradients kept, so that
            they do not count; None where memory does not come from torch's allocator.
    """

    call: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    memory_call: Callable[[], object] | None = None


@dataclass(frozen=True)
class Contender:
    """Someone who can compute a case.

    Attributes:
        name: short, for columns and `--contenders`.
        title: what it is, for legends.
        devices: "cpu", "cuda".
        prepare: builds, converts, compiles, packs; raises Unavailable with the reason.
        ours: whether it is this package.
    """

    name: str
    title: str
    devices: frozenset[str]
    prepare: Callable[[Case, str, int], Prepared]  # case, device, threads
    ours: bool = False


def require(module: str) -> ModuleType:
    """Import a package that a peer needs, or raise Unavailable."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{error.name or module} is not installed") from error
