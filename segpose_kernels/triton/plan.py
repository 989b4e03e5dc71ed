# SPDX-License-Identifier: BSD-3-Clause
"""problem -> plan: kernel, tile, grid and every integer argument, without touching a device.

While tracing with dynamic shapes the extents of images are symbols. Choices then rest on their
hints, which leaves no guard behind, and what depends on the extents stays an expression.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from .device import Device
from .problem import ConvProblem, concrete
from .tiles import Tile, ceil_div

__all__ = [
    "NARROW",
    "Arguments",
    "Choice",
    "Direction",
    "Epilogue",
    "Launch",
    "Operands",
    "alignment",
    "gather_shape",
    "hint",
    "is_narrow",
    "is_wide",
    "needs_int64",
    "padded",
    "padded_channels",
    "split_count",
]

Direction = Literal["fprop", "dgrad"]

# Below this many channels in a group a tensor-core tile is mostly padding: gemm_k then runs over
# (tap, channel) pairs, and groups go to the direct kernel.
NARROW = 16
# Up to this many channels single elements are loaded; more are brought to whole vectors first.
_SINGLE = 2
# Offsets of masked-out rows may lie a tile beyond the tensor; they are computed, never used.
_INT32_LIMIT = 2**31 - 2**16
# What a symbol without a hint is taken for.
_UNKNOWN_SIZE = 4096


class Operands(NamedTuple):
    """What kernels need to know of a call besides its problem."""

    dtype: torch.dtype
    precision: str  # of float32 products: "tf32" or "ieee"
    device: Device

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Epilogue:
    """Bias and activation behind a gather, or a mask before it; slopes of 1 do nothing."""

    bias: bool = False
    slope: float = 1.0
    mask_slope: float = 1.0


class Arguments(dict[str, Any]):
    """Arguments of a plan's launches besides tensors, and what has been compiled for them."""

    __slots__ = ("compiled",)

    def __init__(self, *values: Mapping[str, Any], **named: Any) -> None:
        super().__init__(*values, **named)
        self.compiled: dict[Any, Any] = {}


class Launch:
    """One launch of a kernel, tensors left out: what plans of all kernels have."""

    integers: Mapping[str, int]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    @functools.cached_property
    def arguments(self) -> Arguments:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return Arguments({**self.integers, **self.constants, **options})


@dataclass(frozen=True)
class Choice:
    """What tuning has found best for a pass: a kernel, and its tile and splits if it has some."""

    kernel: Literal["igemm", "direct", "library"]
    tile: Tile | None = None
    splits: int = 0  # of wgrad; 0 leaves them to the plan


def hint(size: int) -> int:
    """The size, or for a symbol the value it had when traced."""
    if type(size) is int:
        return size
    known = getattr(getattr(size, "node", None), "hint", None)
    return int(known) if known is not None else _UNKNOWN_SIZE


def needs_int64(*element_counts: int) -> bool:
    """Whether offsets into one of the tensors may exceed 32 bits."""
    if concrete(*element_counts):
        return max(element_counts) >= _INT32_LIMIT
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return not all(guard_or_false(count < _INT32_LIMIT) for count in element_counts)


def alignment(channels: int, itemsize: int) -> int:
    """Largest power of two that divides `channels`, up to a vector of 16 bytes."""
    return math.gcd(channels, 16 // itemsize) if concrete(channels) else 1


def padded_channels(channels: int, itemsize: int) -> int:
    """Channels with zeros up to a vector of 16 bytes, or of 8 where four elements hold them.

    A kernel that loads single elements cannot copy asynchronously, and holds the elements of every
    stage in registers. One pass over the tensor costs less, and most callers convert the layout
    anyway.
    """
    if channels <= _SINGLE:
        return channels
    if channels <= 4:
        return 4
    vector = 16 // itemsize
    return ceil_div(channels, vector) * vector


def gather_shape(problem: ConvProblem, direction: Direction) -> tuple[int, int]:
    """Source and destination channels in a group."""
    if direction == "dgrad":
        return problem.k_per_group, problem.c_per_group
    return problem.c_per_group, problem.k_per_group


def padded(problem: ConvProblem, direction: Direction, itemsize: int) -> ConvProblem:
    """The problem with the source channels of a gather padded."""
    if direction == "dgrad":
        return replace(problem, k=padded_channels(problem.k, itemsize))
    return replace(problem, c=padded_channels(problem.c, itemsize))


def is_narrow(problem: ConvProblem, direction: Direction, dtype: torch.dtype) -> bool:
    """Whether the direct kernel runs a problem: float64, and groups too narrow for tiles."""
    if dtype == torch.float64:
        return True
    return problem.groups > 1 and min(gather_shape(problem, direction)) < NARROW


def is_wide(problem: ConvProblem) -> bool:
    return needs_int64(problem.x_size, problem.y_size, problem.w_size)


def split_count(rows: int, block: int, tiles: int, multiprocessors: int) -> int:
    """Chunks of rows that give every multiprocessor two programs, none below eight blocks."""
    wanted = ceil_div(2 * multiprocessors, tiles)
    return max(1, min(wanted, rows // (8 * block), 64))
