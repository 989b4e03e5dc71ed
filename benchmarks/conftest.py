# SPDX-License-Identifier: BSD-3-Clause
"""`pytest benchmarks/`: the cases of `segpose bench` as pytest-benchmark tests, one a contender.

pytest-benchmark times one function at a time. Here all contenders of a case are timed in turns
before the first of its tests runs (see segpose_kernels/bench/timing.py), by the wall clock or by
CUDA events; each test then hands its contender's samples to pytest-benchmark through the timer
hook. Statistics, `--benchmark-json`, `--benchmark-save` and `--benchmark-compare` work as ever, and
`segpose bench --from FILE.json --report DIR` makes a report of the JSON.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import pytest
from replay import REPLAY

from segpose_kernels.bench import machine
from segpose_kernels.bench.cases import Case
from segpose_kernels.bench.contenders import contenders_for
from segpose_kernels.bench.limits import measure_limits
from segpose_kernels.bench.measure import Options, WrongResult, measure_case
from segpose_kernels.bench.results import CaseResult, Measurement
from segpose_kernels.bench.run import FULL, QUICK, quieten

OPTIONS = pytest.StashKey[Options]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("segpose benchmarks")
    group.addoption("--quick", action="store_true", help="the subset of segpose bench --quick")
    group.addoption("--threads", type=int, help="cores for everyone (default: all there are)")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")


def pytest_configure(config: pytest.Config) -> None:
    # What the libraries compared warn about is not ours to mend.
    config.addinivalue_line("filterwarnings", "ignore")
    quieten()
    threads = config.getoption("--threads")
    threads = machine.available_cores() if threads is None else threads
    try:
        machine.confine(threads)
    except ValueError as error:
        raise pytest.UsageError(f"--threads: {error}") from error
    device = config.getoption("--device")
    config.stash[OPTIONS] = Options(
        contenders=contenders_for(device),
        device=device,
        threads=threads,
        effort=QUICK if config.getoption("--quick") else FULL,
        limits=None if config.option.collectonly else measure_limits(device, threads),
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    slow = [item for item in items if item.callspec.params["case"].tier != "quick"]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    options = config.stash[OPTIONS]
    command = ["pytest", *config.invocation_params.args]
    machine_info["segpose"] = {
        "machine": machine.facts(options.device, options.threads, [str(c) for c in command]),
        "settings": options.settings(),
        "limits": None if options.limits is None else options.limits.to_dict(),
    }


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """The case of a group of tests; pytest runs those of one case together."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def result(case: Case, request: pytest.FixtureRequest) -> CaseResult | str:
    """All contenders of the case, timed in turns; or what was wrong with this package's result."""
    try:
        return measure_case(case, request.config.stash[OPTIONS])
    except WrongResult as wrong:
        return str(wrong)


@pytest.fixture
def measurement(result: CaseResult | str, contender: str, benchmark: Any) -> Measurement:
    """The contender's part of the result; skips with the reason where it has none."""
    if isinstance(result, str):
        pytest.fail(result)
    if contender not in result.measurements:
        pytest.skip(result.absent.get(contender, "takes no part in this series"))
    found = result.measurements[contender]
    benchmark.group = result.id
    benchmark.name = contender
    about = {name: value for name, value in vars(result).items() if name != "measurements"}
    benchmark.extra_info["segpose"] = {"case": about, "measurement": asdict(found)}
    REPLAY.load(found.samples)
    return found


def pytest_report_header(config: pytest.Config) -> str:
    options = config.stash[OPTIONS]
    facts = machine.facts(options.device, options.threads, sys.argv)
    return f"segpose: {machine.describe(facts)}"
