# SPDX-License-Identifier: BSD-3-Clause
"""Metrics of segmentation, on cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from segpose_kernels.segmentation import class_iou, confusion_matrix, mean_iou, pixel_accuracy

TRUE = torch.tensor([[[0, 0, 1], [1, 1, 2]]])
PREDICTED = torch.tensor([[[0, 1, 1], [1, 0, 2]]])


def test_confusion_matrix() -> None:
    confusion = confusion_matrix(PREDICTED, TRUE, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_scores() -> None:
    confusion = confusion_matrix(PREDICTED, TRUE, 4)
    iou = class_iou(confusion)
    assert iou[:3].tolist() == pytest.approx([1 / 3, 2 / 4, 1])
    assert iou[3].isnan(), "a class that occurs nowhere has no IoU"
    assert mean_iou(confusion) == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)
    assert pixel_accuracy(confusion) == pytest.approx(4 / 6)


def test_perfect_and_hopeless() -> None:
    assert mean_iou(confusion_matrix(TRUE, TRUE, 3)) == 1
    assert mean_iou(confusion_matrix((TRUE + 1) % 3, TRUE, 3)) == 0


def test_confusion_of_parts_adds_up() -> None:
    true, predicted = torch.randint(0, 11, (2, 6, 28, 28))
    parts = sum(confusion_matrix(predicted[i : i + 2], true[i : i + 2], 11) for i in (0, 2, 4))
    assert torch.equal(torch.as_tensor(parts), confusion_matrix(predicted, true, 11))
    assert confusion_matrix(true[:0], true[:0], 3).sum() == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        confusion_matrix(TRUE, TRUE[0], 3)
    with pytest.raises(ValueError, match=r"true has a class outside \[0, 2\)"):
        confusion_matrix(PREDICTED.clamp(max=1), TRUE, 2)
