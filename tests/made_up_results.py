# SPDX-License-Identifier: BSD-3-Clause
"""Made-up results and small cases for the tests of `segpose bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from segpose_kernels.bench.cases import Case, Mode
from segpose_kernels.bench.limits import Limits
from segpose_kernels.bench.results import CaseResult, Measurement, Run
from segpose_kernels.testing.spec import ConvSpec

LIMITS = Limits(
    {"float32": 2e11, "bfloat16": 3e12},
    ((2**18, 8e10), (2**22, 3e10), (2**28, 1.4e10)),
    "made up",
)

SMALL = ConvSpec(
    "small",
    "conv_transpose2d",
    *(2, 6, 4, 5, 4),
    (4, 3),
    stride=(2, 2),
    padding=(1, 1),
    activation="relu",
)


def small_case(
    spec: ConvSpec = SMALL,
    mode: Mode = "inference",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    flops = float(spec.flops * (3 if mode == "training" else 1))
    return Case(spec.name, "small", mode, dtype, spec, spec.input_shape, flops, 1e4, **options)


def measurement(name: str, *samples: float, **options: Any) -> Measurement:
    ours = name.startswith("segpose")
    return Measurement(name, ours, list(samples), 1, 1e-7, 0.1, **{"peak_bytes": 2**20} | options)


def result(
    times: Mapping[str, float], *, name: str = "small", noise: float = 0.0, **options: Any
) -> CaseResult:
    """A case in which each contender took its time, in seconds, in every one of nine rounds.

    `noise` spreads the samples of this package alone, evenly around its time.
    """
    measurements = {}
    for contender, seconds in times.items():
        wobble = noise if contender == "segpose" else 0.0
        samples = [seconds * (1 + wobble * (i - 4) / 4) for i in range(9)]
        measurements[contender] = measurement(contender, *samples)
    values: dict[str, Any] = {
        "name": name,
        "group": "transposed",
        "mode": "inference",
        "dtype": "float32",
        "batch": 1,
        "flops": 1e9,
        "bytes": 1e7,
        "note": "",
        "sweep": None,
        "reference": "float64",
        "absent": {},
        "floor": 0.004,
    }
    return CaseResult(measurements=measurements, **values | options)


def run_of(*cases: CaseResult, threads: int = 2, isa: str = "avx512") -> Run:
    machine = {
        "date": "2020-01-01 00:00 UTC",
        "command": "segpose bench --report",
        "commit": "0123456789",
        "processor": "a processor",
        "cores": 2,
        "threads": threads,
        "isa": isa,
        "caches": {"L1": 2**15, "L2": 2**21},
        "memory": 2**34,
        "platform": "a platform",
        "versions": {"segpose_kernels": "1.0", "torch": "9.9"},
        "gpu": None,
    }
    effort = {"sample_seconds": 0.01, "least_rounds": 7}
    contenders = ["segpose", "eager", "openvino"]
    settings = {"device": "cpu", "effort": effort, "evict_bytes": 0, "contenders": contenders}
    return Run(machine, settings, list(cases), LIMITS.to_dict())
