# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of a prepared model that write the largest values of 2x2 pixels themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from inference_helpers import run_steps
from torch import Tensor, nn

import segpose_kernels as sk
from segpose_kernels.swap.blueprint import CONV, POOL, POOLED_CONV

_plan = pytest.importorskip("segpose_kernels._plan")

ALGORITHMS = ("winograd", "fourier", "split", "rows")
# Images, C_in, C_out, H, W, kernel: even, odd, ragged channels, narrower than a tile of 16 pixels.
SHAPES = (
    (1, 64, 64, 32, 32, 3),
    (2, 32, 48, 17, 24, 3),
    (1, 33, 70, 26, 18, 3),
    (3, 16, 17, 9, 34, 3),
    (1, 24, 96, 23, 21, 3),
    (2, 64, 32, 13, 20, 7),
    (2, 40, 24, 5, 8, 5),
)


def _takes(algorithm: str, dtype: torch.dtype, kernel: int) -> bool:
    """AMX tiles take every direct convolution, and bfloat16 nowhere else but in rows."""
    tiles = _plan.selected_isa() == "amx"
    if algorithm == "split":
        return tiles
    transforms = kernel == 3 if algorithm == "winograd" else kernel >= 5
    return algorithm == "rows" or (transforms and not (tiles and dtype == torch.bfloat16))


CASES = [
    (dtype, algorithm, shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for algorithm in ALGORITHMS
    for shape in SHAPES
    if _takes(algorithm, dtype, shape[-1])
]


@pytest.fixture(autouse=True)
def _automatic_algorithm() -> Iterator[None]:
    yield
    torch.ops.segpose.set_algorithm("")


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("dtype", "algorithm", "shape"), CASES, ids=str)
def test_pools_as_two_steps_do(
    dtype: torch.dtype, algorithm: str, shape: tuple[int, int, int, int, int, int]
) -> None:
    """The same bits, NaNs included; what stands between is not written."""
    ops = torch.ops.segpose
    n, c, k, h, w, kernel = shape
    x = torch.randn(n, c, h, w).to(dtype).to(memory_format=torch.channels_last)
    x[0, 0, 2, 3] = math.nan
    weight, bias = torch.randn(k, c, kernel, kernel).to(dtype), torch.randn(k).to(dtype)
    ops.set_algorithm(algorithm)
    padding = [kernel // 2, kernel // 2]
    for slope in (0.0, 0.2, 1.0):
        attributes = ([1, 1], padding, [0, 0], [1, 1], 1, False, slope, 1 << 30, [])
        handle = ops.prepare_conv(weight, bias, list(x.shape), *attributes)
        plan = ops.prepared_info(handle)[0].split()
        assert plan[1] == algorithm
        results = []
        for kind in (CONV, POOLED_CONV):
            between = _poisoned(n, k, h, w, dtype=dtype)
            out = _poisoned(n, k, h // 2, w // 2, dtype=dtype)
            run_steps([kind, handle, 0, 1, POOL, 0, 1, 2], [x, between, out])
            results.append(out)
        ops.release_prepared(handle)
        assert torch.equal(results[0].isnan(), results[1].isnan())
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
        assert not results[0].isnan().all()
        whole_windows = "tiles=columns" in plan and w % 2 == 0
        if (algorithm == "split" and whole_windows) or (
            algorithm in ("winograd", "fourier") and dtype == torch.float32
        ):
            assert between.isnan().all(), "written though the convolution can pool"


def test_a_pool_must_follow() -> None:
    ops = torch.ops.segpose
    x = torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last)
    attributes = ([1, 1], [1, 1], [0, 0], [1, 1], 1, False, 0.0, 1 << 20, [])
    handle = ops.prepare_conv(torch.randn(4, 3, 3, 3), None, list(x.shape), *attributes)
    between = _poisoned(1, 4, 8, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no pool reads what step 0 writes"):
        run_steps([POOLED_CONV, handle, 0, 1], [x, between])
    ops.release_prepared(handle)


class _Branches(nn.Module):
    """What a convolution writes goes to a pool, and (with `shared`) elsewhere too."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 16, 3, padding=1)
        self.last = nn.Conv2d(48, 8, 3, padding=1)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        pooled = torch.max_pool2d(y, 2)
        z = self.second(pooled).relu()
        joined = torch.cat([pooled, z], 1)
        result: Tensor = self.last(joined)
        return result + y[:, :8, ::2, ::2] if self.shared else result


@pytest.mark.parametrize("shared", [False, True])
def test_models_with_pools_inside_concatenations(shared: bool) -> None:
    """The result lies inside of a concatenation, and its source may be read again."""
    model = _Branches(shared).eval()
    images = [torch.randn(2, 16, 24, 20) for _ in range(3)]
    with torch.no_grad():
        expected = [model(image) for image in images]
        fused, _ = sk.optimize(model, mode="inference")
        for _ in range(2):
            for image, right in zip(images, expected, strict=True):
                torch.testing.assert_close(fused(image), right, rtol=1e-4, atol=1e-4)
