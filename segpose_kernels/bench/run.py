# SPDX-License-Identifier: BSD-3-Clause
"""`segpose bench`: measure cases beside every peer, print a table, keep the figures."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..cli import LineParser, UsageError
from . import machine, table
from .cases import DTYPES, Case, Tier
from .catalogue import CASES, GROUPS, select
from .contenders import CONTENDERS, Contender, contenders_for
from .limits import measure_limits
from .measure import Options, WrongResult, measure_case
from .results import OURS, Run
from .timing import Effort

__all__ = ["FULL", "QUICK", "main", "quieten", "run_cases"]

FULL = Effort()
QUICK = Effort(seconds=2.0, least_rounds=5, most_rounds=25, precise_enough=0.04)


def _parser() -> LineParser:
    groups = "\n".join(f"  {name:<15}{words}" for name, words in GROUPS.items())
    names = "\n".join(f"  {c.name:<21}{c.title}" for c in _distinct_contenders())
    parser = LineParser(
        prog="segpose bench",
        description=(
            "Time this package beside everything one would take instead, on the same numbers, in "
            "turns, after checking each result. A ratio is the time of the fastest peer over ours: "
            "above 1 this package is faster."
        ),
        epilog=f"groups:\n{groups}\n\ncontenders:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a subset, in about three minutes")
    parser.add_argument(
        "--only",
        metavar="WORD",
        action="append",
        default=[],
        help="cases of the group WORD or with WORD in their name; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        action="append",
        choices=list(DTYPES),
        default=[],
        help=f"only this one of {', '.join(DTYPES)}; may be repeated",
    )
    parser.add_argument(
        "--mode",
        metavar="MODE",
        action="append",
        choices=["inference", "training"],
        default=[],
        help="only inference or training",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="cores for everyone (default: all there are)"
    )
    parser.add_argument(
        "--contenders",
        metavar="NAMES",
        help="only these, separated by commas; this package always takes part",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="measure each case this long")
    parser.add_argument(
        "--evict",
        type=int,
        metavar="MIB",
        default=0,
        help="touch this much other memory before each call (default 0: caches stay warm)",
    )
    parser.add_argument("--details", action="store_true", help="a table for each case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    return parser


def _distinct_contenders() -> list[Contender]:
    return list({c.name: c for c in CONTENDERS}.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 if everything ran, 1 if a result of this package was wrong.

    Raises:
        UsageError: for a word that finds no case, an unknown contender, too many threads.
    """
    arguments = _parser().parse_args(argv)
    tier: Tier = "quick" if arguments.quick else "full"
    cases = select(
        tier, arguments.only, dtypes=[DTYPES[d] for d in arguments.dtype], modes=arguments.mode
    )
    if not cases:
        raise UsageError(f"no case matches; 'segpose bench --list' shows all {len(CASES)}")
    if arguments.list:
        for case in cases:
            print(case.id)
        return 0
    threads = arguments.threads or machine.available_cores()
    try:
        machine.confine(threads)
    except ValueError as error:
        raise UsageError(str(error)) from error
    effort = QUICK if arguments.quick else FULL
    if arguments.seconds is not None:
        effort = Effort(
            seconds=arguments.seconds,
            least_rounds=effort.least_rounds,
            most_rounds=1000,
            precise_enough=0.0,
        )
    limits = measure_limits("cpu", threads)
    options = Options(
        contenders=_chosen(arguments.contenders, "cpu"),
        threads=threads,
        effort=effort,
        evict=arguments.evict * 2**20,
        limits=limits,
    )
    command = ["segpose", "bench", *(sys.argv[2:] if argv is None else argv)]
    run = Run(machine.facts("cpu", threads, command), options.settings())
    run.limits = None if limits is None else limits.to_dict()
    code = run_cases(cases, options, run, details=arguments.details)
    if arguments.json is not None:
        run.save(arguments.json)
    return code


def _chosen(names: str | None, device: str) -> list[Contender]:
    contenders = list(contenders_for(device))
    if names is None:
        return contenders
    wanted = names.split(",")
    known = {c.name for c in contenders}
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"unknown contender {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return [c for c in contenders if c.name in wanted or c.name == OURS]


def quieten() -> None:
    """Keep libraries from telling that there is no GPU on stderr."""
    # The profiler reports its start and stop, and a missing GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # torch.compile looks for a CUDA compiler and says if there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def run_cases(cases: Sequence[Case], options: Options, run: Run, *, details: bool = False) -> int:
    """Measure into `run` and print on the way; 1 if a result of this package was wrong."""
    quieten()
    print(machine.describe(run.machine))
    lines = table.ResultLines(cases, [c.name for c in options.contenders])
    print(f"\n{lines.header}", flush=True)
    start = time.perf_counter()
    wrong: list[str] = []
    for case in cases:
        try:
            result = measure_case(case, options)
        except WrongResult as error:
            wrong.append(str(error))
            print(f"WRONG {error}", flush=True)
            continue
        run.cases.append(result)
        print(lines.line(result), flush=True)
        if details:
            print(f"\n{table.details(result)}\n", flush=True)
    print(f"\n{table.summary(run.cases)}")
    print("\nratio: time of the fastest peer / ours, ±95% interval; ~ marks one known to 10% only")
    if missing := table.absences(run.cases):
        print(f"\nleft out:\n{missing}")
    print(f"\n{len(run.cases)} cases in {time.perf_counter() - start:.0f} s")
    torch._dynamo.reset()
    return 1 if wrong else 0
