# SPDX-License-Identifier: BSD-3-Clause
"""Every case there is, in the order of the tables, and how to choose from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..testing.networks import GROUPED, NETWORKS
from ..testing.problems import CPM2DPOSE, SEGNET, TRANSPOSED
from .cases import Case, Tier
from .series import distinct, kernelbench, layers, models, sweeps

__all__ = ["CASES", "GROUPS", "select"]

GROUPS = {
    "models": "whole models",
    "transposed": "transposed convolution + ReLU",
    "networks": "more transposed convolutions",
    "grouped": "grouped and depthwise convolutions",
    "cpm-layers": "layers of CPM2DPose, 256x256",
    "segnet-layers": "layers of SegNet, batch 64",
    "kernelbench": "2-D convolutions of KernelBench",
    "scaling": "time and memory against batch, resolution and channels",
}
"""Group names, and what they hold."""

CASES: tuple[Case, ...] = (
    *models(),
    *layers("transposed", TRANSPOSED),
    *layers("networks", NETWORKS),
    *layers("grouped", GROUPED),
    *layers("cpm-layers", distinct(CPM2DPOSE)),
    *layers("segnet-layers", SEGNET),
    *kernelbench(),
    *sweeps(),
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
    in names up to tier "full", and "extra" only where nothing else is found. Points of a sweep
    belong together and come with their group only.
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
        matching = [
            case for case in chosen if word == case.group or (word in case.id and not case.sweep)
        ]
        usual = [case for case in matching if case.tier in allowed]
        found += [case for case in named or usual or matching if case not in found]
    return sorted(found, key=cases.index)
