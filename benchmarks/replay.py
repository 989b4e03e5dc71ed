# SPDX-License-Identifier: BSD-3-Clause
"""A clock for pytest-benchmark that tells times taken before."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

__all__ = ["REPLAY", "Replay", "replayed"]


class Replay:
    """`next_call` advances the clock by the next sample; `now` reads it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: deque[float] = deque()

    def load(self, samples: Sequence[float]) -> None:
        """Queue seconds a call, one for each round."""
        self._now = 0.0
        self._samples = deque(samples)

    def now(self) -> float:
        """Seconds; what pytest-benchmark takes for a timer."""
        return self._now

    def next_call(self) -> None:
        """Stands for one call."""
        self._now += self._samples.popleft()


REPLAY = Replay()

replayed: Any = pytest.mark.benchmark(timer=REPLAY.now)
"""Marks a test whose benchmark is fed by `REPLAY`."""
