# SPDX-License-Identifier: BSD-3-Clause
"""DistributedDataParallel over a swapped module: two gloo processes, the gradients of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from segpose_kernels.swap import optimize

WORLD = 2


def small_model() -> nn.Module:
    """Both operators with each activation, the same weights in each process."""
    torch.manual_seed(11)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1),
        nn.LeakyReLU(),
        nn.Conv2d(4, 2, 1),
    )
    model, report = optimize(plain)
    assert report is not None
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(2 * WORLD, 3, 8, 10, generator=generator)
    return images, torch.randn(2 * WORLD, 2, 8, 10, generator=generator)


def gradients(model: nn.Module, images: Tensor, targets: Tensor) -> list[Tensor]:
    nn.functional.mse_loss(model(images), targets).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def train_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        model = DistributedDataParallel(small_model())
        images, targets = (t.chunk(WORLD)[rank] for t in batch())
        torch.save(gradients(model, images, targets), f"{folder}/gradients{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    spawn(train_rank, args=(str(tmp_path),), nprocs=WORLD)
    expected = gradients(small_model(), *batch())
    assert len(expected) == 8
    for rank in range(WORLD):
        for actual, reference in zip(
            torch.load(tmp_path / f"gradients{rank}.pt"), expected, strict=True
        ):
            torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-7)
