# SPDX-License-Identifier: BSD-3-Clause
"""Small problems that between them reach every kernel of the CUDA backend.

A scenario names the kernels it is there for: the plan must choose them, and the test sees them run.
`{m}` stands for the dtype as tensor cores or multiply-adds compute it (f16, bf16, tf32 or f32,
f64), `{s}` for the dtype as it lies in memory (f16, bf16, f32, f64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from segpose_kernels.testing.fused import call_fused
from segpose_kernels.testing.spec import ConvSpec, ConvTensors, Op

CONV: Op = "conv2d"
TRANSPOSED: Op = "conv_transpose2d"

# Names of dtypes in kernels: "tf32" and "f32" are the two ways of torch.float32.
DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "f32": torch.float32,
    "f64": torch.float64,
}
HALVES = ("f16", "bf16")
TF32 = ("tf32",)
MMA = (*HALVES, *TF32)
FMA = ("f32", "f64")
STORED = (*HALVES, *FMA)  # one for each element type in memory
ALL = (*MMA, *FMA)


@dataclass(frozen=True)
class Scenario:
    """A problem, how it lies in memory, and the kernels it has to reach."""

    spec: ConvSpec
    kernels: tuple[str, ...]
    dtypes: tuple[str, ...] = MMA
    backward: bool = False
    multiprocessors: int = 1  # with one, the tile that wastes least wins
    layout: str = "channels_last"

    def expected(self, dtype: str) -> set[str]:
        """Names of the kernels, up to their tile, that a run in `dtype` must launch."""
        storage = "f32" if dtype == "tf32" else dtype
        return {name.format(m=dtype, s=storage) for name in self.kernels}

    def __str__(self) -> str:
        return self.spec.name


def _same(
    name: str, c_in: int, c_out: int, h: int, w: int, k: int = 3, groups: int = 1
) -> ConvSpec:
    """A convolution that keeps its extents."""
    return ConvSpec(
        name, CONV, 1, c_in, c_out, h, w, (k, k), padding=(k // 2, k // 2), groups=groups
    )


SCENARIOS: tuple[Scenario, ...] = (
    # Tiles of the tensor cores. Extents are ragged against each, and reductions longer than the
    # pipelines.
    Scenario(_same("tile-128x128", 24, 120, 11, 17), ("gather_mma_{m}_128x128", "pack_filter_{m}")),
    Scenario(_same("tile-256x64", 24, 56, 27, 28), ("gather_mma_{m}_256x64",)),
    Scenario(_same("tile-128x64", 24, 56, 9, 13), ("gather_mma_{m}_128x64",)),
    Scenario(_same("tile-64x64", 24, 40, 5, 9), ("gather_mma_{m}_64x64",)),
    Scenario(_same("tile-128x32", 24, 8, 11, 17), ("gather_mma_{m}_128x32",), multiprocessors=2),
    Scenario(_same("narrow-128x64-c3", 3, 40, 5, 9, 7), ("gather_mma_{m}_128x64_narrow",), HALVES),
    Scenario(_same("narrow-128x32-c3", 3, 32, 5, 9, 7), ("gather_mma_{m}_128x32_narrow",), HALVES),
    Scenario(_same("narrow-128x64-c2", 2, 40, 5, 9, 7), ("gather_mma_{m}_128x64_narrow",), TF32),
    Scenario(
        _same("narrow-128x32-c2", 2, 40, 5, 9, 7),
        ("gather_mma_{m}_128x32_narrow",),
        TF32,
        multiprocessors=2,
    ),
    Scenario(_same("split-k", 104, 8, 9, 13), ("finish_gather_{s}",), ALL, multiprocessors=16),
    Scenario(
        _same("wgrad-128x128", 24, 104, 13, 11),
        ("wgrad_mma_{m}_128x128", "finish_wgrad_{s}", "rows_vector_{s}", "finish_bias_{s}"),
        backward=True,
    ),
    Scenario(_same("wgrad-64x128", 24, 8, 13, 11), ("wgrad_mma_{m}_64x128",), backward=True),
    Scenario(_same("wgrad-64x64", 16, 8, 13, 11, 1), ("wgrad_mma_{m}_64x64",), backward=True),
    Scenario(
        _same("wgrad-narrow", 1, 1, 13, 11, 3), ("wgrad_mma_{m}_64x64_narrow",), backward=True
    ),
    # Multiply-adds.
    Scenario(_same("fma", 3, 70, 9, 15, 5), ("gather_fma_{m}", "pack_filter_{m}"), FMA),
    Scenario(
        _same("wgrad-fma", 7, 70, 9, 7),
        ("wgrad_fma_{m}", "finish_wgrad_{s}", "finish_bias_{s}"),
        FMA,
        backward=True,
    ),
    Scenario(_same("rows-vector", 8, 16, 9, 7), ("rows_vector_{s}",), FMA, backward=True),
    # Few channels, one channel a group, other layouts.
    Scenario(_same("direct-1", 3, 1, 23, 29), ("direct_{s}_1",), STORED),
    Scenario(_same("direct-1-vector", 16, 1, 23, 29), ("direct_{s}_1_vector",), STORED),
    Scenario(_same("direct-8", 1, 10, 23, 29), ("direct_{s}_8",), STORED),
    Scenario(_same("direct-8-vector", 8, 8, 23, 29, 1), ("direct_{s}_8_vector",), STORED),
    Scenario(_same("depthwise-vector", 40, 40, 9, 7, 3, 40), ("depthwise_{s}_vector",), STORED),
    Scenario(_same("depthwise", 37, 37, 9, 7, 5, 37), ("depthwise_{s}",), STORED),
    Scenario(
        _same("depthwise-wgrad", 40, 40, 9, 7, 5, 40),
        ("depthwise_wgrad_{s}",),
        STORED,
        backward=True,
    ),
    Scenario(
        _same("rows-any", 70, 24, 9, 7),
        ("rows_any_{s}",),
        STORED,
        layout="contiguous",
        backward=True,
    ),
)


def check_infinite_pixel(spec: ConvSpec, tensors: ConvTensors) -> None:
    """An infinity in the last row of the input shows where a window holds it, nowhere else: what
    pads a reduction must be zeros on both sides.
    """
    tensors.input[0, 0, -1, 0] = float("inf")
    output = call_fused(spec, tensors.input, tensors.weight, tensors.bias, backend="cuda")
    wide = (None if t is None else t.double() for t in (tensors.weight, tensors.bias))
    expected = call_fused(spec, tensors.input.double(), *wide, backend="aten")
    torch.testing.assert_close(output.isfinite(), expected.isfinite())
