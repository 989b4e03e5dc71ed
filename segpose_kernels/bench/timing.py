# SPDX-License-Identifier: BSD-3-Clause
"""How things are timed: in turns, in one process, each after a pause and calls that are not timed.

Turns, because a neighbour's load on the machine then falls on all alike, and a ratio is taken
between calls that lie close together. A pause, because thread pools (OpenMP's, and those of the
runtimes compared) spin for some milliseconds after their work and would take a core from whoever is
next. Untimed calls for as long as the machine needs to come to speed after the pause: threads wake
up, cores raise their clock, and each finds its own data in the caches rather than the data of the
one before. On one virtual machine a call of 0.7 ms took 3.3 ms after a pause, 1.3 ms the second
time and 0.9 ms the fourth: a single untimed call would favour whoever is slow.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Clock", "CpuClock", "Effort", "Samples", "clock_for", "take_turns"]

Call = Callable[[], object]

# Below this share of a core the process counts as idle. Threads on another core may be charged by
# the kernel's ticks of up to 10 ms: a shorter look can miss one that spins.
_IDLE_SHARE = 0.1
_IDLE_STEP = 0.012
# onnxruntime's threads spin a fixed number of times, 62 ms on one machine (Zen 3), less on others.
_LONGEST_PAUSE = 0.25

# Rounds that everyone takes part in; then those this many times slower than the fastest drop out,
# unless their calls are so short that it does not matter.
_FEWEST_ROUNDS = 3
_FAR_BEHIND = 3.0
_SHORT = 0.01

# One call that takes so many seconds, and so many times as long as the fastest's, is enough.
_HOPELESS_SECONDS = 2.0
_HOPELESS = 20.0

# Seconds above which a call needs no untimed one before it.
_LONG = 0.25


@dataclass(frozen=True)
class Effort:
    """How long to measure one case.

    Attributes:
        seconds: stop after these, once `least_rounds` are done; after four times as long, three
            rounds are enough.
        least_rounds, most_rounds: rounds in which every contender has one turn.
        sample_seconds: a turn repeats the call for about this long and gives the mean.
        warm_up_seconds: before that it is repeated for as long untimed, once at least.
        precise_enough: stop early once `interval` of the caller is narrower than this.
    """

    seconds: float = 4.0
    least_rounds: int = 7
    most_rounds: int = 60
    sample_seconds: float = 0.01
    warm_up_seconds: float = 0.03
    precise_enough: float = 0.02

    def over(self, rounds: int, elapsed: float) -> bool:
        """Whether time is up."""
        if rounds >= self.most_rounds:
            return True
        least = self.least_rounds if elapsed < 4 * self.seconds else _FEWEST_ROUNDS
        return rounds >= least and elapsed >= self.seconds


@dataclass(frozen=True)
class Samples:
    """Seconds a call of one contender, round by round; each is the mean of `calls` calls."""

    seconds: list[float]
    calls: int


class Clock(Protocol):
    """Times calls on one kind of device."""

    def settle(self) -> None:
        """Wait until nothing of an earlier call is running."""

    def warm_up(self, call: Call, seconds: float) -> None:
        """Untimed calls, so that a device that needs time to come to speed has it."""

    def time(self, call: Call, calls: int) -> float:
        """Mean seconds of `calls` calls."""


class CpuClock:
    """Wall time. `evict` bytes of other memory are touched before each call (0: caches stay warm).

    With `evict` each call is timed by itself.
    """

    def __init__(self, evict: int = 0) -> None:
        self._other = torch.zeros(evict // 4) if evict else None

    def settle(self) -> None:
        """Sleep until the threads of this process have stopped spinning, 250 ms at most."""
        end = time.perf_counter() + _LONGEST_PAUSE
        while time.perf_counter() < end:
            before = time.process_time()
            time.sleep(_IDLE_STEP)
            if time.process_time() - before < _IDLE_SHARE * _IDLE_STEP:
                return

    def warm_up(self, call: Call, seconds: float) -> None:
        end = time.perf_counter() + seconds
        call()
        while time.perf_counter() < end:
            call()

    def time(self, call: Call, calls: int) -> float:
        if self._other is None:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            self._other.add_(1.0)
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total / calls


class CudaClock:
    """CUDA events around each call, the L2 cache overwritten in between, as Triton's do_bench does.

    The overwriting kernel is queued before the first event, so that the call is enqueued while the
    device is still busy: what is timed is the device, not the launch, unless launching takes longer
    than overwriting. On an H200 that takes 0.1 ms; overwriting `times` times hides launches longer.
    """

    _FLUSH_BYTES = 512 * 2**20  # several times the largest L2 so far

    def __init__(self, times: int) -> None:
        self._other = torch.empty(self._FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._times = times

    def settle(self) -> None:
        torch.cuda.synchronize()

    def warm_up(self, call: Call, seconds: float) -> None:
        call()

    def time(self, call: Call, calls: int) -> float:
        event = functools.partial(torch.cuda.Event, enable_timing=True)
        events = [(event(), event()) for _ in range(calls)]
        for start, end in events:
            for _ in range(self._times):
                self._other.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        milliseconds = sum(float(start.elapsed_time(end)) for start, end in events)
        return milliseconds / 1e3 / calls


def clock_for(device: str, *, evict: int = 0, hide_launches: bool = False) -> Clock:
    """A clock; `hide_launches` is for a GPU's calls of a few launches, 0.2 ms at most."""
    return CudaClock(3 if hide_launches else 1) if device == "cuda" else CpuClock(evict)


def take_turns(
    calls: Mapping[str, Call],
    clock: Clock,
    effort: Effort,
    *,
    keep: Collection[str] = (),
    interval: Callable[[Mapping[str, list[float]]], float] = lambda seconds: math.inf,
) -> dict[str, Samples]:
    """Time the contenders in turns.

    Args:
        calls: by contender; each has been called before (compiled, packed, allocated).
        keep: contenders that take part in every round, however slow.
        interval: width, relative to its value, of the interval around what the caller is after;
            measuring ends when it is below `effort.precise_enough`.

    Returns:
        Samples by contender, of all rounds or, for those far behind, of the first three or of a
        single call.
    """
    if not calls:
        return {}
    repeats = {name: _repeats(call, clock, effort) for name, call in calls.items()}
    least = min(repeat.once for repeat in repeats.values())
    names = [name for name in calls if name in keep or not repeats[name].hopeless(least)]
    seconds: dict[str, list[float]] = {
        name: [] if name in names else [repeats[name].once] for name in calls
    }
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in itertools.count():
            if effort.over(done, time.perf_counter() - start):
                break
            if done >= effort.least_rounds and interval(seconds) < effort.precise_enough:
                break
            if done == _FEWEST_ROUNDS:
                names = [name for name in names if name in keep or _in_reach(name, seconds)]
            # Another goes first in each round, so that none is always the one after the slowest.
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                clock.settle()
                if repeats[name].warm:
                    clock.warm_up(calls[name], effort.warm_up_seconds)
                seconds[name].append(clock.time(calls[name], repeats[name].calls))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(values, repeats[name].calls) for name, values in seconds.items()}


def _in_reach(name: str, seconds: Mapping[str, list[float]]) -> bool:
    fastest = min(min(values) for values in seconds.values())
    return min(seconds[name]) <= max(_SHORT, _FAR_BEHIND * fastest)


@dataclass(frozen=True)
class _Repeats:
    """How a contender is sampled: calls a sample, whether untimed ones go before, and what one call
    took.
    """

    calls: int
    warm: bool
    once: float

    def hopeless(self, least: float) -> bool:
        return self.once > max(_HOPELESS_SECONDS, _HOPELESS * least)


def _repeats(call: Call, clock: Clock, effort: Effort) -> _Repeats:
    """Untimed calls go before a sample only where one call does not take long."""
    clock.settle()
    once = clock.time(call, 1)
    if once >= _LONG:
        return _Repeats(1, False, once)
    clock.warm_up(call, effort.warm_up_seconds)
    once = max(clock.time(call, 1), 1e-7)
    return _Repeats(max(1, min(10_000, round(effort.sample_seconds / once))), True, once)
