# SPDX-License-Identifier: BSD-3-Clause
"""More transposed convolutions of published networks, beyond the table in `problems`.

U-Net (Ronneberger 2015), DCGAN (Radford 2016), pix2pix (Isola 2017), SimpleBaseline (Xiao 2018),
FCN (Long 2015): layers whose sizes differ enough from one another to be worth a measurement.
"""

from __future__ import annotations

from .spec import Activation, ConvSpec

__all__ = ["NETWORKS"]

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
