# SPDX-License-Identifier: BSD-3-Clause
"""Max-pooling and results in the default memory format, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segpose_kernels.backends import LIBRARY
from segpose_kernels.models import CPM2DPose
from segpose_kernels.pooling import MaxPool2x2, contiguous, is_pool2x2
from segpose_kernels.swap import optimize, restore

pytestmark = [
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not loaded"),
    pytest.mark.usefixtures("poison"),
]
NAN = float("nan")
SHAPES = [(2, 5, 6, 8), (1, 16, 7, 9), (3, 1, 2, 2), (1, 33, 5, 4), (2, 3, 1, 4), (0, 3, 4, 4)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def both(x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Result and gradient of the same input: ours, torch's."""
    results: list[tuple[Tensor, Tensor | None]] = []
    generator = torch.Generator().manual_seed(1)
    for pool in (MaxPool2x2(), lambda t: F.max_pool2d(t, 2)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = pool(leaf)
        grad = torch.randn(y.shape, generator=generator.manual_seed(1)).to(x.dtype)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pooling_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if min(shape[2:]) < 2:
        with pytest.raises(RuntimeError, match="Output size is too small"):
            MaxPool2x2()(torch.randn(shape, dtype=dtype))
        return
    # Few values, so that windows hold equal ones.
    x = torch.randint(-2, 3, shape).to(dtype).contiguous(memory_format=torch.channels_last)
    (y, grad), (expected, expected_grad) = both(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    assert grad is not None
    assert expected_grad is not None
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_of_nan_and_infinity(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 1] = x[0, 0, 1, 0] = x[1, 2, 3, 5] = NAN
    x[0, 1] = -float("inf")
    x[1, 0, 2, 2] = float("inf")
    (y, grad), (expected, expected_grad) = both(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert grad is not None
    assert expected_grad is not None
    assert torch.equal(grad, expected_grad)


def test_pooling_takes_every_layout() -> None:
    base = torch.randn(2, 6, 9, 8)
    for x in (base, base[:, ::2], base.transpose(2, 3), base[0]):
        assert torch.equal(MaxPool2x2()(x), F.max_pool2d(x, 2))


def test_pooling_differentiates_twice() -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    assert torch.autograd.gradcheck(MaxPool2x2(), x)
    assert torch.autograd.gradgradcheck(MaxPool2x2(), x)


def test_only_plain_pooling_is_replaced() -> None:
    assert is_pool2x2(nn.MaxPool2d(2))
    assert is_pool2x2(nn.MaxPool2d((2, 2), (2, 2)))
    for other in (
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d(2),
    ):
        assert not is_pool2x2(other)


def test_optimize_replaces_and_restores() -> None:
    model = CPM2DPose(width=0.1)
    plain = copy.deepcopy(model)
    optimize(model)
    assert type(model.maxpool) is MaxPool2x2
    x = torch.randn(1, 3, 40, 56)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)
    restore(model)
    assert type(model.maxpool) is nn.MaxPool2d


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 3},
        {"stride": (1, 2)},
        {"stride": None, "kernel_size": (2, 3)},
        {"padding": 1},
        {"dilation": (2, 1)},
        {"ceil_mode": True},
        {"kernel_size": [2, 2], "stride": [2, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_attributes_set_later_are_seen(mode: str, change: dict[str, object]) -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    )
    plain.double().eval()
    model, _ = optimize(copy.deepcopy(plain), mode=mode)
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64)
    before = {name: getattr(plain[2], name) for name in change}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(x), model(x)
            for attributes in (change, before):
                for net in (plain, model):
                    vars(net[2]).update(attributes)
                for _ in range(2):
                    torch.testing.assert_close(model(x), plain(x))


def test_indices_asked_for_later() -> None:
    model, _ = optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)))
    model[1].return_indices = True
    y, indices = model(torch.randn(2, 3, 9, 9))
    assert y.shape == indices.shape == (2, 8, 3, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 11, 28, 28), (1, 16, 16, 16), (3, 33, 5, 7), (2, 1, 3, 3)])
def test_contiguous_copies(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = contiguous(x)
    assert y.is_contiguous()
    assert torch.equal(y, x)
    grad = torch.randn(shape).to(dtype)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_a_result_may_be_changed_in_place() -> None:
    """As by a ReLU(inplace=True) behind the pool."""
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)
    ).double()
    model, _ = optimize(copy.deepcopy(plain))
    x = torch.randn(2, 3, 12, 13, dtype=torch.float64)
    for net in (plain, model):
        net(x).square().sum().backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_saved_tensors_may_come_back_in_another_format() -> None:
    x = torch.randn(2, 4, 6, 7).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        y = MaxPool2x2()(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 2).square().sum(), x)
    torch.testing.assert_close(found, expected)
