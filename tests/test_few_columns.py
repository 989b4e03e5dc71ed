# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions into few channels on the CPU kernels, whose vectors lie along the summed values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import _plan, functional
from segpose_kernels.backends import LIBRARY
from segpose_kernels.testing.forced import forced
from segpose_kernels.testing.numerics import relative_l2

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
    pytest.mark.compact,
]

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# Kernel, stride, padding, dilation.
GEOMETRIES = ((1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (4, 2, 1, 1), (2, 3, 0, 1), (3, 1, 2, 2))


@pytest.fixture(autouse=True)
def rows() -> Iterator[None]:
    with forced("rows"):
        yield


def operands(
    columns: int, depth: int, kernel: int, width: int, dtype: torch.dtype, *, transposed: bool
) -> list[Tensor]:
    outer, inner = (depth, columns) if transposed else (columns, depth)
    return [
        torch.randn(3, depth, 6, width).to(dtype),
        torch.randn(outer, inner, kernel, kernel).to(dtype),
        torch.randn(columns).to(dtype),
    ]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 17, 19])
def test_every_geometry(columns: int, transposed: bool, dtype: torch.dtype) -> None:
    """Rows of one tile and more, ragged ones too; values that fill vectors and that do not."""
    plain = F.conv_transpose2d if transposed else F.conv2d
    fused = functional.conv_transpose2d_act if transposed else functional.conv2d_act
    for kernel, stride, padding, dilation in GEOMETRIES:
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        for depth, width in ((1, 7), (3, 21), (16, 9), (37, 16)):
            given = operands(columns, depth, kernel, width, dtype, transposed=transposed)
            expected = F.leaky_relu(plain(*(t.double() for t in given), **options), 0.1)
            for memory_format in (torch.channels_last, torch.contiguous_format):
                x = given[0].contiguous(memory_format=memory_format)
                y = fused(x, *given[1:], activation="leaky_relu", negative_slope=0.1, **options)
                error = relative_l2(y, expected)
                assert error < TOLERANCES[dtype], (kernel, stride, depth, width, memory_format)


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_gradient_of_few_input_channels(columns: int) -> None:
    """The data gradient of a layer that reads an image is a convolution into few channels."""
    x = torch.randn(2, columns, 9, 14, requires_grad=True)
    weight = torch.randn(24, columns, 3, 3)
    functional.conv2d_act(x, weight, None, padding=1, activation="none").square().sum().backward()
    exact = x.detach().double().requires_grad_()
    F.conv2d(exact, weight.double(), padding=1).square().sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert relative_l2(x.grad, exact.grad) < 1e-6


def test_nan_and_infinity_reach_what_sees_them_and_no_more() -> None:
    """Ragged ends of vectors must not multiply a neighbour by zero."""
    for depth in (3, 16, 21):
        x = torch.randn(1, depth, 8, 19)
        x[0, 0, 3, 5], x[0, depth - 1, 6, 17] = float("nan"), float("inf")
        weight = torch.randn(3, depth, 3, 3)
        expected = F.conv2d(x, weight, padding=1)
        y = functional.conv2d_act(x, weight, None, padding=1, activation="none")
        assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize(("columns", "last"), [(1, 1), (2, 2), (17, 1), (18, 2)])
def test_plan_gives_them_a_panel_of_their_own(columns: int, last: int) -> None:
    problem = _plan.ConvProblem(n=1, h=32, w=32, c=64, k=columns, r=3, s=3, padding=(1, 1))
    plan = _plan.plan(problem, op="fprop", dtype="float32", algorithm="rows")
    assert tuple(plan.panels[-1]) == (columns - last, last, last)
    assert sum(valid for _, valid, _ in plan.panels) == columns
