# SPDX-License-Identifier: BSD-3-Clause
"""The epilogue's edges are torch's: NaN, infinities, zeros of both signs, and the mask at zero."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import conv2d_act, conv_transpose2d_act
from segpose_kernels.settings import precision
from segpose_kernels.testing.numerics import TOLERANCES

INF, NAN = math.inf, math.nan
EDGES = (NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 2.0, -3.0)
DTYPES = tuple(TOLERANCES)


def identity(values: Tensor, *, transposed: bool, **options: Any) -> Tensor:
    """`values` [C] as the bias of a convolution that adds zero: the epilogue sees them as they are.

    One channel for each value; a 1x1 convolution of zeros contributes +0 to each.
    """
    c = values.numel()
    function = conv_transpose2d_act if transposed else conv2d_act
    zeros = torch.zeros(1, c, 1, 1, dtype=values.dtype)
    weight = torch.zeros(c, c, 1, 1, dtype=values.dtype)
    return function(zeros, weight, values, backend="cpu", **options).flatten()


def expected(values: Tensor, activation: str, slope: float) -> Tensor:
    values = values + 0.0  # the sum with +0 turns -0.0 into +0.0
    if activation == "none":
        return values
    return F.relu(values) if activation == "relu" else F.leaky_relu(values, slope)


@pytest.mark.compact
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        ("none", 0.01),
        ("relu", 0.01),
        ("leaky_relu", 0.01),
        ("leaky_relu", 0.0),
        ("leaky_relu", 1.0),
        ("leaky_relu", 1.5),
        ("leaky_relu", -0.5),
    ],
)
def test_forward_edges(activation: str, slope: float, transposed: bool, dtype: torch.dtype) -> None:
    values = torch.tensor(EDGES, dtype=dtype)
    actual = identity(values, transposed=transposed, activation=activation, negative_slope=slope)
    torch.testing.assert_close(
        actual,
        expected(values, activation, slope),
        rtol=torch.finfo(dtype).eps,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.compact
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        ("none", 0.01),
        ("relu", 0.01),
        ("leaky_relu", 0.25),
        ("leaky_relu", 0.0),
        ("leaky_relu", 2.0),
    ],
)
def test_gradient_at_edges(
    activation: str, slope: float, transposed: bool, dtype: torch.dtype
) -> None:
    """Gradient of the bias is the mask itself: slope (leaky) or 0 (relu) at zero, as in torch."""
    values = torch.tensor([0.0, -0.0, 2.0, -3.0, INF, -INF], dtype=dtype, requires_grad=True)
    grad = torch.tensor([3.0, 5.0, 7.0, 11.0, 13.0, 17.0], dtype=dtype)
    actual = identity(values, transposed=transposed, activation=activation, negative_slope=slope)
    (actual_grad,) = torch.autograd.grad(actual, values, grad)
    reference = expected(values, activation, slope)
    (expected_grad,) = torch.autograd.grad(reference, values, grad)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_infinite_gradient_is_masked(transposed: bool, activation: str) -> None:
    """relu sends nothing back where it clamped, even for an infinite gradient (0 * inf is NaN)."""
    values = torch.tensor([-1.0, 1.0], requires_grad=True)
    y = identity(values, transposed=transposed, activation=activation, negative_slope=0.5)
    (grad,) = torch.autograd.grad(y, values, torch.tensor([INF, 4.0]))
    assert grad.tolist() == [0.0 if activation == "relu" else INF, 4.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [conv2d_act, conv_transpose2d_act])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_nan_in_the_input_reaches_its_outputs_only(
    activation: str,
    function: object,
    dtype: torch.dtype,
) -> None:
    """A NaN or infinity spreads over the taps that see it, and with "exact" nowhere else."""
    assert callable(function)
    transposed = function is conv_transpose2d_act
    x = torch.randn(2, 3, 6, 7, dtype=dtype)
    x[0, 1, 2, 3] = NAN
    x[1, 2, 0, 0] = INF
    w = torch.randn(3, 3, 3, 3, dtype=dtype)
    plain = F.conv_transpose2d if transposed else F.conv2d
    reference = expected(plain(x.double(), w.double(), padding=1), activation, 0.01)
    finite = reference.isfinite()
    tolerance = 4 * torch.finfo(dtype).eps * 3
    with precision("exact"):
        actual = function(x, w, None, padding=1, activation=activation, backend="cpu")
    assert torch.equal(actual.isnan(), reference.isnan())
    assert torch.equal(actual == INF, reference == INF)
    assert torch.equal(actual == -INF, reference == -INF)
    torch.testing.assert_close(
        actual[finite].double(), reference[finite], rtol=tolerance, atol=tolerance
    )
    # Otherwise they may spread to neighbours, never get lost.
    actual = function(x, w, None, padding=1, activation=activation, backend="cpu")
    assert not actual[reference.isnan()].isfinite().any()
    assert not actual[reference.isinf()].isfinite().any()
    both = finite & actual.isfinite()
    torch.testing.assert_close(
        actual[both].double(), reference[both], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("stride", [1, 3])
def test_output_without_any_tap_is_the_activated_bias(transposed: bool, stride: int) -> None:
    """Pixels that no tap reaches still pass through the epilogue."""
    bias = torch.tensor([-2.0, 0.5])
    if transposed:  # stride 3 over kernel 1: two of three rows and columns have no tap
        y = conv_transpose2d_act(
            torch.ones(1, 1, 3, 3), torch.ones(1, 2, 1, 1), bias, stride, negative_slope=0.5,
            output_padding=stride - 1, backend="cpu",
        )  # fmt: skip
        mask = torch.zeros(y.shape[2:], dtype=torch.bool)
        mask[::stride, ::stride] = True
    else:  # padding over the kernel: the border sees zeros only
        y = conv2d_act(
            torch.ones(1, 1, 3, 3), torch.ones(2, 1, 1, 1), bias, 1, 2, negative_slope=0.5,
            backend="cpu",
        )  # fmt: skip
        mask = torch.zeros(y.shape[2:], dtype=torch.bool)
        mask[2:5, 2:5] = True
    for channel, value in enumerate([-2.0, 0.5]):
        plane = y[0, channel]
        outside = value if value > 0 else value * 0.5
        inside = value + 1 if value + 1 > 0 else (value + 1) * 0.5
        assert torch.equal(plane, torch.where(mask, torch.tensor(inside), torch.tensor(outside)))
