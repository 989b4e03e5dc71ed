# SPDX-License-Identifier: BSD-3-Clause
"""A real photograph with landmarks: astronaut Eileen Collins (NASA, public domain).

One picture does not make a pose estimator. What the demo does with it, and says so: it trains the
pose machine on random similarity warps of this one photograph and looks at warps that were not
trained on. That shows that the model and its kernels learn, and what heatmaps look like; it says
nothing about other people.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..extras import import_extra
from ..pose import Skeleton

PORTRAIT = Skeleton(
    "portrait",
    (
        "head_top",
        "right_eye",
        "left_eye",
        "nose",
        "right_mouth",
        "left_mouth",
        "chin",
        "right_ear",
        "left_ear",
        "neck",
        "right_shoulder",
        "left_shoulder",
        "right_elbow",
        "right_wrist",
    ),
    (
        ("head_top", "right_eye"),
        ("head_top", "left_eye"),
        ("right_eye", "right_ear"),
        ("left_eye", "left_ear"),
        ("right_eye", "nose"),
        ("left_eye", "nose"),
        ("nose", "right_mouth"),
        ("nose", "left_mouth"),
        ("right_mouth", "chin"),
        ("left_mouth", "chin"),
        ("chin", "neck"),
        ("neck", "right_shoulder"),
        ("neck", "left_shoulder"),
        ("right_shoulder", "right_elbow"),
        ("right_elbow", "right_wrist"),
    ),
)
"""Fourteen landmarks that the photograph shows; right and left are the sitter's own."""

# Labelled by hand on the 512x512 photograph, (x, y) in pixels.
_LANDMARKS = (
    (232, 16),
    (203, 101),
    (247, 104),
    (229, 124),
    (203, 141),
    (244, 142),
    (230, 178),
    (178, 124),
    (273, 132),
    (222, 196),
    (85, 262),
    (332, 268),
    (55, 425),
    (125, 488),
)


@dataclass(frozen=True)
class Photograph:
    """Image [1, 3, 512, 512], float32 in [0, 1], and landmarks [1, 14, 2], (x, y) in its pixels."""

    image: Tensor
    landmarks: Tensor

    def warp(
        self,
        size: int,
        *,
        angle: Tensor,  # [N]
        zoom: Tensor,  # [N]
        shift: Tensor,  # [N, 2]
    ) -> tuple[Tensor, Tensor]:
        """N similarity warps: images [N, 3, size, size] and landmarks [N, 14, 2] in their pixels.

        Args:
            size: extent of a warp in pixels.
            angle: rotation in radians, counter-clockwise.
            zoom: magnification; 1 shows the whole photograph.
            shift: (x, y) of the photograph's centre in the warp, as a share of its extent.
        """
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        # From the photograph to the warp, in coordinates from -1 to 1.
        forward = torch.stack(
            (torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), -2
        )  # [N, 2, 2]
        backward = torch.linalg.inv(forward)
        theta = torch.cat((backward, -backward @ (2 * shift)[..., None]), dim=-1)  # [N, 2, 3]
        count = angle.shape[0]
        # Averaging first, so that the warp's pixels do not skip the photograph's.
        source = F.interpolate(self.image, size=(2 * size, 2 * size), mode="area")
        grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
        images = F.grid_sample(
            source.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False
        )
        extent = self.image.shape[-1]
        centred = (2 * self.landmarks + 1) / extent - 1  # [1, 14, 2]
        warped = centred @ forward.mT + (2 * shift)[:, None]
        return images, ((warped + 1) * size - 1) / 2

    def sample(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random warps: 25 degrees, zoom 0.8 to 1.25, shifts of a tenth, contrast, brightness."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        reach = math.radians(25)
        images, landmarks = self.warp(
            size,
            angle=uniform(-reach, reach),
            zoom=uniform(math.log(0.8), math.log(1.25)).exp(),
            shift=uniform(-0.1, 0.1, 2),
        )
        images = (images - 0.5) * uniform(0.8, 1.2, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, 1, 1, 1)
        return images.clamp(0, 1), landmarks


def load_photograph() -> Photograph:
    """The photograph with its landmarks; MissingExtraError if scikit-image is not installed."""
    pixels = torch.from_numpy(import_extra("skimage.data").astronaut())  # [512, 512, 3], uint8
    return Photograph(
        pixels.permute(2, 0, 1)[None].float() / 255, torch.tensor([_LANDMARKS], dtype=torch.float32)
    )


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1] to roughly zero mean and unit variance, for the pose machine."""
    return (images - 0.5) * 4
