# SPDX-License-Identifier: BSD-3-Clause
"""Depthwise convolutions on the CPU kernels: channels that fill no vectors, runs between paddings,
strides on both sides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import functional
from segpose_kernels.backends import LIBRARY
from segpose_kernels.testing.numerics import relative_l2

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def compare(channels: int, size: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
    """Output, both gradients and the gradient of the bias against float64, in both formats."""
    transposed = options.pop("transposed", False)
    kernel = options.pop("kernel")
    operands = [
        torch.randn(2, channels, *size).to(dtype),
        torch.randn(channels, 1, *kernel).to(dtype),
        torch.randn(channels).to(dtype),
    ]
    plain = F.conv_transpose2d if transposed else F.conv2d
    fused = functional.conv_transpose2d_act if transposed else functional.conv2d_act
    exact = [t.double().clone().requires_grad_() for t in operands]
    expected = F.leaky_relu(plain(*exact, groups=channels, **options), 0.1)
    grad = torch.randn_like(expected).to(dtype)
    expected.backward(grad.double())
    for memory_format in (torch.channels_last, torch.contiguous_format):
        given: list[Tensor] = [t.clone() for t in operands]
        given[0] = given[0].contiguous(memory_format=memory_format)
        for tensor in given:
            tensor.requires_grad_()
        y = fused(*given, groups=channels, activation="leaky_relu", negative_slope=0.1, **options)
        y.backward(grad)
        found = [y, *(t.grad for t in given)]
        for name, value, reference in zip(
            ("output", "input", "weight", "bias"),
            found,
            [expected, *(t.grad for t in exact)],
            strict=True,
        ):
            assert value is not None
            assert relative_l2(value.detach(), reference.detach()) < TOLERANCES[dtype], name


@pytest.mark.parametrize("channels", [2, 3, 5, 8, 12, 16, 17, 24, 31, 33, 48])
def test_few_and_odd_channels(channels: int) -> None:
    """Rows long enough for several vectors of pixels, and what is left of one."""
    for columns in (15, 16, 17, 40, 61):
        compare(channels, (3, columns), torch.float32, kernel=(3, 3), padding=(1, 1))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [3, 20])
def test_geometry(dtype: torch.dtype, transposed: bool, channels: int) -> None:
    """Strides, dilation, kernels wider than the image, and taps that no pixel uses."""
    for options in (
        {"kernel": (3, 7), "padding": (1, 3)},
        {"kernel": (3, 1), "padding": (2, 0), "stride": (1, 2)},
        {"kernel": (2, 5), "padding": (0, 2), "dilation": (1, 2)},
        {"kernel": (1, 2), "padding": (0, 0), "stride": (3, 4)},
    ):
        compare(channels, (6, 25), dtype, transposed=transposed, **options)
    compare(channels, (3, 2), dtype, transposed=transposed, kernel=(3, 7), padding=(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_planes(dtype: torch.dtype, transposed: bool) -> None:
    """Rows long enough for vectors along them, in both formats: ragged, at edges, and images that
    no row or column lies inside of.
    """
    for size, options in (
        ((21, 37), {"kernel": (3, 3), "padding": (1, 1)}),
        ((9, 64), {"kernel": (1, 9), "padding": (0, 4)}),
        ((40, 19), {"kernel": (7, 5), "padding": (3, 0), "stride": (2, 1)}),
        ((13, 90), {"kernel": (3, 3), "padding": (4, 4), "dilation": (5, 3)}),
        ((3, 24), {"kernel": (9, 33), "padding": (4, 16)}),
        ((2, 600), {"kernel": (2, 2), "padding": (0, 0)}),
        ((40, 40), {"kernel": (3, 3), "padding": (9, 9), "dilation": (9, 9)}),
        ((40, 40), {"kernel": (3, 3), "padding": (24, 24), "dilation": (24, 24)}),
    ):
        compare(5, size, dtype, transposed=transposed, **options)
