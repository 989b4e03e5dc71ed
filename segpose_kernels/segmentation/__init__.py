# SPDX-License-Identifier: BSD-3-Clause
"""Semantic segmentation: metrics over a class for each pixel."""

from __future__ import annotations

from .metrics import class_iou, confusion_matrix, mean_iou, pixel_accuracy

__all__ = ["class_iou", "confusion_matrix", "mean_iou", "pixel_accuracy"]
