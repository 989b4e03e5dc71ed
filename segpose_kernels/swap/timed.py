# SPDX-License-Identifier: BSD-3-Clause
"""Times of a model's layers beside what their plans predict and what the machine allows."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..bench.limits import Limits, measure_limits
from .record import LayerCall

# Lanes of float32 that the prediction counts with, two multiply-adds of them a cycle.
_LANES = {"generic": 4, "avx2": 8, "avx512": 16, "amx": 16}
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 3, 50, 0.05


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of one layer's forward.

    Attributes:
        predicted: by the plan, for all threads at work; 0 where there is no plan.
        measured: median of some runs of the layer by itself.
        share: of the machine's limit: the least time that the layer's operations (by the direct
            definition) and bytes allow, over the measured one. A fast algorithm may exceed 1.
    """

    predicted: float
    measured: float
    share: float


class Stopwatch:
    """Measures the limits of this machine once, then layers against them."""

    def __init__(self) -> None:
        limits = measure_limits("cpu", torch.get_num_threads(), seconds=0.05)
        if limits is None:
            raise RuntimeError(
                "segpose_kernels.explain: measure=True needs the compiled module _limits; "
                "build it with `pip install -e .`"
            )
        self.limits: Limits = limits

    def time(self, call: LayerCall, plan: Any, flops: float, moved: float) -> LayerTime:
        """`plan` is the `_plan.Plan` of the call, or None."""
        arguments = (call.input,)
        if call.output_size is not None:
            arguments = (call.input, call.output_size)  # type: ignore[assignment]
        runs: list[float] = []
        with torch.no_grad():
            call.module(*arguments)
            end = time.perf_counter() + _SECONDS
            while len(runs) < _LEAST_RUNS or (time.perf_counter() < end and len(runs) < _MOST_RUNS):
                start = time.perf_counter()
                call.module(*arguments)
                runs.append(time.perf_counter() - start)
        measured = statistics.median(runs)
        dtype = str(call.output.dtype).removeprefix("torch.")
        predicted = plan.cycles / self._cycles_per_second(plan.isa) if plan is not None else 0.0
        share = self.limits.floor(dtype, flops, moved) / measured
        return LayerTime(1e3 * predicted, 1e3 * measured, share)

    def _cycles_per_second(self, isa: str) -> float:
        """Of all threads together."""
        return self.limits.flops["float32"] / (4 * _LANES[isa])
