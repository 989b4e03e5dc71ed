# SPDX-License-Identifier: BSD-3-Clause
"""Named convolution problems, as data shared by the tests and the benchmarks.

Three kinds: the layers of the models this package ships, transposed convolutions that well-known
networks use, and small geometries that each have an edge of their own (odd extents, a stride over
the kernel, a phase without a tap, depthwise, an empty batch, ...).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from .spec import LAYOUTS, ConvSpec, ConvTensors, Pair, as_layout

__all__ = [
    "AUTOENCODER",
    "CPM2DPOSE",
    "GEOMETRIES",
    "KERNEL_PROBLEMS",
    "LAYOUTS",
    "SEGNET",
    "TRANSPOSED",
    "ConvSpec",
    "ConvTensors",
    "as_layout",
    "by_name",
]


def _conv(
    name: str, n: int, c_in: int, c_out: int, h: int, w: int, kernel: Pair, **attributes: Any
) -> ConvSpec:
    return ConvSpec(name, "conv2d", n, c_in, c_out, h, w, kernel, **attributes)


def _conv_t(
    name: str, n: int, c_in: int, c_out: int, h: int, w: int, kernel: Pair, **attributes: Any
) -> ConvSpec:
    return ConvSpec(name, "conv_transpose2d", n, c_in, c_out, h, w, kernel, **attributes)


_HALVE: dict[str, Any] = {"stride": (2, 2), "padding": (1, 1), "activation": "relu"}
_DOUBLE: dict[str, Any] = _HALVE | {"output_padding": (1, 1)}


def _autoencoder(model: str, channels: int, batch: int) -> tuple[ConvSpec, ...]:
    return (
        _conv(f"{model}-encoder1", batch, 1, 16, 28, 28, (3, 3), **_HALVE),
        _conv(f"{model}-encoder2", batch, 16, 32, 14, 14, (3, 3), **_HALVE),
        _conv(f"{model}-encoder3", batch, 32, 64, 7, 7, (7, 7), activation="none"),
        _conv_t(f"{model}-decoder1", batch, 64, 32, 1, 1, (7, 7), activation="relu"),
        _conv_t(f"{model}-decoder2", batch, 32, 16, 7, 7, (3, 3), **_DOUBLE),
        _conv_t(f"{model}-decoder3", batch, 16, channels, 14, 14, (3, 3), **_DOUBLE),
    )


AUTOENCODER = _autoencoder("autoencoder", channels=1, batch=64)
SEGNET = _autoencoder("segnet", channels=10, batch=64)


def _cpm2dpose(size: int = 256, batch: int = 1) -> tuple[ConvSpec, ...]:
    """Layers of CPM2DPose on a square image; the two scoremaps have no activation."""
    layers: list[ConvSpec] = []
    trunk = (
        ("conv1", size, (3, 64, 64)),
        ("conv2", size // 2, (64, 128, 128)),
        ("conv3", size // 4, (128, 256, 256, 256, 256)),
        ("conv4", size // 8, (256, 512, 512, 256, 256, 256, 256, 128)),
    )
    for block, extent, widths in trunk:
        for i, (c_in, c_out) in enumerate(pairwise(widths), start=1):
            layers.append(
                _conv(
                    f"cpm-{block}_{i}", batch, c_in, c_out, extent, extent, (3, 3), padding=(1, 1)
                )
            )
    maps = size // 8
    layers.append(_conv("cpm-conv5_1", batch, 128, 512, maps, maps, (1, 1)))
    layers.append(_conv("cpm-conv5_2", batch, 512, 21, maps, maps, (1, 1), activation="none"))
    for stage in ("conv6", "conv7"):
        for i, c_in in enumerate((149, 128, 128, 128, 128), start=1):
            layers.append(
                _conv(f"cpm-{stage}_{i}", batch, c_in, 128, maps, maps, (7, 7), padding=(3, 3))
            )
        layers.append(_conv(f"cpm-{stage}_6", batch, 128, 128, maps, maps, (1, 1)))
        layers.append(
            _conv(f"cpm-{stage}_7", batch, 128, 21, maps, maps, (1, 1), activation="none")
        )
    return tuple(layers)


CPM2DPOSE = _cpm2dpose()

# Transposed convolution + ReLU as in well-known networks: name, (N, C_in, C_out, H, W), kernel,
# stride, padding, op.
_TRANSPOSED_ROWS: tuple[tuple[str, tuple[int, int, int, int, int], int, int, int, int], ...] = (
    ("segnet-1", (64, 64, 32, 1, 1), 7, 1, 0, 0),
    ("segnet-2", (64, 32, 16, 7, 7), 3, 2, 1, 1),
    ("segnet-3", (64, 16, 10, 14, 14), 3, 2, 1, 1),
    ("mask-rcnn-head", (8, 256, 256, 14, 14), 2, 2, 0, 0),
    ("keypoint-rcnn", (8, 512, 17, 14, 14), 4, 2, 1, 0),
    ("simple-baseline-1", (1, 2048, 256, 8, 6), 4, 2, 1, 0),
    ("simple-baseline-3", (1, 256, 256, 32, 24), 4, 2, 1, 0),
    ("dcgan-1", (16, 100, 512, 1, 1), 4, 1, 0, 0),
    ("dcgan-2", (16, 512, 256, 4, 4), 4, 2, 1, 0),
    ("dcgan-4", (16, 128, 64, 16, 16), 4, 2, 1, 0),
    ("unet-up", (4, 128, 64, 128, 128), 2, 2, 0, 0),
    ("unet-bottom", (1, 1024, 512, 16, 16), 2, 2, 0, 0),
    ("fcn-x8", (1, 21, 21, 32, 32), 16, 8, 4, 0),
)
TRANSPOSED = tuple(
    _conv_t(
        f"transposed-{name}",
        *extents,
        (k, k),
        stride=(s, s),
        padding=(p, p),
        output_padding=(op, op),
        activation="relu",
    )
    for name, extents, k, s, p, op in _TRANSPOSED_ROWS
)

# Kernel and stride; 2/3 has a stride over its kernel, so some phases of the transposed form have no
# tap.
_KERNEL_STRIDE = ((1, 1), (2, 2), (3, 1), (3, 2), (4, 2), (5, 2), (7, 1), (2, 3))


def _kernel_stride_grid() -> tuple[ConvSpec, ...]:
    """Each kernel and stride in both operators, and with a kernel (k, k + 1)."""
    specs = []
    for k, s in _KERNEL_STRIDE:
        attributes: dict[str, Any] = {"stride": (s, s), "padding": (k // 2, k // 3)}
        specs.append(_conv(f"conv-k{k}s{s}", 2, 5, 7, 11, 8, (k, k), **attributes))
        specs.append(_conv_t(f"transposed-k{k}s{s}", 2, 5, 7, 6, 4, (k, k), **attributes))
        if k > 1:
            specs.append(
                _conv(
                    f"conv-k{k}x{k + 1}s{s}x1",
                    1,
                    4,
                    6,
                    9,
                    13,
                    (k, k + 1),
                    stride=(s, 1),
                    activation="relu",
                )
            )
            specs.append(
                _conv_t(
                    f"transposed-k{k}x{k + 1}s1x{s}",
                    1,
                    4,
                    6,
                    5,
                    7,
                    (k, k + 1),
                    stride=(1, s),
                    activation="relu",
                )
            )
    return tuple(specs)


GEOMETRIES: tuple[ConvSpec, ...] = (
    *_kernel_stride_grid(),
    # Dilation together with stride: the phases are residue classes of tap * dilation, here with gcd
    # 2, 1, 1 and 3.
    _conv("conv-d2s2", 2, 3, 5, 12, 9, (3, 3), stride=(2, 2), padding=(2, 1), dilation=(2, 2)),
    _conv("conv-d2s3", 2, 3, 5, 12, 11, (3, 2), stride=(3, 3), padding=(1, 2), dilation=(2, 2)),
    _conv("conv-d3x1s1x2", 1, 6, 4, 10, 9, (3, 4), stride=(1, 2), padding=(3, 0), dilation=(3, 1)),
    _conv_t(
        "transposed-d2s2", 2, 3, 5, 5, 4, (3, 3), stride=(2, 2), padding=(2, 1), dilation=(2, 2)
    ),
    _conv_t(
        "transposed-d2s3", 2, 3, 5, 5, 4, (3, 2), stride=(3, 3), padding=(1, 2), dilation=(2, 2)
    ),
    _conv_t(
        "transposed-d3s3", 1, 3, 5, 4, 3, (3, 2), stride=(3, 3), padding=(1, 0), dilation=(3, 3)
    ),
    # output_padding up to the larger of stride and dilation, minus one, is legal.
    _conv_t(
        "transposed-op2s2d3",
        1,
        4,
        3,
        5,
        4,
        (3, 3),
        stride=(2, 2),
        output_padding=(2, 1),
        dilation=(3, 2),
    ),
    _conv_t(
        "transposed-op3s1d4",
        1,
        4,
        3,
        4,
        5,
        (2, 3),
        stride=(1, 2),
        output_padding=(3, 3),
        dilation=(4, 4),
    ),
    _conv_t(
        "transposed-op1s2",
        3,
        4,
        3,
        4,
        5,
        (3, 3),
        stride=(2, 2),
        padding=(1, 1),
        output_padding=(1, 0),
    ),
    # Groups: two, and depthwise with one and two outputs for each channel.
    _conv("conv-groups2", 2, 6, 10, 7, 9, (3, 3), padding=(1, 1), groups=2),
    _conv("conv-depthwise", 2, 10, 10, 8, 7, (3, 3), padding=(1, 1), groups=10, activation="relu"),
    _conv("conv-depthwise-x2-s2", 1, 5, 10, 9, 8, (3, 5), stride=(2, 2), padding=(1, 2), groups=5),
    _conv_t("transposed-groups2", 2, 6, 10, 4, 5, (4, 4), stride=(2, 2), padding=(1, 1), groups=2),
    _conv_t(
        "transposed-depthwise", 2, 10, 10, 4, 5, (4, 4), stride=(2, 2), padding=(1, 1), groups=10
    ),
    _conv_t(
        "transposed-depthwise-x2",
        1,
        5,
        10,
        4,
        3,
        (3, 3),
        stride=(2, 2),
        output_padding=(1, 1),
        groups=5,
    ),
    # Channel counts that fill no vector register, one that just exceeds a few of them.
    _conv("conv-c1-c1", 3, 1, 1, 7, 5, (3, 3), padding=(1, 1)),
    _conv("conv-c3-c10", 1, 3, 10, 9, 7, (3, 3), padding=(1, 1)),
    _conv("conv-c21-c149", 1, 21, 149, 6, 5, (3, 3), padding=(1, 1)),
    _conv("conv-c149-c21-k7", 1, 149, 21, 5, 6, (7, 7), padding=(3, 3)),
    _conv_t("transposed-c1-c1", 3, 1, 1, 5, 4, (3, 3), stride=(2, 2)),
    _conv_t("transposed-c10-c3", 1, 10, 3, 5, 4, (4, 4), stride=(2, 2), padding=(1, 1)),
    _conv_t("transposed-c149-c21", 1, 149, 21, 3, 4, (3, 3), stride=(2, 2), padding=(1, 1)),
    _conv_t("transposed-c21-c149", 1, 21, 149, 4, 3, (2, 2), stride=(2, 2)),
    # One pixel in, one pixel out, padding wider than the kernel (outputs that no tap reaches), one
    # long row.
    _conv("conv-1pixel", 2, 5, 6, 1, 1, (1, 1)),
    _conv("conv-1pixel-k3p1", 1, 5, 6, 1, 1, (3, 3), padding=(1, 1)),
    _conv("conv-to-1pixel", 2, 4, 6, 5, 3, (5, 3)),
    _conv("conv-padding-over-kernel", 1, 3, 4, 3, 4, (2, 1), padding=(4, 3)),
    _conv(
        "conv-padding-over-kernel-s3",
        1,
        3,
        4,
        3,
        4,
        (1, 2),
        stride=(3, 2),
        padding=(5, 4),
        activation="none",
    ),
    _conv("conv-one-row", 1, 6, 6, 1, 67, (1, 5), padding=(0, 2)),
    _conv_t("transposed-1pixel", 2, 5, 6, 1, 1, (1, 1)),
    _conv_t("transposed-1pixel-k5s3", 1, 5, 6, 1, 1, (5, 4), stride=(3, 3), padding=(1, 0)),
    _conv_t("transposed-to-1pixel", 1, 3, 4, 3, 2, (3, 2), padding=(2, 1)),
    _conv_t(
        "transposed-padding-over-kernel", 1, 3, 4, 9, 8, (2, 1), padding=(4, 3), activation="none"
    ),
    _conv_t(
        "transposed-padding-over-kernel-s2", 1, 3, 4, 7, 8, (2, 3), stride=(2, 2), padding=(4, 5)
    ),
    _conv_t("transposed-one-column", 1, 6, 6, 33, 1, (4, 1), stride=(2, 1), padding=(1, 0)),
    # Several images of a map smaller than the kernel: a block of pixels spans images, and with
    # batch = stride its first and last pixel lie as far apart as in one unbroken line.
    _conv("conv-batch5-s5", 5, 2, 3, 2, 21, (4, 7), stride=(1, 5), padding=(1, 0)),
    _conv("conv-batch17-2pixels", 17, 3, 5, 2, 2, (3, 3), padding=(1, 1)),
    _conv_t("transposed-batch5-s5", 5, 3, 2, 2, 4, (4, 7), stride=(1, 5), padding=(1, 0)),
    _conv_t("transposed-batch16-k7", 16, 5, 4, 1, 1, (7, 7), padding=(2, 2)),
    _conv_t("transposed-batch5-s2", 5, 4, 3, 2, 3, (5, 5), stride=(2, 2), padding=(2, 1)),
    # Large enough for Winograd tiles to pay, none a multiple of a tile, in each pass that has them.
    _conv("conv-tiles-k3", 1, 19, 37, 25, 22, (3, 3), padding=(1, 1)),
    _conv("conv-tiles-k3-p0x2", 2, 24, 21, 26, 19, (3, 3), padding=(0, 2), activation="relu"),
    _conv("conv-tiles-groups2", 1, 36, 40, 25, 26, (3, 3), padding=(1, 0), groups=2),
    _conv("conv-tiles-k2", 2, 50, 49, 24, 25, (2, 2), padding=(1, 0), activation="none"),
    _conv("conv-tiles-k6s2", 2, 20, 24, 31, 30, (6, 6), stride=(2, 2), padding=(2, 1)),
    _conv_t("transposed-tiles-k3", 1, 19, 37, 25, 22, (3, 3), padding=(1, 0)),
    _conv_t("transposed-tiles-k4s2", 2, 33, 35, 23, 22, (4, 4), stride=(2, 2), padding=(1, 1)),
    _conv_t("transposed-tiles-k6s2", 1, 16, 21, 24, 23, (6, 6), stride=(2, 2), padding=(2, 1)),
    # Remaining edges of the definition.
    _conv("conv-no-bias", 2, 4, 6, 6, 7, (3, 3), bias=False),
    _conv("conv-no-activation", 2, 4, 6, 6, 7, (3, 3), activation="none"),
    _conv("conv-steep-slope", 2, 4, 6, 6, 7, (3, 3), slope=1.7),
    _conv_t(
        "transposed-no-bias", 2, 4, 6, 4, 3, (3, 3), stride=(2, 2), bias=False, activation="none"
    ),
    _conv("conv-empty-batch", 0, 4, 6, 6, 7, (3, 3), padding=(1, 1)),
    _conv_t("transposed-empty-batch", 0, 4, 6, 4, 3, (3, 3), stride=(2, 2), output_padding=(1, 1)),
)


def _distinct_reduced() -> tuple[ConvSpec, ...]:
    """Reduced forms of the models' and networks' layers, each geometry once."""
    kept: dict[ConvSpec, ConvSpec] = {}
    for spec in (*AUTOENCODER, *SEGNET, *CPM2DPOSE, *TRANSPOSED):
        small = spec.reduced()
        kept.setdefault(replace(small, name=""), small)
    return tuple(kept.values())


KERNEL_PROBLEMS: tuple[ConvSpec, ...] = (*GEOMETRIES, *_distinct_reduced())


def by_name(name: str) -> ConvSpec:
    """The problem called `name`; KeyError lists the names that begin alike."""
    table = {s.name: s for s in (*KERNEL_PROBLEMS, *AUTOENCODER, *SEGNET, *CPM2DPOSE, *TRANSPOSED)}
    if name not in table:
        alike = sorted(known for known in table if known.split("-")[0] == name.split("-")[0])
        raise KeyError(f"no problem called {name!r}; did you mean one of {alike or sorted(table)}?")
    return table[name]
