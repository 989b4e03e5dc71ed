# SPDX-License-Identifier: BSD-3-Clause
"""What is timed and measured: models with a batch and a loss, in three implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import CPM2DPose, SegNet
from ..swap import optimize

EAGER, EAGER_CHANNELS_LAST, OURS = "torch eager", "torch eager channels_last", "segpose_kernels"
IMPLEMENTATIONS = (EAGER, EAGER_CHANNELS_LAST, OURS)


@dataclass(frozen=True)
class Workload:
    """A model and a batch to time it on.

    Attributes:
        name: of the model and the batch, as tables show it.
        model: plain torch.
        image: [N, C, H, W], float32.
        loss: scalar from the model's output.
    """

    name: str
    model: nn.Module
    image: Tensor
    loss: Callable[[Tensor], Tensor]


def segnet_workload(batch: int = 64) -> Workload:
    """SegNet with eleven classes under cross entropy, on random images."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 11, (batch, 28, 28), generator=generator)
    return Workload(
        f"SegNet {batch}x1x28x28",
        SegNet(11),
        torch.rand(batch, 1, 28, 28, generator=generator),
        lambda logits: F.cross_entropy(logits, masks),
    )


def pose_workload(size: int = 256, width: float = 1.0, batch: int = 1) -> Workload:
    """CPM2DPose with 21 joints under squared error, on random images."""
    image = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Workload(
        f"CPM2DPose {batch}x3x{size}x{size}",
        CPM2DPose(width=width),
        image,
        lambda heatmaps: heatmaps.square().sum(),
    )


def variants(workload: Workload) -> dict[str, tuple[nn.Module, Tensor]]:
    """The model and its batch for each implementation; weights are equal, memory is not shared."""
    channels_last = torch.channels_last
    optimized, _ = optimize(copy.deepcopy(workload.model))
    return {
        EAGER: (copy.deepcopy(workload.model), workload.image),
        EAGER_CHANNELS_LAST: (
            copy.deepcopy(workload.model).to(memory_format=channels_last),
            workload.image.to(memory_format=channels_last),
        ),
        OURS: (optimized, workload.image),
    }
