# SPDX-License-Identifier: BSD-3-Clause
"""The 2-D convolutions and transposed convolutions of KernelBench, with the times they published.

KernelBench (Ouyang et al., "KernelBench: Can LLMs Write Efficient GPU Kernels?", 2025;
github.com/ScalingIntelligence/KernelBench) is a set of torch modules to be made faster on GPU. Of
level 1 all problems that are one 2-D convolution are here; of level 2 the convolution, with the
activation where it follows directly, of four problems that do more besides.

The times are theirs, read in their repository and not measured by this package: results/timing/
H100_modal at commit 509ed99 for level 1; torch 2.5.0 with CUDA 12.4, float32 with TF32 in
convolutions, means of 100 runs in milliseconds. A few of their rows name an H200 as the hardware;
they are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .spec import ConvSpec, Pair

__all__ = ["KERNELBENCH", "PUBLISHED_H100", "Published", "for_cpu"]


@dataclass(frozen=True)
class Published:
    """Milliseconds on an H100 that others published for a whole problem; None where there is none.

    `whole` says what the problem computes, where that is more than the convolution.
    """

    eager: float | None
    inductor: float | None
    whole: str = ""


Extents = tuple[int, int, int, int, int]
"""N, C_in, C_out, H, W."""

# What level 1 has unless a problem says otherwise.
_PLAIN: dict[str, Any] = {"activation": "none", "bias": False}


def _conv(number: str, extents: Extents, kernel: Pair, **attributes: Any) -> ConvSpec:
    options = _PLAIN | attributes
    return ConvSpec(f"kernelbench-{number}", "conv2d", *extents, kernel, **options)


def _conv_t(number: str, extents: Extents, kernel: Pair, **attributes: Any) -> ConvSpec:
    options = _PLAIN | attributes
    return ConvSpec(f"kernelbench-{number}", "conv_transpose2d", *extents, kernel, **options)


_TABLE: tuple[tuple[ConvSpec, Published], ...] = (
    (
        _conv("1-50", (256, 3, 96, 224, 224), (11, 11), stride=(4, 4), padding=(2, 2), bias=True),
        Published(None, 1.66),
    ),
    (_conv("1-55", (8, 64, 128, 512, 1024), (3, 3)), Published(4.18, 4.63)),
    (_conv("1-56", (8, 64, 128, 512, 256), (5, 7)), Published(3.44, 3.68)),
    (_conv_t("1-57", (8, 64, 64, 1024, 1024), (3, 3)), Published(6.56, 6.56)),
    (_conv("1-62", (8, 32, 64, 512, 512), (5, 9)), Published(3.64, 2.68)),
    (_conv("1-63", (16, 16, 128, 1024, 1024), (3, 3)), Published(7.05, 13.9)),
    (_conv_t("1-65", (8, 64, 64, 512, 512), (3, 7)), Published(2.71, 2.72)),
    (_conv_t("1-69", (64, 64, 128, 128, 256), (3, 5)), Published(2.75, 2.74)),
    (_conv_t("1-71", (8, 32, 32, 512, 1024), (3, 3)), Published(1.59, 1.59)),
    (
        _conv_t(
            "1-75",
            (16, 32, 64, 128, 256),
            (3, 5),
            stride=(2, 3),
            padding=(1, 2),
            dilation=(2, 1),
            groups=4,
        ),
        Published(6.68, 6.60),
    ),
    (_conv_t("1-78", (8, 32, 32, 512, 1024), (3, 7), padding=(1, 3)), Published(2.42, 2.37)),
    (
        _conv("1-80", (8, 32, 64, 512, 512), (5, 9), padding=(2, 4), dilation=(2, 3)),
        Published(3.53, 2.65),
    ),
    (
        _conv_t(
            "1-81",
            (16, 32, 64, 64, 128),
            (3, 3),
            stride=(5, 5),
            padding=(1, 1),
            dilation=(2, 2),
        ),
        Published(1.81, None),
    ),
    (_conv("1-82", (16, 64, 64, 512, 512), (3, 3), groups=64), Published(2.54, 2.57)),
    (_conv("1-83", (64, 8, 8, 512, 512), (3, 1), groups=8), Published(1.47, None)),
    (_conv("1-84", (64, 128, 128, 256, 512), (3, 3), groups=128), Published(10.1, 9.79)),
    (_conv("1-85", (32, 128, 128, 128, 256), (3, 7), groups=128), Published(2.31, 13.9)),
    (_conv("1-87", (16, 64, 128, 1024, 1024), (1, 1)), Published(4.67, None)),
    (
        _conv("2-1", (128, 64, 128, 128, 128), (3, 3), bias=True, activation="relu"),
        Published(None, None, "convolution, ReLU, addition of a bias"),
    ),
    (
        _conv_t(
            "2-2",
            (128, 64, 64, 128, 128),
            (3, 3),
            stride=(2, 2),
            padding=(1, 1),
            output_padding=(1, 1),
            bias=True,
            activation="relu",
        ),
        Published(12.7, 3.44, "transposed convolution, bias, clamp, scale, clamp, division"),
    ),
    (
        _conv_t(
            "2-5",
            (32, 64, 64, 256, 256),
            (4, 4),
            stride=(2, 2),
            padding=(1, 1),
            output_padding=(1, 1),
            bias=True,
        ),
        Published(9.22, 3.60, "transposed convolution, subtraction of a bias, tanh"),
    ),
    (
        _conv("2-71", (128, 8, 64, 128, 128), (3, 3), bias=True, activation="leaky_relu"),
        Published(1.80, 1.56, "convolution, division, leaky ReLU"),
    ),
)

KERNELBENCH = tuple(spec for spec, _ in _TABLE)
"""At their full size, which is made for a GPU."""

PUBLISHED_H100 = {spec.name: published for spec, published in _TABLE}

_CPU_FLOPS = 4e9
_CPU_BYTES = 64 * 2**20


def for_cpu(spec: ConvSpec) -> tuple[ConvSpec, str]:
    """The problem with one image, its extents halved until a CPU computes it in about 0.1 s.

    Also what was changed, in words.
    """
    small = replace(spec, n=1)
    while small.flops > _CPU_FLOPS or small.bytes() > _CPU_BYTES:
        small = replace(small, h=small.h // 2, w=small.w // 2)
    cut = "" if small.h == spec.h else f", {small.h}x{small.w} of {spec.h}x{spec.w}"
    return small, f"1 image of {spec.n}{cut}"
