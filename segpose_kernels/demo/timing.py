# SPDX-License-Identifier: BSD-3-Clause
"""Time of the optimized models beside torch eager in both memory formats, taken in turns.

Turns matter: on a busy machine a neighbour's load then falls on all alike. What is reported is the
    median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .workloads import EAGER, EAGER_CHANNELS_LAST, OURS, Workload, variants


@dataclass(frozen=True)
class TimingRow:
    """Medians in milliseconds for one operation, by implementation.

    A training step is forward, loss and backward to every parameter; the optimizer is left out,
    being the same.
    """

    workload: str
    operation: str
    milliseconds: dict[str, float]
    rounds: int

    @property
    def ratio(self) -> float:
        """Ours over the faster of the two eager ones; below 1 is faster."""
        return self.milliseconds[OURS] / min(
            self.milliseconds[EAGER], self.milliseconds[EAGER_CHANNELS_LAST]
        )


def time_workload(workload: Workload, *, seconds: float, least_rounds: int = 3) -> list[TimingRow]:
    """Time forward (no_grad) and training step, each for `seconds` or `least_rounds` rounds."""
    models = variants(workload)
    return [
        _time(workload.name, "forward", seconds, least_rounds, _forwards(models)),
        _time(workload.name, "training step", seconds, least_rounds, _steps(models, workload.loss)),
    ]


def _forwards(models: dict[str, tuple[nn.Module, Tensor]]) -> dict[str, Callable[[], object]]:
    def forward(model: nn.Module, image: Tensor) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return model(image)

        return run

    return {name: forward(*pair) for name, pair in models.items()}


def _steps(
    models: dict[str, tuple[nn.Module, Tensor]], loss: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], object]]:
    def step(model: nn.Module, image: Tensor) -> Callable[[], object]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(loss(model(image)))

        return run

    return {name: step(*pair) for name, pair in models.items()}


def _time(
    workload: str,
    operation: str,
    seconds: float,
    least_rounds: int,
    functions: dict[str, Callable[[], object]],
) -> TimingRow:
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < end:
        # Another goes first in each round, so that none is always the one after the slowest.
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            start = time.perf_counter()
            functions[name]()
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    medians = {name: statistics.median(values) * 1e3 for name, values in samples.items()}
    return TimingRow(workload, operation, medians, rounds)
