# SPDX-License-Identifier: BSD-3-Clause
"""Cases that belong together: layers of a network, models by batch and resolution, sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..testing.kernelbench import KERNELBENCH, for_cpu
from ..testing.spec import ConvSpec
from .cases import Case, Mode, Tier
from .work import model_flops

__all__ = [
    "distinct",
    "gpu_layers",
    "gpu_models",
    "kernelbench",
    "layers",
    "models",
    "sweeps",
]

_FLOAT32, _BFLOAT16 = torch.float32, torch.bfloat16
_DTYPES = (_FLOAT32, _BFLOAT16)

_QUICK_LAYERS = frozenset(
    {
        "transposed-segnet-2",
        "transposed-mask-rcnn-head",
        "transposed-simple-baseline-3",
        "transposed-dcgan-2",
        "transposed-fcn-x8",
        "cpm-conv3_2",
        "cpm-conv6_2",
    }
)


def _layer(
    spec: ConvSpec, group: str, mode: Mode, dtype: torch.dtype, tier: Tier, note: str = ""
) -> Case:
    passes = 3 if mode == "training" else 1
    return Case(
        spec.name,
        group,
        mode,
        dtype,
        spec,
        spec.input_shape,
        float(spec.flops * passes),
        # Each pass reads two of the three tensors and writes the third.
        float(spec.bytes(dtype) * passes),
        tier,
        note,
    )


# Groups whose training steps are measured too unless something else is asked for.
_TRAINED = ("transposed", "grouped")


def layers(group: str, specs: Sequence[ConvSpec]) -> Iterator[Case]:
    """Each layer in each dtype, in inference and as a training step."""
    for dtype in _DTYPES:
        for spec in specs:
            quick = dtype == _FLOAT32 and spec.name in _QUICK_LAYERS
            yield _layer(spec, group, "inference", dtype, "quick" if quick else "full")
    for dtype in _DTYPES:
        for spec in specs:
            full = group in _TRAINED and dtype == _FLOAT32
            yield _layer(spec, group, "training", dtype, "full" if full else "extra")


def distinct(specs: Sequence[ConvSpec]) -> tuple[ConvSpec, ...]:
    """One layer of each geometry, named after the first that has it."""
    first: dict[ConvSpec, ConvSpec] = {}
    for spec in specs:
        first.setdefault(replace(spec, name=""), spec)
    return tuple(first.values())


# Model, input, mode, dtypes, tier.
_MODELS: tuple[tuple[str, tuple[int, int, int, int], Mode, Tier], ...] = (
    ("cpm2dpose", (1, 3, 256, 256), "inference", "quick"),
    ("cpm2dpose", (4, 3, 256, 256), "inference", "full"),
    ("cpm2dpose", (16, 3, 256, 256), "inference", "extra"),
    ("cpm2dpose", (64, 3, 256, 256), "inference", "extra"),
    ("cpm2dpose", (1, 3, 128, 128), "inference", "full"),
    ("cpm2dpose", (1, 3, 368, 368), "inference", "full"),
    ("cpm2dpose", (1, 3, 480, 640), "inference", "extra"),
    ("segnet", (1, 1, 28, 28), "inference", "full"),
    ("segnet", (4, 1, 28, 28), "inference", "extra"),
    ("segnet", (16, 1, 28, 28), "inference", "full"),
    ("segnet", (64, 1, 28, 28), "inference", "quick"),
    ("segnet", (256, 1, 28, 28), "inference", "full"),
    ("segnet", (64, 1, 112, 112), "inference", "extra"),
    ("cpm2dpose", (4, 3, 256, 256), "training", "full"),
    ("cpm2dpose", (1, 3, 256, 256), "training", "extra"),
    ("segnet", (16, 1, 28, 28), "training", "full"),
    ("segnet", (64, 1, 28, 28), "training", "quick"),
    ("segnet", (256, 1, 28, 28), "training", "extra"),
)


def models() -> Iterator[Case]:
    """Whole models, in inference and in training."""
    for dtype in _DTYPES:
        for model, shape, mode, tier in _MODELS:
            yield _model(model, shape, mode, dtype, tier)


def _model(
    model: str, shape: tuple[int, int, int, int], mode: Mode, dtype: torch.dtype, tier: Tier
) -> Case:
    return Case(
        f"{model}-{'x'.join(map(str, shape))}",
        "models",
        mode,
        dtype,
        model,
        shape,
        model_flops(model, shape) * (3 if mode == "training" else 1),
        None,
        tier,
    )


def kernelbench() -> Iterator[Case]:
    """KernelBench's convolutions, cut to the size of a CPU."""
    for full in KERNELBENCH:
        spec, cut = for_cpu(full)
        yield _layer(spec, "kernelbench", "inference", _FLOAT32, "full", cut)


# What a plot of time against size can show without becoming a thicket.
_SWEPT_CONTENDERS = ("segpose", "eager", "eager-cl", "mkldnn", "onnxruntime", "openvino")

_UPSAMPLER = ConvSpec(
    "upsampler",
    "conv_transpose2d",
    *(1, 128, 128, 32, 32),
    (4, 4),
    stride=(2, 2),
    padding=(1, 1),
    activation="relu",
)


def sweeps() -> Iterator[Case]:
    """A transposed convolution (k4 s2, 128 to 128 channels on 32x32, as in heatmap heads) against
    batch, resolution and channels, against sizes that fill no vectors and tiles, and with sizes
    that change from call to call; CPM2DPose against resolution, SegNet against batch.
    """
    for n in (1, 2, 4, 8, 16, 32):
        yield _swept("batch", n, replace(_UPSAMPLER, n=n))
    for extent in (8, 16, 32, 64, 128):
        yield _swept("resolution", extent, replace(_UPSAMPLER, h=extent, w=extent))
    for channels in (8, 16, 32, 64, 128, 256, 512):
        yield _swept("channels", channels, replace(_UPSAMPLER, c_in=channels, c_out=channels))
    odd = replace(_UPSAMPLER, name="odd")
    for extent in (1, 3, 7, 15, 33, 65):
        yield _swept("resolution", extent, replace(odd, h=extent, w=extent))
    for channels in (3, 9, 17, 21, 37, 75, 149, 301):
        yield _swept("channels", channels, replace(odd, c_in=channels, c_out=channels))
    changing = replace(_UPSAMPLER, name="changing")
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        # Runtimes that are made for one size of input have no part in it.
        contenders = ("segpose", "eager", "eager-cl")
        yield replace(_swept("sizes", count, changing), sizes=count, contenders=contenders)
    for extent in (64, 128, 192, 256, 384):
        yield _swept_model("cpm2dpose", "resolution", extent, (1, 3, extent, extent))
    for n in (1, 4, 16, 64, 256):
        yield _swept_model("segnet", "batch", n, (n, 1, 28, 28))


def _swept(quantity: str, value: int, spec: ConvSpec) -> Case:
    name = f"{spec.name}-{quantity}-{value}"
    case = _layer(replace(spec, name=name), "scaling", "inference", _FLOAT32, "full")
    return replace(case, sweep=(quantity, value), contenders=_SWEPT_CONTENDERS)


def _swept_model(model: str, quantity: str, value: int, shape: tuple[int, int, int, int]) -> Case:
    return replace(
        _model(model, shape, "inference", _FLOAT32, "full"),
        name=f"{model}-{quantity}-{value}",
        group="scaling",
        sweep=(quantity, value),
        contenders=_SWEPT_CONTENDERS,
    )


_GPU_DTYPES = (_FLOAT32, torch.float16, _BFLOAT16)
_GPU_MODELS: tuple[tuple[str, tuple[int, int, int, int], Mode], ...] = (
    ("cpm2dpose", (1, 3, 256, 256), "inference"),
    ("cpm2dpose", (16, 3, 368, 368), "inference"),
    ("cpm2dpose", (16, 3, 368, 368), "training"),
    ("segnet", (64, 1, 28, 28), "inference"),
    ("segnet", (4096, 1, 28, 28), "inference"),
    ("segnet", (4096, 1, 28, 28), "training"),
)


def gpu_models() -> Iterator[Case]:
    """Whole models with batches for a GPU."""
    for dtype in _GPU_DTYPES:
        for model, shape, mode in _GPU_MODELS:
            yield _model(model, shape, mode, dtype, "full")


def gpu_layers(group: str, specs: Sequence[ConvSpec]) -> Iterator[Case]:
    """Layers at full size, in each dtype of a GPU."""
    for dtype in _GPU_DTYPES:
        for spec in specs:
            yield _layer(spec, group, "inference", dtype, "full")
