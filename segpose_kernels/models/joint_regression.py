# SPDX-License-Identifier: BSD-3-Clause
"""Pose by regression: a vector of 4096 features mapped to the coordinates of every joint."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

FEATURES = 4096
IMAGE_SIZE = 128


class JointRegression(nn.Module):
    """The lecture's first answer to pose: a trunk, 4096 features, a linear head to all (x, y).

    The trunk halves a 128x128 image five times to 256 channels of 4x4, which are the 4096 features.
    The coordinates are fractions of the image's width and height, so that a loss does not depend on
    resolution. Heatmaps (`CPM2DPose`) are the second answer; `segpose_kernels.training` trains both
    on the same data.

    Args:
        joints: number of joints; 14 is the body of `segpose_kernels.pose.BODY_14`, whose head is
            4096 -> 28.

    Raises:
        ValueError: if `joints` is below 1.
        RuntimeError: from the head, for an image that is not 128x128.
    """

    def __init__(self, joints: int = 14) -> None:
        super().__init__()
        if joints < 1:
            raise ValueError(f"joints must be at least 1, got {joints}")
        self.joints = joints
        widths = (3, 16, 32, 64, 128, 256)
        layers: list[nn.Module] = []
        for in_channels, out_channels in pairwise(widths):
            layers += [
                nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
                nn.LeakyReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, 2 * joints)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, 128, 128] -> joints [N, J, 2] as (x, y), fractions of width and height."""
        features = self.trunk(image).flatten(1)  # [N, 4096]
        joints: Tensor = self.head(features).unflatten(1, (self.joints, 2))
        return joints
