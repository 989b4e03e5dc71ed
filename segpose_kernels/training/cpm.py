# SPDX-License-Identifier: BSD-3-Clause
"""Training for pose: heatmaps with the pose machine, coordinates with joint regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pose import heatmaps_to_joints, joints_to_heatmaps
from .loop import History, fit

PoseBatch = tuple[Tensor, Tensor]
"""Images [N, 3, H, W] and joints [N, J, 2], (x, y) in pixels."""

_SCOREMAP_LAYERS = ("conv5_2", "conv6_7", "conv7_7")
_SCOREMAP_SCALE = 0.3


@dataclass(frozen=True)
class PoseRecipe:
    """How to train for pose.

    Attributes:
        steps: optimizer steps (Adam).
        batch_size: images a step.
        learning_rate: peak of the one-cycle schedule.
        sigma: standard deviation of target Gaussians in heatmap cells (heatmaps only).
        evaluate_every: steps between evaluations.
        seed: for the batches.
    """

    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 5e-4
    sigma: float = 1.0
    evaluate_every: int = 50
    seed: int = 0


def initialise(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Kaiming-normal weights for leaky ReLU and zero biases for every convolution, in place.

    torch's default keeps about a sixth of a signal's variance a layer. After the 15 layers to the
    encoding of a pose machine nothing but biases is left, and training starts with a long plateau;
    with this the variance is kept. The layers that give a pose machine's scoremaps are scaled down,
    so that the first heatmaps are nearer to the targets, which are almost everywhere zero.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(
                module.weight, a=0.01, nonlinearity="leaky_relu", generator=generator
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name in _SCOREMAP_LAYERS:
                with torch.no_grad():
                    module.weight.mul_(_SCOREMAP_SCALE)
    return model


def heatmap_loss(predicted: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Squared error, summed over joints, cells and stages (all supervised), mean over images.

    Args:
        predicted: heatmaps [N, J, H/8, W/8], or one such for each stage.
        target: [N, J, H/8, W/8].
    """
    stages = predicted if isinstance(predicted, tuple) else (predicted,)
    errors = [(stage - target).square().sum(dim=(1, 2, 3)).mean() for stage in stages]
    return torch.stack(errors).sum()


def train_pose_machine(
    model: nn.Module,
    sample: Callable[[int, torch.Generator], PoseBatch],
    recipe: PoseRecipe | None = None,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool = False,
) -> History:
    """Train on heatmaps; `sample(batch_size, generator)` draws a batch."""
    recipe = recipe or PoseRecipe()

    def loss_of(model: nn.Module, batch: PoseBatch) -> Tensor:
        images, joints = batch
        target = joints_to_heatmaps(joints, (images.shape[2], images.shape[3]), sigma=recipe.sigma)
        return heatmap_loss(model(images), target)

    return _train(model, sample, loss_of, recipe, evaluate, progress, "pose machine")


def train_joint_regression(
    model: nn.Module,
    sample: Callable[[int, torch.Generator], PoseBatch],
    recipe: PoseRecipe | None = None,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool = False,
) -> History:
    """Train on coordinates with a smooth L1 loss, which a few far-off joints do not dominate."""
    recipe = recipe or PoseRecipe()

    def loss_of(model: nn.Module, batch: PoseBatch) -> Tensor:
        images, joints = batch
        return F.smooth_l1_loss(model(images), joints / _extent(images), beta=0.02)

    return _train(model, sample, loss_of, recipe, evaluate, progress, "joint regression")


def predict_joints(model: nn.Module, images: Tensor) -> Tensor:
    """Joints [N, J, 2] in pixels, from a model that answers with heatmaps or with coordinates."""
    answer = model(images)
    if isinstance(answer, tuple):
        answer = answer[-1]
    if answer.dim() == 4:
        return heatmaps_to_joints(answer)[0]
    joints: Tensor = answer * _extent(images)
    return joints


def _extent(images: Tensor) -> Tensor:
    """(W, H) of images [N, 3, H, W]."""
    return torch.tensor(
        [images.shape[3], images.shape[2]], dtype=images.dtype, device=images.device
    )


def _train(
    model: nn.Module,
    sample: Callable[[int, torch.Generator], PoseBatch],
    loss_of: Callable[[nn.Module, PoseBatch], Tensor],
    recipe: PoseRecipe,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    progress: bool,
    title: str,
) -> History:
    generator = torch.Generator().manual_seed(recipe.seed)

    def batches() -> Iterator[PoseBatch]:
        while True:
            yield sample(recipe.batch_size, generator)

    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.2
    )
    return fit(
        model,
        batches(),
        loss_of,
        optimizer,
        steps=recipe.steps,
        scheduler=scheduler,
        evaluate=evaluate,
        evaluate_every=recipe.evaluate_every,
        progress=progress,
        title=title,
    )
