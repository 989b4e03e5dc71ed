# SPDX-License-Identifier: BSD-3-Clause
"""Layers of published networks, beyond the tables in `problems`.

Transposed convolutions of U-Net (Ronneberger 2015), DCGAN (Radford 2016), pix2pix (Isola 2017),
SimpleBaseline (Xiao 2018) and FCN (Long 2015): those whose sizes differ enough from one another to
be worth a measurement. Convolutions in groups of ResNeXt (Xie 2017) and RegNet (Radosavovic 2020),
depthwise ones of MobileNetV2 (Sandler 2018), EfficientNet (Tan 2019) and ConvNeXt (Liu 2022).
"""

from __future__ import annotations

from .spec import Activation, ConvSpec

__all__ = ["GROUPED", "NETWORKS"]

# name, (N, C_in, C_out, H, W), kernel, stride, padding, activation
_ROWS: tuple[tuple[str, tuple[int, int, int, int, int], int, int, int, Activation], ...] = (
    ("unet-2", (1, 512, 256, 32, 32), 2, 2, 0, "none"),
    ("unet-3", (1, 256, 128, 64, 64), 2, 2, 0, "none"),
    ("unet-4", (1, 128, 64, 128, 128), 2, 2, 0, "none"),
    ("dcgan-3", (16, 256, 128, 8, 8), 4, 2, 1, "relu"),
    ("dcgan-5", (16, 64, 3, 32, 32), 4, 2, 1, "none"),
    ("pix2pix-1", (1, 512, 512, 1, 1), 4, 2, 1, "relu"),
    ("pix2pix-2", (1, 1024, 512, 2, 2), 4, 2, 1, "relu"),
    ("pix2pix-4", (1, 1024, 512, 8, 8), 4, 2, 1, "relu"),
    ("pix2pix-6", (1, 512, 128, 32, 32), 4, 2, 1, "relu"),
    ("pix2pix-8", (1, 128, 3, 128, 128), 4, 2, 1, "none"),
    ("simple-baseline-2", (1, 256, 256, 16, 12), 4, 2, 1, "relu"),
    ("fcn-x2", (1, 21, 21, 16, 16), 4, 2, 1, "none"),
    ("fcn-x32", (1, 21, 21, 8, 8), 64, 32, 16, "none"),
)

NETWORKS = tuple(
    ConvSpec(
        name,
        "conv_transpose2d",
        *extents,
        (k, k),
        stride=(s, s),
        padding=(p, p),
        activation=activation,
    )
    for name, extents, k, s, p, activation in _ROWS
)

# name, (channels, H and W), groups, kernel, stride, activation
_GROUPED_ROWS: tuple[tuple[str, tuple[int, int], int, int, int, Activation], ...] = (
    ("resnext50-2", (128, 56), 32, 3, 1, "relu"),
    ("resnext50-3-first", (256, 56), 32, 3, 2, "relu"),
    ("resnext50-3", (256, 28), 32, 3, 1, "relu"),
    ("resnext50-4", (512, 14), 32, 3, 1, "relu"),
    ("regnety-400mf-3", (208, 14), 26, 3, 1, "relu"),
    ("mobilenetv2-3", (144, 56), 144, 3, 1, "relu"),
    ("mobilenetv2-4-first", (144, 56), 144, 3, 2, "relu"),
    ("efficientnet-b0-4", (240, 28), 240, 5, 1, "none"),
    ("convnext-tiny-1", (96, 56), 96, 7, 1, "none"),
)

GROUPED = tuple(
    ConvSpec(
        name,
        "conv2d",
        1,
        channels,
        channels,
        size,
        size,
        (k, k),
        stride=(s, s),
        padding=(k // 2, k // 2),
        groups=groups,
        activation=activation,
    )
    for name, (channels, size), groups, k, s, activation in _GROUPED_ROWS
)
