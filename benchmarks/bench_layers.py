# SPDX-License-Identifier: BSD-3-Clause
"""The layers of CPM2DPose and SegNet, each geometry once."""

from __future__ import annotations

from typing import Any

from replay import REPLAY, replayed
from tables import each_case

from segpose_kernels.bench.results import Measurement


@replayed
@each_case("grouped", "cpm-layers", "segnet-layers")
def bench_layers(measurement: Measurement, benchmark: Any) -> None:
    benchmark.pedantic(REPLAY.next_call, rounds=len(measurement.samples))
