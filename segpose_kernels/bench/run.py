# SPDX-License-Identifier: BSD-3-Clause
"""`segpose bench`: measure cases beside every peer, print a table, keep the figures."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..cli import UsageError
from ..info import collect
from . import gate, gpu, machine, table
from .arguments import parser
from .cases import DTYPES, Case, Tier
from .catalogue import CASES, select
from .compare import comparison
from .contenders import Contender, contenders_for
from .document import Picture, to_markdown
from .goals import goal_cases, goals_table
from .limits import measure_limits
from .measure import Options, WrongResult, measure_case
from .report import splice, write_gpu_page, write_report
from .results import OURS, Run
from .statistics import Estimate
from .timing import Effort

__all__ = ["FULL", "QUICK", "main", "quieten", "run_cases"]

FULL = Effort(seconds=3.0)
QUICK = Effort(seconds=2.0, least_rounds=5, most_rounds=25, precise_enough=0.04)
# A GPU is quieter, and each call is timed by itself behind an emptied cache.
ON_GPU = Effort(seconds=0.2, most_rounds=50, sample_seconds=0.002, precise_enough=0.01)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line.

    Returns:
        0 if everything ran; 1 if a result of this package was wrong, or --gate found a loss.

    Raises:
        UsageError: for a word that finds no case, an unknown contender, too many threads, files
            that cannot be read.
        MissingExtraError: for --report without matplotlib.
    """
    arguments = parser().parse_args(argv)
    if arguments.readme is not None and arguments.report is None:
        raise UsageError("--readme needs --report DIR, where the full report and the plots go")
    if arguments.isa is not None and not _held_to(arguments.isa):
        return _run_again(machine.HELD_TO[arguments.isa], sys.argv[2:] if argv is None else argv)
    device = "cuda" if arguments.gpu and torch.cuda.is_available() else "cpu"
    if arguments.gpu and device == "cpu":
        return _static_gpu_page(arguments)
    cases = _cases(arguments)
    if arguments.list:
        for case in cases:
            print(case.id)
        return 0
    command = ["segpose", "bench", *(sys.argv[2:] if argv is None else argv)]
    if arguments.stored:
        runs = [_load(path) for path in arguments.stored]
        _print_stored(runs[0])
        code = 0
    else:
        options = _options(arguments, device)
        runs = [Run(machine.facts(device, options.threads, command), options.settings())]
        runs[0].limits = None if options.limits is None else options.limits.to_dict()
        code = run_cases(cases, options, runs[0], details=arguments.details)
        if arguments.gate:
            _measure_losses_again(runs[0], options)
        swept = any(case.sweep is not None for case in runs[0].cases)
        if arguments.report is not None and swept and options.threads > 1:
            runs += _sweeps_with_one_thread(arguments)
    return max(code, _use(arguments, runs))


def _held_to(isa: str) -> bool:
    return all(os.environ.get(name) == value for name, value in machine.HELD_TO[isa].items())


def _run_again(environment: Mapping[str, str], arguments: Sequence[str]) -> int:
    """The same command in a process with an environment that has to be there from its start."""
    command = [sys.executable, "-m", "segpose_kernels", "bench", *arguments]
    return subprocess.run(command, env=os.environ | environment, check=False).returncode


def _static_gpu_page(arguments: argparse.Namespace) -> int:
    """Print the page, or write it to gpu.md and gpu.html; there is no GPU to add to it."""
    print("no CUDA device here: the static GPU page", file=sys.stderr)
    if arguments.report is None:
        print(to_markdown([b for b in gpu.static_page() if not isinstance(b, Picture)]))
    else:
        write_gpu_page(arguments.report)
        print(f"report: {arguments.report / 'gpu.html'}, {arguments.report / 'gpu.md'}")
    return 0


def _cases(arguments: argparse.Namespace) -> list[Case]:
    dtypes = [DTYPES[name] for name in arguments.dtype]
    compares = arguments.gate or arguments.store_ratios
    tier: Tier = "quick" if arguments.quick or compares else "full"
    known: Sequence[Case] = CASES
    if arguments.goals:
        tier, known = "extra", goal_cases()
    elif arguments.gpu:
        known = gpu.gpu_cases()
    cases = select(tier, arguments.only, dtypes=dtypes, modes=arguments.mode, cases=known)
    if not cases:
        raise UsageError(f"no case matches; 'segpose bench --list' shows all {len(known)}")
    return cases


def _options(arguments: argparse.Namespace, device: str) -> Options:
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise UsageError(f"--seconds must be above 0, got {arguments.seconds}")
    if arguments.evict < 0:
        raise UsageError(f"--evict must not be negative, got {arguments.evict}")
    threads = machine.available_cores() if arguments.threads is None else arguments.threads
    try:
        machine.confine(threads)
    except ValueError as error:
        raise UsageError(f"--threads: {error}") from error
    effort = ON_GPU if device == "cuda" else QUICK if arguments.quick else FULL
    if arguments.seconds is not None:
        least = effort.least_rounds
        effort = Effort(arguments.seconds, least, most_rounds=1000, precise_enough=0.0)
    contenders = _chosen(arguments.contenders, device)
    if arguments.isa is not None:
        contenders = [c for c in contenders if c.name not in machine.NOT_HELD]
    if arguments.gate or arguments.store_ratios:
        contenders = gate.contenders_of_gate(contenders)
    return Options(
        contenders=contenders,
        device=device,
        threads=threads,
        effort=effort,
        evict=arguments.evict * 2**20,
        limits=measure_limits(device, threads, isa=collect()["cpu"]["isa"]),
    )


def _chosen(names: str | None, device: str) -> list[Contender]:
    contenders = list(contenders_for(device))
    if names is None:
        return contenders
    wanted = names.split(",")
    known = {c.name for c in contenders}
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"unknown contender {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return [c for c in contenders if c.name in wanted or c.name == OURS]


def _load(path: Path) -> Run:
    try:
        return Run.load(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


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
    lines = table.ResultLines([c.name for c in cases], [c.name for c in options.contenders])
    print(f"\n{lines.header}", flush=True)
    start = time.perf_counter()
    code = 0
    for case in cases:
        try:
            result = measure_case(case, options)
        except WrongResult as wrong:
            code = 1
            print(f"WRONG {wrong}", flush=True)
            continue
        run.cases.append(result)
        print(lines.line(result), flush=True)
        if details:
            print(f"\n{table.details(result)}\n", flush=True)
    print(f"\n{table.summary(run.cases)}\n\n{table.LEGEND}")
    if missing := table.reasons(run.cases):
        print("\nleft out:", *missing, sep="\n  ")
    print(f"\n{len(run.cases)} cases in {time.perf_counter() - start:.0f} s")
    return code


def _print_stored(run: Run) -> None:
    contenders: list[str] = run.settings["contenders"]
    lines = table.ResultLines([case.name for case in run.cases], contenders)
    print(machine.describe(run.machine), "", lines.header, sep="\n")
    print(*map(lines.line, run.cases), "", table.summary(run.cases), "", table.LEGEND, sep="\n")


def _sweeps_with_one_thread(arguments: argparse.Namespace) -> list[Run]:
    """The sweeps once more, in a process of its own: thread pools cannot be made smaller."""
    print("\nthe sweeps with one thread:")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweeps.json"
        command = [sys.executable, "-m", "segpose_kernels", "bench", "--only", "scaling"]
        command += ["--threads", "1", "--json", str(path)]
        for option in ("contenders", "seconds", "isa", "evict"):
            value = getattr(arguments, option)
            if value is not None:
                command += [f"--{option}", str(value)]
        if subprocess.run(command, check=False).returncode:
            return []
        return [Run.load(path)]


def _use(arguments: argparse.Namespace, runs: Sequence[Run]) -> int:
    """Everything that is made of results."""
    run = runs[0]
    if arguments.json is not None:
        run.save(arguments.json)
    if arguments.compare is not None:
        print(f"\n{comparison(run, _load(arguments.compare))}")
    if arguments.goals:
        print(f"\n{goals_table(run.cases, run.machine['isa'])}")
    if arguments.report is not None:
        fewer = runs[1] if len(runs) > 1 else None
        report = write_report(run, arguments.report, fewer_threads=fewer, gpu_page=arguments.gpu)
        run.save(arguments.report / "results.json")
        print(f"\nreport: {arguments.report / 'report.html'}, {arguments.report / 'report.md'}")
        if arguments.readme is not None:
            try:
                splice(report, arguments.readme, arguments.report)
            except (OSError, ValueError) as error:
                raise UsageError(f"--readme: {error}") from error
    if arguments.store_ratios:
        path = gate.ratios_path(run.machine["isa"], run.machine["threads"])
        count = gate.store_ratios(path, run.cases, machine.describe(run.machine))
        print(f"\n{count} ratios stored in {path}")
    return _gate(run) if arguments.gate else 0


def _stored_ratios(run: Run) -> dict[str, Estimate]:
    try:
        return gate.load_ratios(gate.ratios_path(run.machine["isa"], run.machine["threads"]))
    except FileNotFoundError as error:
        raise UsageError(
            f"no ratios are stored for {run.machine['isa']} with {run.machine['threads']} threads; "
            "--store-ratios stores those of a run"
        ) from error


def _measure_losses_again(run: Run, options: Options) -> None:
    """Replace results that lost by new ones, with more effort: a neighbour may be to blame."""
    lost = {loss.case for loss in gate.find_losses(run.cases, _stored_ratios(run))}
    longer = replace(options, effort=FULL)
    for i, result in enumerate(run.cases):
        if result.id in lost:
            case = next(case for case in CASES if case.id == result.id)
            run.cases[i] = measure_case(case, longer)


def _gate(run: Run) -> int:
    ratios = _stored_ratios(run)
    compared = sum(case.id in ratios for case in run.cases)
    losses = gate.find_losses(run.cases, ratios)
    print(f"\n{compared} cases compared: {len(losses)} slower than before")
    for loss in losses:
        print(f"  {loss}")
    return 1 if losses else 0
