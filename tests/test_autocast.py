# SPDX-License-Identifier: BSD-3-Clause
"""Autocast: the dtypes of torch's own convolutions, and gradients in the parameters' dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import Conv2dAct, conv2d_act, conv_transpose2d_act

DTYPES = (torch.bfloat16, torch.float16)
PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "conv2d": (conv2d_act, F.conv2d),
    "conv_transpose2d": (conv_transpose2d_act, F.conv_transpose2d),
}


@pytest.mark.parametrize("given", [torch.float32, torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PAIRS)
def test_output_dtype_is_torchs(op: str, dtype: torch.dtype, given: torch.dtype) -> None:
    """float32, bfloat16 and float16 go to autocast's dtype; float64 is left alone."""
    ours, theirs = PAIRS[op]
    x, w, b = (torch.randn(s).to(given) for s in ((2, 3, 6, 5), (3, 3, 3, 3), (3,)))
    with torch.autocast("cpu", dtype):
        y, expected = ours(x, w, b, activation="relu"), theirs(x, w, b).relu()
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y.double(), expected.double(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PAIRS)
def test_gradients_come_in_the_parameters_dtype(op: str, dtype: torch.dtype) -> None:
    """Input in float32, weight in the low precision, bias in float32: each gets its own back."""
    ours, theirs = PAIRS[op]
    x = torch.randn(2, 3, 6, 5).requires_grad_()
    w = torch.randn(3, 3, 3, 3).to(dtype).requires_grad_()
    b = torch.randn(3).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = ours(x, w, b, negative_slope=0.5)
        expected = F.leaky_relu(theirs(x, w, b), 0.5)
    grad = torch.randn_like(y)
    mine = torch.autograd.grad(y, (x, w, b), grad)
    torchs = torch.autograd.grad(expected, (x, w, b), grad)
    for name, leaf, a, t in zip(("input", "weight", "bias"), (x, w, b), mine, torchs, strict=True):
        assert a.dtype is leaf.dtype, name
        scale = float(t.float().abs().max())
        error = float((a.float() - t.float()).abs().max())
        assert error <= 0.05 * scale, f"grad_{name}: {error} of {scale}"


@pytest.mark.parametrize("op", PAIRS)
def test_float64_with_float32_is_refused_as_without_autocast(op: str) -> None:
    ours, theirs = PAIRS[op]
    x, w = torch.randn(1, 3, 6, 6).double(), torch.randn(3, 3, 3, 3)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            with pytest.raises(RuntimeError):
                theirs(x, w)
            with pytest.raises(RuntimeError, match="should be the same"):
                ours(x, w)


def test_mixed_dtypes_meet_under_autocast() -> None:
    x, w = torch.randn(1, 3, 6, 6).half(), torch.randn(3, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d_act(x, w).dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="input is float16, weight float32"):
        conv2d_act(x, w)


def test_disabled_and_foreign_autocast_change_nothing() -> None:
    x, w = torch.randn(1, 3, 6, 6), torch.randn(3, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert conv2d_act(x, w).dtype is torch.float32
    with torch.autocast("xpu", torch.bfloat16):
        assert conv2d_act(x, w).dtype is torch.float32


def test_integers_are_left_alone() -> None:
    x, w = torch.ones(1, 1, 4, 4, dtype=torch.int64), torch.ones(1, 1, 2, 2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d_act(x, w, activation="relu").dtype is torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_trains_under_autocast(dtype: torch.dtype) -> None:
    module = Conv2dAct(3, 4, 3, activation="relu")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, losses = torch.randn(4, 3, 8, 8), []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = module(x).float().pow(2).mean()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.dtype is torch.float32 for p in module.parameters()
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
