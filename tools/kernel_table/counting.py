# SPDX-License-Identifier: BSD-3-Clause
"""Figures from the simulator's counters, of one run or of what a longer run has more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ptxsim import Counters


@dataclass
class Totals:
    """Sums over the instructions of one kind."""

    executed: int = 0
    wavefronts: int = 0
    passes: int = 0
    global_bytes: int = 0
    sectors: int = 0

    def __sub__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def totals(counters: Counters) -> dict[str, Totals]:
    """By opcode; loads and stores with their state space, asynchronous copies as "cp.async", and
    products on tensor cores as "mma".
    """
    found: dict[str, Totals] = {}
    for stats in counters.instructions.values():
        parts = stats.text.lstrip("@!").split(maxsplit=1)
        text = stats.text if not stats.text.startswith("@") else parts[1]
        opcode = text.split()[0].split(".")[0]
        if opcode in ("ld", "st"):
            opcode = stats.kind  # "ld global", "st shared", ...
        elif stats.kind == "tensor":
            opcode = "mma"
        elif text.startswith("cp.async.c") and "commit" not in text:
            opcode = "cp.async"
        total = found.setdefault(opcode, Totals())
        for f in fields(Totals):
            setattr(total, f.name, getattr(total, f.name) + getattr(stats, f.name))
    return found


def difference(longer: dict[str, Totals], shorter: dict[str, Totals]) -> dict[str, Totals]:
    return {kind: total - shorter.get(kind, Totals()) for kind, total in longer.items()}


def figures(by_kind: dict[str, Totals], without: Sequence[str] = ()) -> dict[str, float]:
    """Wavefronts over their minimum, sector efficiency, other instructions per tensor one.

    without: kinds that are not counted among the other instructions.
    """
    result: dict[str, float] = {}
    for kind, name in (
        ("ldmatrix", "ldmatrix"),
        ("cp.async", "cp_async"),
        ("ld shared", "ld_shared"),
    ):
        total = by_kind.get(kind, Totals())
        if total.passes:
            result[f"wavefronts_{name}"] = round(total.wavefronts / total.passes, 3)
    sectors = sum(total.sectors for total in by_kind.values())
    if sectors:
        requested = sum(total.global_bytes for total in by_kind.values())
        result["sector_efficiency"] = round(requested / (32 * sectors), 3)
    tensor = by_kind.get("mma", Totals()).executed
    if tensor:
        others = sum(t.executed for k, t in by_kind.items() if k not in without) - tensor
        result["instructions_per_mma"] = round(others / tensor, 3)
    return result
