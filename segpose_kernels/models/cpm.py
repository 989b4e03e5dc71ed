# SPDX-License-Identifier: BSD-3-Clause
"""CPM2DPose: a convolutional pose machine that answers with one heatmap for each joint.

The design is that of Wei, Ramakrishna, Kanade, Sheikh, "Convolutional Pose Machines" (CVPR 2016),
in the setting of
the lecture: stages 1 to 4 encode the image, stage 5 gives a first scoremap, stages 6 and 7 refine
    it with 7x7
convolutions over the scoremap and the encoding together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 8  # three 2x2 pools: one heatmap cell covers 8x8 pixels


class CPM2DPose(nn.Module):
    """Convolutional pose machine; all convolutions have a bias, leaky ReLU (0.01) between them.

    Args:
        joints: number of joints J, one heatmap each; 21 are those of a hand, 14 those of a body
            (`segpose_kernels.pose`).
        all_stages: `forward` returns the scoremaps of stages 5, 6 and 7 for intermediate
            supervision, as in the paper, instead of the last alone.
        width: multiplies every hidden channel count; 1 is the lecture's model, less is for quick
            experiments.

    Raises:
        ValueError: if `joints` is below 1 or `width` is not above 0.
    """

    def __init__(self, joints: int = 21, all_stages: bool = False, width: float = 1.0) -> None:
        super().__init__()
        if joints < 1:
            raise ValueError(f"joints must be at least 1, got {joints}")
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}")
        self.joints = joints
        self.all_stages = all_stages

        def scaled(channels: int) -> int:
            return max(1, round(channels * width))

        c64, c128, c256, c512 = scaled(64), scaled(128), scaled(256), scaled(512)
        # The lecture holds the activation as a plain function in an attribute.
        self.relu = F.leaky_relu
        self.maxpool = nn.MaxPool2d(kernel_size=2, stride=2)

        self.conv1_1 = nn.Conv2d(3, c64, 3, padding=1)
        self.conv1_2 = nn.Conv2d(c64, c64, 3, padding=1)

        self.conv2_1 = nn.Conv2d(c64, c128, 3, padding=1)
        self.conv2_2 = nn.Conv2d(c128, c128, 3, padding=1)

        self.conv3_1 = nn.Conv2d(c128, c256, 3, padding=1)
        self.conv3_2 = nn.Conv2d(c256, c256, 3, padding=1)
        self.conv3_3 = nn.Conv2d(c256, c256, 3, padding=1)
        self.conv3_4 = nn.Conv2d(c256, c256, 3, padding=1)

        self.conv4_1 = nn.Conv2d(c256, c512, 3, padding=1)
        self.conv4_2 = nn.Conv2d(c512, c512, 3, padding=1)
        self.conv4_3 = nn.Conv2d(c512, c256, 3, padding=1)
        self.conv4_4 = nn.Conv2d(c256, c256, 3, padding=1)
        self.conv4_5 = nn.Conv2d(c256, c256, 3, padding=1)
        self.conv4_6 = nn.Conv2d(c256, c256, 3, padding=1)
        self.conv4_7 = nn.Conv2d(c256, c128, 3, padding=1)

        self.conv5_1 = nn.Conv2d(c128, c512, 1)
        self.conv5_2 = nn.Conv2d(c512, joints, 1)

        self.conv6_1 = nn.Conv2d(joints + c128, c128, 7, padding=3)
        self.conv6_2 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv6_3 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv6_4 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv6_5 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv6_6 = nn.Conv2d(c128, c128, 1)
        self.conv6_7 = nn.Conv2d(c128, joints, 1)

        self.conv7_1 = nn.Conv2d(joints + c128, c128, 7, padding=3)
        self.conv7_2 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv7_3 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv7_4 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv7_5 = nn.Conv2d(c128, c128, 7, padding=3)
        self.conv7_6 = nn.Conv2d(c128, c128, 1)
        self.conv7_7 = nn.Conv2d(c128, joints, 1)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """[N, 3, H, W] -> heatmaps [N, J, H/8, W/8] (floored); three of them with `all_stages`."""
        x = self.relu(self.conv1_1(image))
        x = self.relu(self.conv1_2(x))
        x = self.maxpool(x)

        x = self.relu(self.conv2_1(x))
        x = self.relu(self.conv2_2(x))
        x = self.maxpool(x)

        x = self.relu(self.conv3_1(x))
        x = self.relu(self.conv3_2(x))
        x = self.relu(self.conv3_3(x))
        x = self.relu(self.conv3_4(x))
        x = self.maxpool(x)

        x = self.relu(self.conv4_1(x))
        x = self.relu(self.conv4_2(x))
        x = self.relu(self.conv4_3(x))
        x = self.relu(self.conv4_4(x))
        x = self.relu(self.conv4_5(x))
        x = self.relu(self.conv4_6(x))
        encoding = self.relu(self.conv4_7(x))  # [N, 128, H/8, W/8]

        x = self.relu(self.conv5_1(encoding))
        scoremap5 = self.conv5_2(x)

        x = torch.cat((scoremap5, encoding), dim=1)  # [N, J + 128, H/8, W/8]
        x = self.relu(self.conv6_1(x))
        x = self.relu(self.conv6_2(x))
        x = self.relu(self.conv6_3(x))
        x = self.relu(self.conv6_4(x))
        x = self.relu(self.conv6_5(x))
        x = self.relu(self.conv6_6(x))
        scoremap6 = self.conv6_7(x)

        x = torch.cat((scoremap6, encoding), dim=1)
        x = self.relu(self.conv7_1(x))
        x = self.relu(self.conv7_2(x))
        x = self.relu(self.conv7_3(x))
        x = self.relu(self.conv7_4(x))
        x = self.relu(self.conv7_5(x))
        x = self.relu(self.conv7_6(x))
        scoremap7: Tensor = self.conv7_7(x)

        if self.all_stages:
            return scoremap5, scoremap6, scoremap7
        return scoremap7
