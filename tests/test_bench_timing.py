# SPDX-License-Identifier: BSD-3-Clause
"""Turns, rounds, medians, intervals, limits of `segpose bench`, on clocks that the tests wind."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from made_up_results import LIMITS

from segpose_kernels.bench import limits, timing
from segpose_kernels.bench.limits import Limits
from segpose_kernels.bench.statistics import geometric_mean, median_of, paired_ratio
from segpose_kernels.bench.timing import CpuClock, CudaClock, Effort, Samples, take_turns

FIVE_ROUNDS = Effort(seconds=60.0, least_rounds=5, most_rounds=5)


class WoundClock:
    """Calls take what `seconds` says; the log holds who was timed, in order."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = seconds
        self.log: list[tuple[str, int]] = []
        self.called: list[str] = []

    def settle(self) -> None:
        pass

    def warm_up(self, call: Callable[[], object], seconds: float) -> None:
        call()

    def time(self, call: Callable[[], object], calls: int) -> float:
        name = str(call())
        self.log.append((name, calls))
        return self.seconds[name]

    def calls(self) -> dict[str, Callable[[], object]]:
        def caller(name: str) -> Callable[[], object]:
            def call() -> str:
                self.called.append(name)
                return name

            return call

        return {name: caller(name) for name in self.seconds}


def turns(clock: WoundClock, effort: Effort = FIVE_ROUNDS, **options: object) -> dict[str, Samples]:
    return take_turns(clock.calls(), clock, effort, **options)  # type: ignore[arg-type]


def test_each_round_begins_with_another_contender() -> None:
    clock = WoundClock({"a": 1e-3, "b": 1e-3, "c": 1e-3})
    samples = turns(clock, Effort(seconds=60.0, least_rounds=3, most_rounds=3))
    rounds = [name for name, _ in clock.log[-9:]]
    assert "".join(rounds) == "abcbcacab"
    assert {name: len(s.seconds) for name, s in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_short_calls_are_repeated_and_long_ones_are_not() -> None:
    clock = WoundClock({"short": 1e-4, "long": 0.5})
    samples = turns(clock, Effort(seconds=60.0, least_rounds=2, most_rounds=2, sample_seconds=0.02))
    assert samples["short"].calls == 200
    assert samples["long"].calls == 1
    # Untimed calls go before each sample of the short one only: 1 + 2 to estimate, 2 and 2.
    assert clock.called.count("short") == 3 + 2 + 2
    assert clock.called.count("long") == 1 + 2


def test_a_cpu_is_warmed_up_for_a_time_and_once_at_least() -> None:
    clock = CpuClock()
    calls: list[int] = []
    start = time.perf_counter()
    clock.warm_up(lambda: calls.append(1), 0.02)
    assert time.perf_counter() - start >= 0.02
    assert calls
    calls.clear()
    clock.warm_up(lambda: calls.append(1), 0.0)
    assert len(calls) == 1


def test_those_far_behind_drop_out_unless_kept() -> None:
    clock = WoundClock({"fast": 0.02, "near": 0.05, "far": 0.1, "ours": 0.1})
    samples = turns(clock, keep={"ours"})
    assert {name: len(s.seconds) for name, s in samples.items()} == {
        "fast": 5,
        "near": 5,
        "far": 3,
        "ours": 5,
    }


def test_one_call_of_the_hopeless_is_enough() -> None:
    """Bfloat16 in torch's default memory format took 140 s where others took 0.4."""
    clock = WoundClock({"fast": 0.2, "slow": 3.0, "hopeless": 140.0, "ours": 140.0})
    samples = turns(clock, keep={"ours"})
    assert {name: len(s.seconds) for name, s in samples.items()} == {
        "fast": 5,
        "slow": 3,
        "hopeless": 1,
        "ours": 5,
    }
    assert clock.called.count("hopeless") == 1


def test_calls_too_short_to_matter_do_not_drop_out() -> None:
    samples = turns(WoundClock({"fast": 1e-5, "slow": 5e-3}))
    assert len(samples["slow"].seconds) == 5


def test_measuring_ends_when_the_caller_knows_enough() -> None:
    widths = iter([0.3, 0.2, 0.01])
    clock = WoundClock({"a": 1e-3})
    effort = Effort(seconds=1e9, least_rounds=2, most_rounds=50, precise_enough=0.05)
    samples = turns(clock, effort, interval=lambda seconds: next(widths))
    assert len(samples["a"].seconds) == 4


def test_where_a_round_takes_long_three_are_enough() -> None:
    effort = Effort(seconds=1.0, least_rounds=7)
    assert not effort.over(6, 3.9)
    assert effort.over(7, 1.0)
    assert not effort.over(2, 100.0)
    assert effort.over(3, 4.0)


def test_garbage_is_collected_again_after_a_failure() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        take_turns({"a": broken}, CpuClock(), FIVE_ROUNDS)
    assert gc.isenabled()


def test_the_cpu_clock_tells_the_mean_of_calls() -> None:
    clock = CpuClock()
    assert clock.time(lambda: time.sleep(0.01), 3) == pytest.approx(0.01, rel=0.5)
    evicting = CpuClock(evict=2**20)
    assert evicting.time(lambda: time.sleep(0.01), 3) == pytest.approx(0.01, rel=0.5)


class FakeEvent:
    """A CUDA event on a clock that `work` winds, in milliseconds."""

    clock = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = FakeEvent.clock

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_the_cuda_clock_leaves_out_what_clears_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    log: list[str] = []

    def work(name: str, milliseconds: float) -> None:
        log.append(name)
        FakeEvent.clock += milliseconds

    clock = object.__new__(CudaClock)
    clock._other = SimpleNamespace(zero_=lambda: work("clear", 100.0))  # type: ignore[assignment]
    clock._times = 2
    clock.settle()
    assert clock.time(lambda: work("call", 3.0), 2) == pytest.approx(3e-3)
    assert log == ["clear", "clear", "call", "clear", "clear", "call"]


class FakeTime:
    """A clock that only sleeping moves; other threads spin until `busy_until`, and are charged in
    ticks of 4 ms.
    """

    def __init__(self, busy_until: float) -> None:
        self.now = self.used = 0.0
        self.busy_until = busy_until

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used // 0.004 * 0.004

    def sleep(self, seconds: float) -> None:
        self.used += min(seconds, max(self.busy_until - self.now, 0.0))
        self.now += seconds


@pytest.mark.parametrize(
    ("busy_until", "least", "most"), [(0.0, 0.0, 0.015), (0.06, 0.06, 0.08), (9.0, 0.2, 0.3)]
)
def test_settling_waits_for_spinning_threads_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, busy_until: float, least: float, most: float
) -> None:
    fake = FakeTime(busy_until)
    monkeypatch.setattr(timing, "time", fake)
    CpuClock().settle()
    assert least <= fake.now <= most


@pytest.mark.parametrize("count", [6, 9, 25])
def test_the_interval_holds_the_true_median(count: int) -> None:
    source = random.Random(count)
    inside = 0
    for _ in range(2000):
        estimate = median_of([source.lognormvariate(0, 1) for _ in range(count)])
        assert estimate.low <= estimate.value <= estimate.high
        inside += estimate.low <= 1.0 <= estimate.high
    assert inside / 2000 > 0.94


def test_few_samples_give_their_range() -> None:
    estimate = median_of([3.0, 1.0, 2.0])
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 2.0, 3.0)
    assert estimate.relative_width == 0.5


def test_what_both_suffer_in_a_round_cancels() -> None:
    load = [1.0, 5.0, 1.0, 2.0, 9.0, 1.0]
    ratio = paired_ratio([3 * x for x in load], load)
    assert ratio.value == pytest.approx(3)
    assert ratio.relative_width == pytest.approx(0)
    assert paired_ratio([4.0, 4.0, 4.0, 100.0], [2.0, 2.0, 2.0]).value == 2


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("moved", "expected"),
    [(1, 8e10), (2**18, 8e10), (2**22, 3e10), (2**28, 1.4e10), (1e12, 1.4e10)],
)
def test_bandwidth_at_and_outside_the_measured_sizes(moved: float, expected: float) -> None:
    assert LIMITS.bytes_per_second(moved) == pytest.approx(expected)


def test_bandwidth_between_the_measured_sizes() -> None:
    assert LIMITS.bytes_per_second(2**20) == pytest.approx(math.sqrt(8e10 * 3e10))


def test_a_floor_is_the_longer_of_arithmetic_and_memory() -> None:
    assert LIMITS.floor("float32", 2e11, 1) == pytest.approx(1.0)
    assert LIMITS.floor("bfloat16", 3e12, None) == pytest.approx(1.0)
    assert LIMITS.floor("float32", 1, 1.4e10) == pytest.approx(1.0)
    # A dtype without a unit of its own is computed in float32.
    assert LIMITS.floor("float16", 2e11, None) == pytest.approx(1.0)


def test_limits_of_this_machine() -> None:
    native = pytest.importorskip("segpose_kernels._limits")
    found = limits.measure_limits("cpu", 1, seconds=0.02)
    assert found is not None
    units = dict(native.units())
    assert units["vector"] == "float32"
    assert found.peak("float32") > 1e9
    assert found.peak("bfloat16") >= found.peak("float32")
    assert all(rate > 1e8 for _, rate in found.bandwidth)
    assert limits.Limits.from_dict(found.to_dict()) == found
    # No product of matrices is faster than the limit; half of it is within reach. Other work takes
    # its share of single measurements, so the best of each count, in turns.
    a = torch.randn(512, 512)
    peak = best = 0.0
    for _ in range(10):
        again = limits.measure_limits("cpu", 1, seconds=0.02)
        assert again is not None
        peak = max(peak, again.peak("float32"))
        best = max(best, 2 * 512**3 / CpuClock().time(lambda: a @ a, 3))
    assert 0.2 < best / peak < 1.2
    with pytest.raises(ValueError, match="no unit called 'abacus'"):
        native.flops_per_second("abacus")


def test_a_small_copy_that_is_slower_than_a_large_one_shows_no_cache() -> None:
    assert LIMITS.memory_rates() == (1.4e10, 8e10)
    gpu = Limits({"float32": 4e14}, ((2**18, 4.7e10), (2**28, 4.05e12)), "made up")
    assert gpu.memory_rates() == (4.05e12,)
