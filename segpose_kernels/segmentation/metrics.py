# SPDX-License-Identifier: BSD-3-Clause
"""Metrics of semantic segmentation, read off a confusion matrix, which batches may be summed to."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, true: Tensor, num_classes: int) -> Tensor:
    """Counts of pixels, [C, C], int64: rows are the true class, columns the predicted one.

    Args:
        predicted, true: integer tensors of one shape, values in [0, num_classes).
        num_classes: C.

    Raises:
        ValueError: for shapes that differ, or a class out of range.
    """
    if predicted.shape != true.shape:
        raise ValueError(
            "predicted and true must have one shape, got "
            f"{list(predicted.shape)} and {list(true.shape)}"
        )
    for name, classes in (("predicted", predicted), ("true", true)):
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"{name} has a class outside [0, {num_classes})")
    pairs = true.flatten().long() * num_classes + predicted.flatten().long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, [C], float64; NaN for a class that occurs nowhere."""
    counts = confusion.double()
    intersection = counts.diagonal()
    return intersection / (counts.sum(dim=0) + counts.sum(dim=1) - intersection)


def mean_iou(confusion: Tensor) -> float:
    """Mean of `class_iou` over the classes that occur."""
    return class_iou(confusion).nanmean().item()


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of pixels whose class is right; NaN for no pixels."""
    counts = confusion.double()
    return (counts.diagonal().sum() / counts.sum()).item()
