# SPDX-License-Identifier: BSD-3-Clause
"""What a producer returns, and what every producer works out alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What the loops of the main tiles should reach; a row that falls short has a note.
GOAL_PER_MMA = 1.5
GOAL_SECTORS = 0.95

# Of a multiprocessor: shared memory in KiB, of which 1 goes with every block, and threads.
_SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}
_THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
_BLOCKS = 32

_SASS_GROUPS = {
    "tensor": ("HMMA", "HGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA"),
    "load": ("LDG", "LDGSTS", "LDS", "LDSM", "UTMALDG"),
    "local": ("LDL", "STL"),
}


def ctas_per_sm(registers: int, threads: int, shared: int, arch: str) -> int:
    """Resident blocks: CUDA C++ Programming Guide, "Compute capabilities" and "Occupancy"."""
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // registers_per_warp // 4 * 4 // warps
    by_shared = (_SHARED_KIB[arch] << 10) // (shared + 1024)
    return min(by_registers, by_shared, _THREADS[arch] // threads, _BLOCKS)


def sass_groups(counts: dict[str, int]) -> dict[str, int]:
    """The counts that a reader looks for first, then every mnemonic the disassembler found."""
    summed = {group: sum(counts.get(m, 0) for m in names) for group, names in _SASS_GROUPS.items()}
    return summed | {mnemonic: count for mnemonic, count in counts.items() if count}


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
