# SPDX-License-Identifier: BSD-3-Clause
"""What is known of every GPU kernel without running it: `segpose kernels` prints the table.

Two kinds of figures. *Static* ones come from the compiler and the disassembler. *Simulated* ones
are counted while a simulator executes the compiled kernel on a small problem. Neither is a speed:
that takes a GPU. `tools/kernel_table` in the source tree makes the table; a hash of the kernels'
sources, comments left out, tells when they have changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cli import LineParser

__all__ = ["COLUMNS", "DATA", "SOURCES", "load", "main", "render", "source_hash", "stale"]

DATA = Path(__file__).with_name("kernel_facts.json")
_ROOT = Path(__file__).resolve().parent.parent

# What the kernels of a backend are compiled from, relative to the source tree.
SOURCES: dict[str, tuple[str, ...]] = {
    "cuda": (
        "csrc/cuda/*.cu",
        "csrc/cuda/*.cuh",
        "csrc/cuda/fast_div.h",
        "csrc/cuda/params.h",
        "csrc/cuda/tiles.h",
    ),
    "triton": tuple(
        f"segpose_kernels/triton/{name}.py"
        for name in ("direct", "geometry", "kernels", "pointwise", "tiles")
    ),
}

# Title and how a row of the table gives the figure.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("kernel", "name"),
    ("arch", "arch"),
    ("regs", "registers"),
    ("spill", "spill_bytes"),
    ("stack", "stack_bytes"),
    ("shared", "shared_bytes"),
    ("CTAs/SM", "ctas_per_sm"),
    ("tensor", "sass.tensor"),
    ("loads", "sass.load"),
    ("local", "sass.local"),
    ("waves ldsm", "simulated.wavefronts_ldmatrix"),
    ("waves lds", "simulated.wavefronts_ld_shared"),
    ("waves cp", "simulated.wavefronts_cp_async"),
    ("sectors", "simulated.sector_efficiency"),
    ("instr/mma", "simulated.instructions_per_mma"),
    ("DRAM/min", "simulated.dram_over_minimum"),
)

LEGEND = """\
static (compiler): regs, spill, stack, shared (bytes; shared with what the launch adds), CTAs/SM
  (resident blocks), tensor, loads, local (SASS instructions: tensor cores, loads, local memory)
simulated (counted while executing the PTX on a small problem): waves = shared-memory wavefronts
  over their minimum, of ldmatrix, ld and cp.async; sectors = bytes asked for over bytes of the
  32-byte sectors touched; instr/mma = other instructions for each tensor instruction in the steady
  loop (Triton: without moves between registers); DRAM/min = distinct bytes touched
  over each operand and result once
none of these is a measured speed"""


def _code(suffix: str, text: str) -> str:
    """A source without comments and without the layout that means nothing in its language."""
    if suffix == ".py":
        lines = re.sub(r"#[^\n]*", "", text).splitlines()
        return "\n".join(line.rstrip() for line in lines if line.strip())
    return " ".join(re.sub(r"//[^\n]*", "", text).split())


def source_hash(backend: str) -> str | None:
    """Hash of what a backend's kernels are compiled from; None without its sources."""
    paths = [path for pattern in SOURCES[backend] for path in sorted(_ROOT.glob(pattern))]
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        digest.update(path.name.encode() + b"\0" + _code(path.suffix, text).encode() + b"\0")
    return digest.hexdigest()


def load() -> dict[str, Any]:
    """The table by backend: {"cuda": {"sources": hash, "compiler": ..., "kernels": [...]}, ...}."""
    table: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return table


def stale(table: dict[str, Any]) -> list[str]:
    """One sentence for each backend whose kernels have changed since its figures were taken."""
    messages = []
    for backend, entry in table.items():
        current = source_hash(backend) if backend in SOURCES else None
        if current is not None and current != entry["sources"]:
            messages.append(
                f"the figures of the {backend} kernels are older than their sources; "
                "make them anew with: python tools/kernel_table"
            )
    return messages


def value_of(row: dict[str, Any], path: str) -> Any:
    """The figure of a column in a row, None where it has none."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table as text, with a legend; notes say why a figure falls short of its goal."""
    cells = [[title for title, _ in COLUMNS]]
    cells += [[_cell(value_of(row, path)) for _, path in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = []
    for number, line in enumerate(cells):
        first = f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}"
        rest = "  ".join(
            f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=True)
        )
        lines.append(f"{first}  {rest}".rstrip())
        if number == 0:
            lines.append("-" * len(lines[0]))
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            notes.setdefault(row["note"], []).append(row["name"])
    blocks = ["\n".join(lines), LEGEND]
    blocks += [f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in notes.items()]
    return "\n\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is known of every GPU kernel: registers, shared memory, counted accesses."""
    parser = LineParser(
        prog="segpose kernels",
        description=main.__doc__,
        epilog=LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead")
    parser.add_argument("--backend", help="only kernels of this backend, cuda or triton")
    parser.add_argument("--arch", help="only this architecture, e.g. sm_80")
    parser.add_argument("--name", help="only kernels whose name contains this")
    arguments = parser.parse_args(argv)
    table = load()
    rows = [row for entry in table.values() for row in entry["kernels"]]
    for key in ("backend", "arch"):
        wanted = getattr(arguments, key)
        if wanted is not None:
            known = sorted({row[key] for row in rows})
            if wanted not in known:
                parser.error(f"--{key} must be one of {', '.join(known)}, got {wanted}")
            rows = [row for row in rows if row[key] == wanted]
    if arguments.name:
        rows = [row for row in rows if arguments.name in row["name"]]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(render(rows))
    for message in stale(table):
        print(f"\nstale: {message}")
    return 0
