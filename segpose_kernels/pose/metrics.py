# SPDX-License-Identifier: BSD-3-Clause
"""How far predicted joints are from the true ones. All coordinates are (x, y) in image pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def _distances(predicted: Tensor, true: Tensor) -> Tensor:
    """Euclidean distances [N, J] between [N, J, 2] and [N, J, 2]."""
    if predicted.shape != true.shape or predicted.shape[-1:] != (2,) or predicted.dim() != 3:
        raise ValueError(
            "predicted and true must both be [N, J, 2], got "
            f"{list(predicted.shape)} and {list(true.shape)}"
        )
    distances: Tensor = torch.linalg.vector_norm(predicted - true, dim=-1)
    return distances


def mean_joint_error(predicted: Tensor, true: Tensor, visible: Tensor | None = None) -> float:
    """Mean distance in pixels over the visible joints; NaN if none is visible.

    Args:
        predicted, true: [N, J, 2].
        visible: [N, J], bool; all joints if None.

    Raises:
        ValueError: for shapes that differ or are not [N, J, 2].
    """
    distances = _distances(predicted, true)
    if visible is not None:
        distances = distances[visible]
    return distances.mean().item()


def percentage_correct_per_joint(
    predicted: Tensor,
    true: Tensor,
    reference_length: Tensor | float,
    threshold: float = 0.2,
    visible: Tensor | None = None,
) -> Tensor:
    """PCK for each joint, [J], as shares between 0 and 1; NaN for a joint that is never visible.

    A joint is correct if it is at most `threshold * reference_length` from the truth (Yang and
    Ramanan, "Articulated Human Detection with Flexible Mixtures of Parts", 2013). With the head's
    length as reference and a threshold of 0.5 this is PCKh.

    Args:
        predicted, true: [N, J, 2].
        reference_length: pixels, one number or one for each image [N].
        threshold: share of the reference length.
        visible: [N, J], bool; all joints if None.

    Raises:
        ValueError: for shapes that differ or are not [N, J, 2].
    """
    distances = _distances(predicted, true)
    if visible is None:
        visible = torch.ones_like(distances, dtype=torch.bool)
    limit = threshold * torch.as_tensor(reference_length, dtype=distances.dtype).reshape(-1, 1)
    correct = (distances <= limit) & visible
    return correct.sum(dim=0) / visible.sum(dim=0)


def percentage_correct(
    predicted: Tensor,
    true: Tensor,
    reference_length: Tensor | float,
    threshold: float = 0.2,
    visible: Tensor | None = None,
) -> float:
    """Mean of `percentage_correct_per_joint` over the joints that are visible at least once."""
    shares = percentage_correct_per_joint(predicted, true, reference_length, threshold, visible)
    return shares.nanmean().item()
