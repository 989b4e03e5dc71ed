# SPDX-License-Identifier: BSD-3-Clause
"""Weights that `optimize` brings into channels_last, and what lies beside them."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from segpose_kernels import optimize, restore
from segpose_kernels.backends import LIBRARY

pytestmark = pytest.mark.skipif(
    not LIBRARY.has_kernels_for("CPU"), reason="the library is not built"
)


def layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 3, padding=1)
    )


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("before", [False, True], ids=["wrapped", "wrapped after"])
@pytest.mark.parametrize("restored", [False, True], ids=["optimized", "restored"])
def test_distributed_data_parallel(before: bool, restored: bool) -> None:
    """Its gradients are views of its own memory, in the strides that the weights had."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        plain, x = layers(), torch.randn(2, 3, 8, 8)
        model = copy.deepcopy(plain)
        if before:
            optimize(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if not before:
            _, report = optimize(wrapped)
            assert report.memory_format == "preserve_format"
        if restored:
            restore(wrapped)
        for found, expected in zip(gradients(wrapped, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_shared_memory_stays_shared() -> None:
    model = layers().share_memory()
    _, report = optimize(model)
    assert report.memory_format == "preserve_format"
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_a_gradient_that_is_accumulated_over_it() -> None:
    """With an optimizer that walks through weights and gradients as they lie in memory."""
    plain, x = layers(), torch.randn(2, 3, 8, 8)
    model = copy.deepcopy(plain)
    for net in (plain, model):
        net(x).square().mean().backward()
    optimize(model)
    for net in (plain, model):
        net(-x).square().mean().backward()
        torch.optim.SGD(net.parameters(), lr=0.5, fused=True).step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    restore(model)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


def test_a_weight_of_another_shape_survives_restore() -> None:
    model, _ = optimize(layers())
    weight = torch.randn(8, 4, 3, 3)
    model[0].weight = nn.Parameter(weight.clone())
    restore(model)
    assert torch.equal(model[0].weight, weight)


def test_optimized_in_inference_mode_it_can_be_trained() -> None:
    model = layers()
    with torch.inference_mode():
        optimize(model)
    assert all(gradient.isfinite().all() for gradient in gradients(model, torch.randn(2, 3, 8, 8)))
