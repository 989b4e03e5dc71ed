# SPDX-License-Identifier: BSD-3-Clause
"""Transposed convolutions of well-known networks."""

from __future__ import annotations

from typing import Any

from replay import REPLAY, replayed
from tables import each_case

from segpose_kernels.bench.results import Measurement


@replayed
@each_case("transposed", "networks")
def bench_transposed(measurement: Measurement, benchmark: Any) -> None:
    benchmark.pedantic(REPLAY.next_call, rounds=len(measurement.samples))
