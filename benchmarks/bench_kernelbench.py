# SPDX-License-Identifier: BSD-3-Clause
"""The 2-D convolutions of KernelBench."""

from __future__ import annotations

from typing import Any

from replay import REPLAY, replayed
from tables import each_case

from segpose_kernels.bench.results import Measurement


@replayed
@each_case("kernelbench")
def bench_kernelbench(measurement: Measurement, benchmark: Any) -> None:
    benchmark.pedantic(REPLAY.next_call, rounds=len(measurement.samples))
