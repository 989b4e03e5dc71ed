# SPDX-License-Identifier: BSD-3-Clause
"""Large results lie in memory that is used again, but only once nobody holds it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segpose_kernels import conv2d_act
from segpose_kernels.backends import LIBRARY
from segpose_kernels.settings import release_workspace
from segpose_kernels.swap import optimize

pytestmark = pytest.mark.skipif(not LIBRARY.loaded, reason="needs the C++ library")

MIB = 2**20
LEAST = 32 * MIB


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gc.collect()
    release_workspace()
    yield
    gc.collect()
    release_workspace()


def layer(
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[nn.Sequential, Tensor]:
    """One whose result takes exactly `LEAST` bytes."""
    module = nn.Sequential(nn.Conv2d(2, 32, 1), nn.ReLU()).eval()
    optimize(module, mode="inference")
    x = torch.randn(1, 2, 512, 512).to(memory_format=memory_format)
    with torch.no_grad():
        module(x)  # the first run shows the shapes
    return module, x


def expected(module: nn.Sequential, x: Tensor) -> Tensor:
    conv = module[0]
    result = torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]
    return result.relu()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("inference_mode", [False, True])
def test_memory_is_used_again(inference_mode: bool, memory_format: torch.memory_format) -> None:
    module, x = layer(memory_format)
    with torch.inference_mode(inference_mode), torch.no_grad():
        y = module(x)
        assert y.nbytes == LEAST
        assert y.is_contiguous(memory_format=memory_format)
        place = y.data_ptr()
        del y
        other = torch.randn_like(x)
        y = module(other)
        assert y.data_ptr() == place
        torch.testing.assert_close(y, expected(module, other))


@pytest.mark.parametrize(
    "hold",
    [
        lambda y: y,
        lambda y: y[:, :1],
        lambda y: y.detach(),
        lambda y: y.numpy(),
        lambda y: torch.from_dlpack(y),
        lambda y: y.untyped_storage(),
    ],
    ids=["itself", "view", "detached", "numpy", "dlpack", "storage"],
)
def test_what_is_held_is_not_written(hold: Callable[[Tensor], Any]) -> None:
    module, x = layer()
    with torch.no_grad():
        y = module(x)
        place = y.data_ptr()
        held = hold(y)
        del y
        later = [module(torch.randn_like(x)) for _ in range(3)]
        assert all(z.data_ptr() != place for z in later)
        assert len({z.data_ptr() for z in later}) == 3
        if isinstance(held, torch.UntypedStorage):
            held = torch.empty(0).set_(held).view(1, 512, 512, 32).permute(0, 3, 1, 2)
        values = torch.as_tensor(held)
        torch.testing.assert_close(values, expected(module, x)[:, : values.shape[1]])


def test_what_is_kept_is_bounded_and_released() -> None:
    module, x = layer()
    with torch.no_grad():
        results = [module(x) for _ in range(10)]
        release_workspace()
        results.clear()
        assert 7 * LEAST <= release_workspace() <= 8 * LEAST
        assert release_workspace() == 0


def test_smaller_results_are_ordinary() -> None:
    module, x = layer()
    with torch.no_grad():
        part = x[:, :, :256]
        module(part)
        y = module(part)
        release_workspace()
        del y
        assert release_workspace() == 0


def small(images: int) -> Tensor:
    """A result of 64 KiB an image."""
    x = torch.randn(images, 8, 16, 16).to(memory_format=torch.channels_last)
    return conv2d_act(x, torch.randn(64, 8, 1, 1), backend="cpu")


@pytest.mark.parametrize(("images", "kept"), [(3, False), (4, True), (64, True), (65, False)])
def test_small_results_are_kept_too(images: int, kept: bool) -> None:
    """From 256 KiB to 4 MiB."""
    y = small(images)
    release_workspace()
    del y
    assert release_workspace() == images * 2**16 * kept
    y = small(images)
    place = y.data_ptr()
    del y
    assert (small(images).data_ptr() == place) or not kept


def test_what_is_kept_of_small_results_is_bounded() -> None:
    results = [small(32) for _ in range(10)]
    release_workspace()
    results.clear()
    assert release_workspace() == 12 * MIB


def test_gradients_that_are_held_are_not_written() -> None:
    weight = torch.randn(64, 64, 5, 5, dtype=torch.float64).requires_grad_()  # 800 KiB
    x = torch.randn(4, 64, 16, 16, dtype=torch.float64).requires_grad_()  # 512 KiB
    held = []
    for factor in (1.0, 2.0, 3.0):
        weight.grad = x.grad = None
        y = conv2d_act(x, weight, padding=2, backend="cpu")
        (y.square() * factor).sum().backward()
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride()
        held.append(weight.grad)
    for factor, grad in enumerate(held, 1):
        torch.testing.assert_close(grad, held[0] * factor)
    assert len({grad.data_ptr() for grad in held}) == 3


def test_a_large_result_says_that_it_cannot_grow() -> None:
    module, x = layer()
    with torch.no_grad():
        y = module(x)
        with pytest.raises(RuntimeError, match="not resizable"):
            y.resize_(2 * y.numel())
