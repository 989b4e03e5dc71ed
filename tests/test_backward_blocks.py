# SPDX-License-Identifier: BSD-3-Clause
"""The backward of layers with small filters, which runs a few images at a time, and wgrads of few
channels, whose vectors hold filters.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import functional
from segpose_kernels.backends import LIBRARY
from segpose_kernels.testing.forced import forced
from segpose_kernels.testing.numerics import relative_l2

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
    pytest.mark.compact,
]

# Channels in and out, kernel, stride, padding, output padding of a transposed convolution.
LAYERS = (
    (16, 10, 3, 2, 1, 1),
    (1, 16, 3, 2, 1, 1),
    (3, 32, 5, 1, 2, 0),
    (7, 16, 3, 1, 1, 0),
    (20, 17, 2, 2, 0, 0),
    (16, 48, 1, 1, 0, 0),
)
ACTIVATIONS = (("none", 0.01), ("relu", 0.01), ("leaky_relu", 0.2))


def upstream(y: Tensor) -> Tensor:
    """The gradient that arrives at a result, the same in every dtype."""
    generator = torch.Generator().manual_seed(y.numel())
    return torch.randn(y.shape, generator=generator).to(y.dtype)


def gradients(
    given: list[Tensor], options: dict[str, int], activation: str, slope: float, *, transposed: bool
) -> list[Tensor]:
    x, w, b = (t.detach().requires_grad_() for t in given)
    fused = functional.conv_transpose2d_act if transposed else functional.conv2d_act
    y = fused(x, w, b, activation=activation, negative_slope=slope, **options)
    grad = upstream(y)
    if x.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous(memory_format=torch.channels_last)
    return list(torch.autograd.grad(y, (x, w, b), grad))


def exact(
    given: list[Tensor], options: dict[str, int], activation: str, slope: float, *, transposed: bool
) -> list[Tensor]:
    x, w, b = (t.detach().double().requires_grad_() for t in given)
    y = (F.conv_transpose2d if transposed else F.conv2d)(x, w, b, **options)
    if activation != "none":
        y = F.relu(y) if activation == "relu" else F.leaky_relu(y, slope)
    grad = upstream(y)
    return list(torch.autograd.grad(y, (x, w, b), grad))


def operands(layer: tuple[int, ...], images: int, size: int, *, transposed: bool) -> list[Tensor]:
    c_in, c_out, kernel = layer[:3]
    outer, inner = (c_in, c_out) if transposed else (c_out, c_in)
    return [
        torch.randn(images, c_in, size, size + 3),
        torch.randn(outer, inner, kernel, kernel) / (c_in * kernel),
        torch.randn(c_out),
    ]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_every_gradient(
    layer: tuple[int, ...], transposed: bool, activation: str, slope: float
) -> None:
    """Batches that fill blocks and that leave some images over."""
    options = {"stride": layer[3], "padding": layer[4]}
    if transposed:
        options["output_padding"] = layer[5]
    for images, size in ((8, 30), (13, 30), (35, 14)):
        given = operands(layer, images, size, transposed=transposed)
        expected = exact(given, options, activation, slope, transposed=transposed)
        for memory_format in (torch.channels_last, torch.contiguous_format):
            for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
                cast = [t.to(dtype) for t in given]
                cast[:2] = [t.contiguous(memory_format=memory_format) for t in cast[:2]]
                found = gradients(cast, options, activation, slope, transposed=transposed)
                for name, a, b in zip(("x", "w", "b"), found, expected, strict=True):
                    assert relative_l2(a, b) < tolerance, (name, images, memory_format, dtype)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_change_nothing(layer: tuple[int, ...], transposed: bool) -> None:
    options = {"stride": layer[3], "padding": layer[4]}
    given = operands(layer, 21, 28, transposed=transposed)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients(given, options, "relu", 0.01, transposed=transposed))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, a, b in zip(("x", "w", "b"), found[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_what_is_not_wanted_is_left_out(needs: tuple[int, ...]) -> None:
    x, w, b = operands(LAYERS[0], 19, 14, transposed=True)
    full = [t.detach().requires_grad_() for t in (x, w, b)]
    some = [t.detach().requires_grad_(bool(need)) for t, need in zip((x, w, b), needs, strict=True)]
    for tensors in (full, some):
        functional.conv_transpose2d_act(
            *tensors, 2, 1, 1, activation="relu"
        ).square().sum().backward()
    for need, a, b in zip(needs, full, some, strict=True):
        if not need:
            assert b.grad is None
        else:
            assert relative_l2(b.grad, a.grad) < 2e-6


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("filters", [16, 32, 64])
def test_filters_in_the_lanes(channels: int, filters: int) -> None:
    """wgrad of the first layers of a network, over bands of rows."""
    with forced("rows"):
        for kernel, stride, padding in ((3, 1, 1), (3, 2, 0), (5, 2, 2), (1, 1, 0)):
            layer = (channels, filters, kernel)
            given = operands(layer, 3, 21, transposed=False)
            options = {"stride": stride, "padding": padding}
            found = gradients(given, options, "leaky_relu", 0.1, transposed=False)
            expected = exact(given, options, "leaky_relu", 0.1, transposed=False)
            for name, a, b in zip(("x", "w", "b"), found, expected, strict=True):
                assert relative_l2(a, b) < 2e-6, (name, kernel, stride)
