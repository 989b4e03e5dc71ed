# SPDX-License-Identifier: BSD-3-Clause
"""Problems for kernels that run in a simulator: as many edges as possible in as little work.

Extents are ragged against every tile, reductions are longer than pipelines (more K tiles than
stages), and each row has an edge that its name gives. One slope for nearly all rows, so that rows
share compiled kernels.
"""

from __future__ import annotations

from .problems import ConvSpec, by_name
from .spec import Op

__all__ = ["GPU_LAYERS", "GPU_PROBLEMS"]

_CONV: Op = "conv2d"
_TRANSPOSED: Op = "conv_transpose2d"

GPU_PROBLEMS: tuple[ConvSpec, ...] = (
    # Kernel and stride.
    ConvSpec("conv-k1s1", _CONV, 3, 264, 24, 5, 7, (1, 1)),
    ConvSpec("conv-k2s2", _CONV, 1, 24, 40, 10, 8, (2, 2), stride=(2, 2)),
    ConvSpec("conv-k3s1", _CONV, 1, 72, 136, 9, 7, (3, 3), padding=(1, 1)),
    ConvSpec("conv-k3s2", _CONV, 3, 16, 32, 9, 11, (3, 3), stride=(2, 2), padding=(1, 1)),
    ConvSpec("conv-k4s2", _CONV, 1, 64, 24, 9, 10, (4, 4), stride=(2, 2), padding=(1, 1)),
    ConvSpec("conv-k5s2", _CONV, 1, 20, 36, 11, 9, (5, 5), stride=(2, 2), padding=(2, 1)),
    ConvSpec("conv-k7s1", _CONV, 1, 17, 21, 9, 8, (7, 7), padding=(3, 3)),
    ConvSpec("conv-k2s3", _CONV, 3, 24, 16, 10, 11, (2, 2), stride=(3, 3)),
    ConvSpec("transposed-k1s1", _TRANSPOSED, 3, 264, 24, 5, 7, (1, 1)),
    ConvSpec("transposed-k2s2", _TRANSPOSED, 1, 72, 40, 7, 5, (2, 2), stride=(2, 2)),
    ConvSpec("transposed-k3s1", _TRANSPOSED, 1, 72, 24, 9, 7, (3, 3), padding=(1, 1)),
    ConvSpec(
        "transposed-k3s2",
        _TRANSPOSED,
        3,
        32,
        16,
        7,
        5,
        (3, 3),
        stride=(2, 2),
        padding=(1, 1),
        output_padding=(1, 0),
    ),
    ConvSpec(
        "transposed-k4s2", _TRANSPOSED, 1, 136, 72, 7, 6, (4, 4), stride=(2, 2), padding=(1, 1)
    ),
    ConvSpec(
        "transposed-k5s2", _TRANSPOSED, 1, 36, 20, 5, 6, (5, 5), stride=(2, 2), padding=(2, 1)
    ),
    ConvSpec("transposed-k7s1", _TRANSPOSED, 1, 21, 17, 7, 8, (7, 7), padding=(3, 3)),
    ConvSpec("transposed-k2s3", _TRANSPOSED, 3, 24, 16, 5, 4, (2, 2), stride=(3, 3)),
    # Dilation with stride: tap residues modulo the stride, and phases without taps.
    ConvSpec(
        "conv-d2s2",
        _CONV,
        1,
        24,
        16,
        12,
        9,
        (3, 3),
        stride=(2, 2),
        padding=(2, 1),
        dilation=(2, 2),
    ),
    ConvSpec(
        "transposed-d2s2",
        _TRANSPOSED,
        1,
        24,
        16,
        6,
        5,
        (3, 3),
        stride=(2, 2),
        padding=(2, 1),
        dilation=(2, 2),
    ),
    ConvSpec(
        "transposed-d2s3",
        _TRANSPOSED,
        1,
        16,
        24,
        5,
        4,
        (3, 2),
        stride=(3, 3),
        padding=(1, 2),
        output_padding=(2, 1),
        dilation=(2, 2),
    ),
    # Nothing alike on the two axes.
    ConvSpec(
        "conv-asymmetric",
        _CONV,
        1,
        24,
        40,
        9,
        8,
        (3, 2),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 3),
    ),
    ConvSpec(
        "transposed-asymmetric",
        _TRANSPOSED,
        1,
        16,
        40,
        4,
        5,
        (2, 5),
        stride=(1, 2),
        padding=(0, 1),
        dilation=(3, 1),
    ),
    # Groups: wide enough for tiles, narrow, and depthwise with one and two outputs for each input.
    ConvSpec("conv-groups2", _CONV, 1, 48, 64, 7, 9, (3, 3), padding=(1, 1), groups=2),
    ConvSpec(
        "transposed-groups2",
        _TRANSPOSED,
        1,
        64,
        48,
        4,
        5,
        (4, 4),
        stride=(2, 2),
        padding=(1, 1),
        groups=2,
    ),
    # All channels are whole vectors, those of a group are not.
    ConvSpec("conv-groups2-ragged", _CONV, 1, 48, 88, 5, 6, (3, 3), padding=(1, 1), groups=2),
    ConvSpec("conv-groups3-narrow", _CONV, 1, 6, 15, 7, 6, (3, 3), padding=(1, 1), groups=3),
    ConvSpec("conv-depthwise", _CONV, 1, 24, 24, 8, 7, (3, 3), padding=(1, 1), groups=24),
    ConvSpec(
        "transposed-depthwise",
        _TRANSPOSED,
        1,
        40,
        40,
        5,
        4,
        (4, 4),
        stride=(2, 2),
        padding=(1, 1),
        groups=40,
    ),
    ConvSpec(
        "transposed-depthwise-x2",
        _TRANSPOSED,
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
    # Few channels, and counts that no vector divides.
    ConvSpec("conv-c1-c1", _CONV, 3, 1, 1, 9, 7, (3, 3), padding=(1, 1)),
    ConvSpec("conv-c149-c10", _CONV, 1, 149, 10, 5, 6, (3, 3), padding=(1, 1)),
    ConvSpec(
        "transposed-c10-c149", _TRANSPOSED, 1, 10, 149, 5, 4, (3, 3), stride=(2, 2), padding=(1, 1)
    ),
    # Taps that lie outside for most pixels, no bias, the other activations.
    ConvSpec("conv-padding-over-kernel", _CONV, 1, 16, 8, 3, 4, (2, 1), padding=(4, 3)),
    ConvSpec("conv-relu-no-bias", _CONV, 1, 24, 16, 6, 7, (3, 3), activation="relu", bias=False),
    ConvSpec(
        "transposed-no-activation",
        _TRANSPOSED,
        1,
        24,
        16,
        4,
        3,
        (3, 3),
        stride=(2, 2),
        activation="none",
    ),
    ConvSpec("conv-empty-batch", _CONV, 0, 16, 8, 6, 7, (3, 3), padding=(1, 1)),
)

# Layers of the models at reduced extent: channels are theirs where that is affordable.
_SEGNET = (
    "segnet-encoder1",
    "segnet-encoder2",
    "segnet-encoder3",
    "segnet-decoder1",
    "segnet-decoder2",
    "segnet-decoder3",
)
GPU_LAYERS: tuple[ConvSpec, ...] = (
    *(by_name(name).reduced(batch=3, channels=64, extent=7) for name in _SEGNET),
    by_name("cpm-conv1_1").reduced(batch=1, channels=64),
    by_name("cpm-conv4_2").reduced(batch=1, channels=128, extent=5),
    by_name("cpm-conv5_2").reduced(batch=1, channels=256, extent=5),
    by_name("cpm-conv6_1").reduced(batch=1, channels=32, extent=5),
    by_name("cpm-conv6_7").reduced(batch=1, channels=128, extent=5),
)
