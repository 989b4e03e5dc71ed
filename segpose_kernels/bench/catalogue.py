# SPDX-License-Identifier: BSD-3-Clause
"""Every case there is, in the order of the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..testing.kernelbench import KERNELBENCH, for_cpu
from ..testing.networks import NETWORKS
from ..testing.problems import CPM2DPOSE, SEGNET, TRANSPOSED
from ..testing.spec import ConvSpec
from .cases import Case, Mode, Tier
from .work import model_flops

__all__ = ["CASES", "GROUPS", "select"]

GROUPS = {
    "models": "whole models",
    "transposed": "transposed convolution + ReLU",
    "networks": "more transposed convolutions",
    "cpm-layers": "layers of CPM2DPose, 256x256",
    "segnet-layers": "layers of SegNet, batch 64",
    "kernelbench": "2-D convolutions of KernelBench, cut to the size of a CPU",
}
"""Group names, and what they hold."""

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


def _layers(group: str, specs: Sequence[ConvSpec]) -> Iterator[Case]:
    for dtype in _DTYPES:
        for spec in specs:
            quick = dtype == _FLOAT32 and spec.name in _QUICK_LAYERS
            yield _layer(spec, group, "inference", dtype, "quick" if quick else "full")
    for dtype in _DTYPES:
        for spec in specs:
            full = group == "transposed" and dtype == _FLOAT32
            yield _layer(spec, group, "training", dtype, "full" if full else "extra")


def _distinct(specs: Sequence[ConvSpec]) -> tuple[ConvSpec, ...]:
    """One layer of each geometry, named after the first that has it."""
    first: dict[ConvSpec, ConvSpec] = {}
    for spec in specs:
        first.setdefault(replace(spec, name=""), spec)
    return tuple(first.values())


CPM_LAYER_COUNTS = Counter(replace(spec, name="") for spec in CPM2DPOSE)
"""How often each geometry of `CPM2DPOSE`, without its name, occurs in the model."""


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


def _models() -> Iterator[Case]:
    for dtype in _DTYPES:
        for model, shape, mode, tier in _MODELS:
            yield Case(
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


def _kernelbench() -> Iterator[Case]:
    for full in KERNELBENCH:
        spec, cut = for_cpu(full)
        yield _layer(spec, "kernelbench", "inference", _FLOAT32, "full", cut)


CASES: tuple[Case, ...] = (
    *_models(),
    *_layers("transposed", TRANSPOSED),
    *_layers("networks", NETWORKS),
    *_layers("cpm-layers", _distinct(CPM2DPOSE)),
    *_layers("segnet-layers", SEGNET),
    *_kernelbench(),
)


def select(
    tier: Tier,
    words: Sequence[str] = (),
    *,
    dtypes: Sequence[torch.dtype] = (),
    modes: Sequence[str] = (),
    cases: Sequence[Case] = CASES,
) -> list[Case]:
    """Cases of `tier` and below; or those with one of `words` in their name or as their group.

    A word that is the whole name of a case takes it whatever its tier; other words are looked for
    up to tier "full", and "extra" only where nothing else is found.
    """
    tiers: tuple[Tier, ...] = ("quick", "full", "extra")
    allowed = tiers[: tiers.index(tier) + 1]
    chosen = [
        case
        for case in cases
        if (not dtypes or case.dtype in dtypes) and (not modes or case.mode in modes)
    ]
    if not words:
        return [case for case in chosen if case.tier in allowed]
    found: list[Case] = []
    for word in words:
        named = [case for case in chosen if word in (case.name, case.id)]
        matching = [case for case in chosen if word == case.group or word in case.id]
        usual = [case for case in matching if case.tier in allowed]
        found += [case for case in named or usual or matching if case not in found]
    return sorted(found, key=cases.index)
