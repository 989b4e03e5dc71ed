# SPDX-License-Identifier: BSD-3-Clause
"""The command line of `segpose bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..cli import LineParser
from .cases import DTYPES
from .catalogue import GROUPS
from .contenders import CONTENDERS
from .machine import HELD_TO

__all__ = ["DEFAULT_REPORT", "parser"]

DEFAULT_REPORT = Path("segpose_bench")


def parser() -> LineParser:
    """The parser; every option is described in its help."""
    titles = {c.name: c.title for c in CONTENDERS}
    groups = "\n".join(f"  {name:<15}{words}" for name, words in GROUPS.items())
    names = "\n".join(f"  {name:<15}{title}" for name, title in titles.items())
    made = LineParser(
        prog="segpose bench",
        description=(
            "Time this package beside everything one would take instead, on the same numbers, in "
            "turns, after checking each result. A ratio is the time of the fastest alternative "
            "over ours: above 1 this package is faster."
        ),
        epilog=f"groups:\n{groups}\n\ncontenders:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_cases(made.add_argument_group("what is measured"))
    _add_method(made.add_argument_group("how"))
    _add_results(made.add_argument_group("what becomes of it"))
    return made


def _add_cases(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--quick", action="store_true", help="a subset, in about three minutes")
    group.add_argument(
        "--only",
        metavar="WORD",
        action="append",
        default=[],
        help="cases of the group WORD or with WORD in their name; may be repeated",
    )
    group.add_argument(
        "--dtype",
        metavar="DTYPE",
        action="append",
        choices=list(DTYPES),
        default=[],
        help=f"only this one of {', '.join(DTYPES)}; may be repeated",
    )
    group.add_argument(
        "--mode",
        metavar="MODE",
        action="append",
        choices=["inference", "training"],
        default=[],
        help="only inference or training",
    )
    group.add_argument(
        "--gpu",
        action="store_true",
        help="the GPU page: static figures, and measured ones where there is a CUDA device",
    )
    group.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    group.add_argument(
        "--from",
        dest="stored",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help=(
            "measure nothing, take the results in FILE (of --json or of pytest --benchmark-json); "
            "a second FILE may hold the sweeps with fewer threads"
        ),
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--threads", type=int, metavar="N", help="cores for everyone (default: all there are)"
    )
    group.add_argument(
        "--contenders",
        metavar="NAMES",
        help="only these, separated by commas; this package always takes part",
    )
    group.add_argument(
        "--isa",
        metavar="ISA",
        choices=list(HELD_TO),
        help="hold everyone to avx2, as if the machine had no more; who cannot be held is left out",
    )
    group.add_argument("--seconds", type=float, metavar="S", help="measure each case this long")
    group.add_argument(
        "--evict",
        type=int,
        metavar="MIB",
        default=0,
        help="touch this much other memory before each call (default 0: caches stay warm)",
    )


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--details", action="store_true", help="print a table for each case")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    group.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=DEFAULT_REPORT,
        help=(
            "write report.md, report.html and plots into DIR "
            f"(default ./{DEFAULT_REPORT}); measures the sweeps with one thread too"
        ),
    )
    group.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="with --report: put its short form between the marks in FILE",
    )
    group.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="print beside it the ratios of another run, stored in FILE",
    )
    group.add_argument(
        "--goals",
        action="store_true",
        help="measure what this package sets itself goals for, and print them beside it",
    )
    group.add_argument(
        "--gate",
        action="store_true",
        help="compare with the stored ratios to torch eager; exit code 1 if any has fallen",
    )
    group.add_argument(
        "--store-ratios",
        action="store_true",
        help="measure the cases of --gate, and store the ratios that it compares with",
    )
