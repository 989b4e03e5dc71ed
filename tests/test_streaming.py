# SPDX-License-Identifier: BSD-3-Clause
"""Results too large for the caches, which the CPU kernels store past them: csrc/cpu/streaming.h."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import segpose_kernels
from segpose_kernels import _plan, functional
from segpose_kernels.backends import LIBRARY
from segpose_kernels.testing.forced import forced
from segpose_kernels.testing.numerics import relative_l2

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]

# From so many bytes on.
STREAMED = 8 * 2**20


@pytest.mark.parametrize(
    ("channels", "size", "filters", "options"),
    [
        pytest.param((3, 64), (190, 187), (3, 3), {"padding": 1}, id="rows"),
        pytest.param((3, 72), (190, 187), (3, 3), {"padding": 1}, id="pixels between cache lines"),
        pytest.param((48, 112), (151, 141), (1, 1), {}, id="panels"),
        pytest.param((4, 48), (250, 201), (3, 3), {"padding": 1, "groups": 2}, id="ragged panels"),
        pytest.param((64, 64), (190, 187), (3, 3), {"padding": 1, "groups": 64}, id="depthwise"),
        pytest.param((8, 8), (520, 522), (3, 3), {"groups": 8}, id="depthwise, few channels"),
        pytest.param((64, 64), (190, 192), (5, 5), {"padding": 2, "groups": 64}, id="planes"),
        pytest.param((32, 64), (95, 94), (2, 2), {"stride": 2}, id="transposed"),
        pytest.param((3, 64), (95, 94), (3, 3), {"stride": 2, "padding": 1}, id="transposed rows"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float32, torch.channels_last),
        (torch.float64, torch.channels_last),
        (torch.float32, torch.contiguous_format),
    ],
    ids=str,
)
def test_output_and_gradient_of_input(
    channels: tuple[int, int],
    size: tuple[int, int],
    filters: tuple[int, int],
    options: dict[str, Any],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """The gradient too is large where a layer has as many channels on both sides."""
    transposed = "stride" in options
    groups = options.get("groups", 1)
    inner, outer = channels
    first, second = (inner, outer // groups) if transposed else (outer, inner // groups)
    x = torch.randn(1, inner, *size, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(first, second, *filters, dtype=dtype)
    bias = torch.randn(outer, dtype=dtype)
    plain = F.conv_transpose2d if transposed else F.conv2d
    fused = functional.conv_transpose2d_act if transposed else functional.conv2d_act

    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.relu(plain(*exact, **options))
    grad = torch.randn_like(expected)
    expected.backward(grad)

    x.requires_grad_()
    with segpose_kernels.precision("exact"):
        y = fused(x, weight, bias, activation="relu", backend="cpu", **options)
        y.backward(grad.to(dtype))
    assert y.numel() * y.element_size() >= STREAMED
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert relative_l2(y.detach(), expected.detach()) < tolerance
    assert x.grad is not None
    assert exact[0].grad is not None
    assert relative_l2(x.grad, exact[0].grad) < tolerance


@pytest.mark.skipif(_plan.selected_isa() != "amx", reason="these tiles need AMX")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 3e-3), (torch.float16, 5e-4), (torch.float32, 2e-6)],
    ids=str,
)
@pytest.mark.parametrize("channels", [64, 96, 80], ids=["panels", "three panels", "ragged panels"])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_tiles_of_sums(
    channels: int, dtype: torch.dtype, tolerance: float, activation: str
) -> None:
    """Panels of 32 channels beside a ragged one, at a stride; images that are not whole tiles."""
    x = torch.randn(1, 32, 171, 147).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, channels, 2, 2).to(dtype)
    bias = torch.randn(channels).to(dtype)
    expected = F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=2)
    if activation != "none":
        expected = F.leaky_relu(expected, 0.2 if activation == "leaky_relu" else 0.0)
    with forced("split"):
        y = functional.conv_transpose2d_act(
            x, weight, bias, stride=2, activation=activation, negative_slope=0.2, backend="cpu"
        )
    assert y.numel() * y.element_size() >= STREAMED
    assert relative_l2(y, expected) < tolerance


@pytest.mark.skipif(_plan.selected_isa() != "amx", reason="these tiles need AMX")
def test_tiles_of_sums_that_are_pooled() -> None:
    """The largest of 2 x 2 pixels, past the caches as well."""
    layer = torch.nn.Conv2d(3, 64, 3, padding=1).bfloat16()
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.MaxPool2d(2)).eval()
    x = torch.randn(1, 3, 600, 500).bfloat16()
    model, _ = segpose_kernels.optimize(model, mode="inference")
    with torch.no_grad(), forced("split"):
        y = model(x)
        rows = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        expected = F.max_pool2d(rows.relu(), 2)
    assert y.numel() * y.element_size() >= STREAMED
    assert relative_l2(y, expected) < 3e-3
