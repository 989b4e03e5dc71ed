# SPDX-License-Identifier: BSD-3-Clause
"""The direct AMX kernel with as many steps and tiles as its larger groups of tiles need: groups of
three, two and one, ragged rows and columns, filters in one and in several chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from segpose_kernels import _plan, functional
from segpose_kernels.backends import LIBRARY
from segpose_kernels.testing.forced import forced
from segpose_kernels.testing.numerics import relative_l2

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
    pytest.mark.skipif(_plan.selected_isa() != "amx", reason="these tiles need AMX"),
]

# What a float32 sum of as many products may differ by, beside the rounding of the result.
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def split() -> Iterator[None]:
    with forced("split"):
        yield


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [32, 48, 71])
def test_convolution(columns: int, dtype: torch.dtype) -> None:
    """36 steps of 32 channels, rows of one to four tiles, one image and several."""
    weight = torch.randn(columns, 128, 3, 3).to(dtype)
    bias = torch.randn(columns).to(dtype)
    for images, height, width in ((1, 1, 5), (1, 3, 16), (2, 4, 17), (1, 9, 47), (3, 2, 64)):
        x = torch.randn(images, 128, height, width).to(dtype)
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
        for memory_format in (torch.channels_last, torch.contiguous_format):
            image = x.contiguous(memory_format=memory_format)
            y = functional.conv2d_act(image, weight, bias, padding=1, activation="relu")
            assert relative_l2(y, expected) < TOLERANCES[dtype], (images, height, width)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_transposed_convolution_of_many_channels(dtype: torch.dtype) -> None:
    """Four phases of 4 taps; 1024 channels in several chunks, wide maps in several blocks."""
    weight = torch.randn(1024, 48, 4, 4).to(dtype)
    for images, height, width in ((1, 3, 5), (2, 8, 6), (1, 11, 33)):
        x = torch.randn(images, 1024, height, width).to(dtype)
        expected = F.conv_transpose2d(x.double(), weight.double(), stride=2, padding=1)
        y = functional.conv_transpose2d_act(x, weight, None, stride=2, padding=1, activation="none")
        assert relative_l2(y, expected) < TOLERANCES[dtype], (images, height, width)
