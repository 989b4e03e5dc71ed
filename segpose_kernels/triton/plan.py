# SPDX-License-Identifier: BSD-3-Clause
"""problem -> plan: kernel, tile, grid and every integer argument, without touching a device.

While tracing with dynamic shapes the extents of images are symbols. Choices then rest on their
hints, which leaves no guard behind, and what depends on the extents stays an expression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .device import Device
from .problem import ConvProblem, concrete
from .tiles import (
    Demands,
    Tile,
    best_gather_tile,
    best_wgrad_tile,
    ceil_div,
    gather_candidates,
    power_of_two,
    wgrad_candidates,
)

__all__ = [
    "Choice",
    "Direction",
    "Epilogue",
    "GatherPlan",
    "MaskPlan",
    "Operands",
    "PointwisePlan",
    "WgradPlan",
    "gather_tiles",
    "mask_first",
    "plan_bias_activation",
    "plan_gather",
    "plan_mask",
    "plan_wgrad",
    "wgrad_tiles",
]

Direction = Literal["fprop", "dgrad"]

# Below this many channels in a group a tensor-core tile is mostly padding: gemm_k then runs over
# (tap, channel) pairs, and groups go to the direct kernel.
_NARROW = 16
# Up to this many channels single elements are loaded; more are brought to whole vectors first.
_SINGLE = 2
# Offsets of masked-out rows may lie a tile beyond the tensor; they are computed, never used.
_INT32_LIMIT = 2**31 - 2**16
# What a symbol without a hint is taken for.
_UNKNOWN_SIZE = 4096


@dataclass(frozen=True)
class Operands:
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


@dataclass(frozen=True)
class Choice:
    """What tuning has found best for a pass: a kernel, and its tile and splits if it has some."""

    kernel: Literal["igemm", "direct", "library"]
    tile: Tile | None = None
    splits: int = 0  # of wgrad; 0 leaves them to the plan


def _hint(size: int) -> int:
    """The size, or for a symbol the value it had when traced."""
    if type(size) is int:
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint) if hint is not None else _UNKNOWN_SIZE


def _needs_int64(*element_counts: int) -> bool:
    """Whether offsets into one of the tensors may exceed 32 bits."""
    if concrete(*element_counts):
        return max(element_counts) >= _INT32_LIMIT
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return not all(guard_or_false(count < _INT32_LIMIT) for count in element_counts)


def _alignment(channels: int, itemsize: int) -> int:
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


# fprop and dgrad ----------------------------------------------------------------------------


@dataclass(frozen=True)
class GatherPlan:
    """One launch of igemm_kernel or direct_kernel, tensors left out.

    The kernel reads a source of `channels` channels, zeros behind its own, and a filter padded
    alike. With `reduced_last` it wants the filter as [groups, cols, R, S, red], else KRSC.
    """

    problem: ConvProblem
    direction: Direction
    kernel: Literal["igemm", "direct", "library"]
    tile: Tile | None
    channels: int
    reduced_last: bool
    grid: int
    integers: Mapping[str, int]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = "" if self.tile is None else f", tile {self.tile}"
        return f"{self.direction} {self.kernel}{tile}, {self.grid} programs: {self.problem}"


def gather_shape(problem: ConvProblem, direction: Direction) -> tuple[int, int]:
    """Source and destination channels in a group."""
    if direction == "dgrad":
        return problem.k_per_group, problem.c_per_group
    return problem.c_per_group, problem.k_per_group


def _padded(problem: ConvProblem, direction: Direction, itemsize: int) -> ConvProblem:
    """The problem with the source channels of a gather padded."""
    if direction == "dgrad":
        return replace(problem, k=padded_channels(problem.k, itemsize))
    return replace(problem, c=padded_channels(problem.c, itemsize))


def _is_narrow(problem: ConvProblem, direction: Direction, dtype: torch.dtype) -> bool:
    """Whether the direct kernel runs a problem: float64, and groups too narrow for tiles."""
    if dtype == torch.float64:
        return True
    return problem.groups > 1 and min(gather_shape(problem, direction)) < _NARROW


def _gather_integers(problem: ConvProblem, direction: Direction) -> dict[str, int]:
    x, y = (problem.h, problem.w), (problem.p, problem.q)
    source, destination = (y, x) if direction == "dgrad" else (x, y)
    gcds = tuple(math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))
    integers = {
        "images": problem.n,
        "src_h": source[0],
        "src_w": source[1],
        "dst_h": destination[0],
        "dst_w": destination[1],
        "groups": problem.groups,
        "kernel_h": problem.r,
        "kernel_w": problem.s,
    }
    for axis, name in enumerate("hw"):
        integers[f"stride_{name}"] = problem.stride[axis]
        integers[f"pad_{name}"] = problem.padding[axis]
        integers[f"dilation_{name}"] = problem.dilation[axis]
        integers[f"gcd_{name}"] = gcds[axis]
    return integers


def _phases(problem: ConvProblem, direction: Direction) -> int:
    return math.prod(problem.stride) if direction == "dgrad" else 1


def _phase_pixels(problem: ConvProblem, direction: Direction) -> int:
    """Destination pixels of the largest phase."""
    if direction == "fprop":
        return problem.n * problem.p * problem.q
    rows, columns = ceil_div(problem.h, problem.stride[0]), ceil_div(problem.w, problem.stride[1])
    return problem.n * rows * columns


def _balanced(problem: ConvProblem) -> bool:
    """Whether every phase of a dgrad has the same number of taps."""
    axes = zip((problem.r, problem.s), problem.stride, problem.dilation, strict=True)
    return all(math.gcd(s, d) == 1 and kernel % s == 0 for kernel, s, d in axes)


def gather_tiles(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> list[Tile]:
    """Tiles that tuning may try for a problem as a plan has it, padded and folded."""
    red, cols = gather_shape(problem, direction)
    demands = _gather_demands(problem, direction, operands, epilogue)
    return gather_candidates(cols, problem.r * problem.s * red if demands.flat else red, demands)


def _is_wide(problem: ConvProblem) -> bool:
    return _needs_int64(problem.x_size, problem.y_size, problem.w_size)


def _gather_demands(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> Demands:
    red, cols = gather_shape(problem, direction)
    masked = epilogue.mask_slope != 1
    # A result that is not stored in a vector has a pointer of its own.
    odd = _alignment(cols, operands.itemsize) * operands.itemsize < 8
    most = 64 if masked or _is_wide(problem) else 128
    if odd:
        most = 16 if operands.itemsize == 4 and operands.precision == "ieee" else 32
    return Demands(
        operands.itemsize,
        operands.precision,
        operands.device,
        masked=masked,
        flat=_is_flat(red, operands.itemsize),
        accumulators=most,
    )


def _is_flat(red: int, itemsize: int) -> bool:
    """Whether gemm_k runs over (tap, channel) pairs: few channels, or no whole vectors of them."""
    return red < _NARROW or _alignment(red, itemsize) * itemsize < 16


def plan_gather(
    problem: ConvProblem,  # not folded
    direction: Direction,
    operands: Operands,
    epilogue: Epilogue,
    choice: Choice | None = None,
) -> GatherPlan:
    """How fprop or dgrad of a problem runs; `choice` overrules what is chosen without measuring."""
    if choice is not None and choice.kernel == "library":
        channels = problem.k if direction == "dgrad" else problem.c
        return GatherPlan(problem, direction, "library", None, channels, False, 0, {}, {}, 0, 0)
    if _is_narrow(problem, direction, operands.dtype):
        return _plan_direct(problem, direction, operands, epilogue)
    bias_period = problem.k if direction == "fprop" else problem.c
    if problem.groups == 1:
        problem = _padded(problem, direction, operands.itemsize)
    channels = problem.k if direction == "dgrad" else problem.c
    problem = problem.folded()
    red, cols = gather_shape(problem, direction)
    phases = _phases(problem, direction)
    pixels = _phase_pixels(problem, direction)
    demands = _gather_demands(problem, direction, operands, epilogue)
    tile = choice.tile if choice is not None else None
    if tile is None:
        tile = best_gather_tile(
            gather_tiles(problem, direction, operands, epilogue),
            _hint(pixels),
            cols,
            ceil_div(problem.r * problem.s, phases) * red,
            phases * problem.groups,
            demands,
        )
    # A folded dgrad repeats the bias over its taps, and vectors must not cross the repeats.
    cols_align = _alignment(math.gcd(cols, bias_period), operands.itemsize)
    red_align = _alignment(red, operands.itemsize)
    # wgmma takes 32-bit operands along gemm_k only, and odd rows of columns have no vectors.
    odd = cols_align * operands.itemsize < 16
    reduced_last = direction == "fprop" or operands.itemsize == 4 or odd
    tiles_m, tiles_n = ceil_div(pixels, tile.m), ceil_div(cols, tile.n)
    integers = _gather_integers(problem, direction) | {
        "red_units": red // red_align,
        "cols_units": cols // cols_align,
        "bias_period": bias_period,
        "phases": phases,
        "tiles_m": tiles_m,
        "tiles_n": tiles_n,
        "phases_inside": int(direction == "dgrad" and _balanced(problem)),
    }
    constants = {
        "RED_ALIGN": red_align,
        "COLS_ALIGN": cols_align,
        "TRANSPOSED": direction == "dgrad",
        "W_REDUCED_LAST": reduced_last,
        "FLAT": demands.flat,
        "EVEN_K": not demands.flat and red % tile.k == 0,
        "SLOPE": epilogue.slope,
        "MASK_SLOPE": epilogue.mask_slope,
        "PRECISION": operands.precision,
        "WIDE": _is_wide(problem),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
    }
    grid = phases * problem.groups * tiles_m * tiles_n
    return GatherPlan(
        problem,
        direction,
        "igemm",
        tile,
        channels,
        reduced_last,
        grid,
        integers,
        constants,
        tile.warps,
        tile.stages,
    )


def _plan_direct(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> GatherPlan:
    red, cols = gather_shape(problem, direction)
    phases = _phases(problem, direction)
    channels = problem.groups * cols
    block_n = power_of_two(channels, 8, 64)
    block_m = 1024 // block_n
    tiles_m = ceil_div(_phase_pixels(problem, direction), block_m)
    tiles_n = ceil_div(channels, block_n)
    integers = _gather_integers(problem, direction) | {
        "red": red,
        "cols": cols,
        "phases": phases,
        "tiles_m": tiles_m,
        "tiles_n": tiles_n,
    }
    constants = {
        "TRANSPOSED": direction == "dgrad",
        "DEPTHWISE": red == 1 and cols == 1,
        "SLOPE": epilogue.slope,
        "MASK_SLOPE": epilogue.mask_slope,
        "WIDE": _is_wide(problem),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    grid = phases * tiles_m * tiles_n
    return GatherPlan(
        problem,
        direction,
        "direct",
        None,
        problem.groups * red,
        False,
        grid,
        integers,
        constants,
        warps=4,
        stages=2,
    )


# wgrad --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WgradPlan:
    """One launch of wgrad_kernel or direct_wgrad_kernel and the sum over its splits.

    The kernel reads tensors of `y_channels` and `x_channels` channels, zeros behind their own, and
    gives a filter gradient padded alike.
    """

    problem: ConvProblem
    y_channels: int
    x_channels: int
    kernel: Literal["igemm", "direct", "library"]
    tile: Tile | None
    splits: int
    bias: bool  # the kernel also gives the sums of y over its pixels
    grid: int
    integers: Mapping[str, int]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = "" if self.tile is None else f", tile {self.tile}"
        return (
            f"wgrad {self.kernel}{tile}, {self.splits} splits, {self.grid} programs: {self.problem}"
        )


def _wgrad_integers(problem: ConvProblem) -> dict[str, int]:
    return {
        "y_p": problem.p,
        "y_q": problem.q,
        "x_h": problem.h,
        "x_w": problem.w,
        "groups": problem.groups,
        "kernel_w": problem.s,
        "kernel": problem.r * problem.s,
        "stride_h": problem.stride[0],
        "stride_w": problem.stride[1],
        "pad_h": problem.padding[0],
        "pad_w": problem.padding[1],
        "dilation_h": problem.dilation[0],
        "dilation_w": problem.dilation[1],
        "pixels": problem.n * problem.p * problem.q,
    }


def _wgrad_columns(problem: ConvProblem, tile_n: int) -> tuple[bool, int]:
    """Whether column tiles run over (tap, channel) pairs, and how many tiles there are."""
    c, taps = problem.c_per_group, problem.r * problem.s
    flat, single = ceil_div(taps * c, tile_n), taps * ceil_div(c, tile_n)
    return (True, flat) if flat < single else (False, single)


def wgrad_tiles(problem: ConvProblem, operands: Operands, mask_slope: float) -> list[Tile]:
    """Tiles that tuning may try for a folded problem."""
    demands = _wgrad_demands(problem, operands, mask_slope)
    return wgrad_candidates(
        problem.k_per_group, problem.r * problem.s * problem.c_per_group, demands
    )


def _wgrad_demands(problem: ConvProblem, operands: Operands, mask_slope: float) -> Demands:
    masked = mask_slope != 1
    # An element that is not loaded in a vector has a pointer of its own.
    odd = (
        min(
            _alignment(channels, operands.itemsize) * operands.itemsize
            for channels in (problem.k_per_group, problem.c_per_group)
        )
        < 8
    )
    return Demands(
        operands.itemsize,
        operands.precision,
        operands.device,
        masked=masked,
        accumulators=16 if odd else 64 if masked or _is_wide(problem) else 128,
    )


def plan_wgrad(
    problem: ConvProblem,  # not folded
    operands: Operands,
    *,
    bias: bool = False,
    mask_x: bool = False,
    mask_slope: float = 1.0,
    choice: Choice | None = None,
) -> WgradPlan:
    """How wgrad of a problem runs. `bias` asks for the sums of y, `mask_x` masks x and not y."""
    if choice is not None and choice.kernel == "library":
        return WgradPlan(problem, problem.k, problem.c, "library", None, 1, False, 0, {}, {}, 0, 0)
    if _is_narrow(problem, "fprop", operands.dtype):
        return _plan_direct_wgrad(problem, operands, mask_x, mask_slope)
    if problem.groups == 1:
        problem = _padded(_padded(problem, "fprop", operands.itemsize), "dgrad", operands.itemsize)
    y_channels, x_channels = problem.k, problem.c
    problem = problem.folded()
    integers = _wgrad_integers(problem)
    pixels = integers["pixels"]
    demands = _wgrad_demands(problem, operands, mask_slope)
    if choice is not None and choice.tile is not None and choice.splits > 0:
        tile, splits = choice.tile, choice.splits
    else:
        chosen = choice.tile if choice is not None else None
        tiles = [chosen] if chosen is not None else wgrad_tiles(problem, operands, mask_slope)
        tile, splits = best_wgrad_tile(
            tiles,
            problem.k_per_group,
            {tile.n: _wgrad_columns(problem, tile.n)[1] for tile in tiles},
            problem.w_size,
            problem.groups,
            _hint(pixels),
            demands,
        )
    flat, tiles_n = _wgrad_columns(problem, tile.n)
    tiles_k = ceil_div(problem.k_per_group, tile.m)
    k_align = _alignment(problem.k_per_group, operands.itemsize)
    c_align = _alignment(problem.c_per_group, operands.itemsize)
    integers |= {
        "k_units": problem.k_per_group // k_align,
        "c_units": problem.c_per_group // c_align,
        "chunk": ceil_div(ceil_div(pixels, splits), tile.k) * tile.k,
        "tiles_k": tiles_k,
        "tiles_n": tiles_n,
    }
    constants = {
        "K_ALIGN": k_align,
        "C_ALIGN": c_align,
        "FLAT": flat,
        "MASK_X": mask_x and mask_slope != 1,
        "MASK_SLOPE": mask_slope,
        "PRECISION": operands.precision,
        "WIDE": _is_wide(problem),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
    }
    grid = splits * problem.groups * tiles_k * (tiles_n + bias)
    return WgradPlan(
        problem,
        y_channels,
        x_channels,
        "igemm",
        tile,
        splits,
        bias,
        grid,
        integers,
        constants,
        tile.warps,
        tile.stages,
    )


def _plan_direct_wgrad(
    problem: ConvProblem, operands: Operands, mask_x: bool, mask_slope: float
) -> WgradPlan:
    columns = problem.r * problem.s * problem.c_per_group
    block_t = power_of_two(columns, 1, 16)
    block_n = power_of_two(problem.k, 8, 32)
    block_p = 2048 // (block_t * block_n)
    tiles_k, tiles_t = ceil_div(problem.k, block_n), ceil_div(columns, block_t)
    integers = _wgrad_integers(problem)
    splits = _splits(
        _hint(integers["pixels"]), block_p, tiles_k * tiles_t, operands.device.multiprocessors
    )
    integers |= {
        "k_count": problem.k_per_group,
        "c_count": problem.c_per_group,
        "chunk": ceil_div(ceil_div(integers["pixels"], splits), block_p) * block_p,
        "tiles_k": tiles_k,
        "tiles_t": tiles_t,
    }
    constants = {
        "DEPTHWISE": problem.k_per_group == 1 and problem.c_per_group == 1,
        "MASK_X": mask_x and mask_slope != 1,
        "MASK_SLOPE": mask_slope,
        "WIDE": _is_wide(problem),
        "BLOCK_P": block_p,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
    }
    grid = splits * tiles_k * tiles_t
    return WgradPlan(
        problem,
        problem.k,
        problem.c,
        "direct",
        None,
        splits,
        False,
        grid,
        integers,
        constants,
        warps=4,
        stages=2,
    )


def _splits(rows: int, block: int, tiles: int, multiprocessors: int) -> int:
    """Chunks of rows that give every multiprocessor two programs, none below eight blocks."""
    wanted = ceil_div(2 * multiprocessors, tiles)
    return max(1, min(wanted, rows // (8 * block), 64))


# Passes over whole tensors ------------------------------------------------------------------


@dataclass(frozen=True)
class MaskPlan:
    """One launch of mask_kernel over a gradient [rows, columns], and the sum over its splits."""

    store: bool
    sums: bool
    splits: int
    grid: int
    integers: Mapping[str, int]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2


def plan_mask(
    rows: int, columns: int, operands: Operands, slope: float, *, store: bool, sums: bool
) -> MaskPlan:
    """A pass over a gradient that masks it, sums it over its pixels, or both."""
    block_n = power_of_two(columns, 8, 64)
    block_m = 2048 // block_n
    tiles = ceil_div(columns, block_n)
    splits = _splits(_hint(rows), block_m, tiles, operands.device.multiprocessors)
    align = _alignment(columns, operands.itemsize)
    integers = {
        "rows": rows,
        "columns_units": columns // align,
        "chunk": ceil_div(ceil_div(rows, splits), block_m) * block_m,
        "tiles": tiles,
    }
    constants = {
        "ALIGN": align,
        "MASK_SLOPE": slope,
        "WIDE": _needs_int64(rows * columns),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return MaskPlan(store, sums, splits, splits * tiles, integers, constants)


def mask_first(
    problem: ConvProblem, *, transposed: bool, need_input: bool, need_weight: bool, need_bias: bool
) -> bool:
    """Whether a pass of its own should mask the gradient, or the kernels where they load it.

    The pass reads gradient and output and writes one tensor, from and to DRAM. Kernels read the
    output once more for each time they load the gradient, mostly from L2, taken as half as dear;
    and a transposed convolution needs a pass for its bias gradient anyway.
    """
    problem = problem.folded()
    per_pixel = problem.r * problem.s / (math.prod(problem.stride) if transposed else 1)
    loads = 0.0
    if need_input:
        loads += per_pixel
    if need_weight:
        loads += per_pixel if transposed else problem.r * problem.s
    separate_bias = need_bias and (transposed or not need_weight)
    return loads / 2 + 2 * separate_bias > 3


@dataclass(frozen=True)
class PointwisePlan:
    """One launch of bias_activation_kernel."""

    grid: int
    integers: Mapping[str, int]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2


def plan_bias_activation(
    shape: Sequence[int],  # [N, C, P, Q]
    channels_last: bool,
    slope: float,
) -> PointwisePlan:
    """Bias and activation over a tensor dense in channels_last, or contiguous."""
    n, c, p, q = shape
    rows, columns = (n * p * q, c) if channels_last else (n * c, p * q)
    block_n = power_of_two(_hint(columns), 8, 256)
    block_m = 2048 // block_n
    tiles = ceil_div(columns, block_n)
    integers = {"rows": rows, "columns": columns, "channels": c, "tiles": tiles}
    constants = {
        "ROWS_ARE_CHANNELS": not channels_last,
        "SLOPE": slope,
        "WIDE": _needs_int64(rows * columns),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return PointwisePlan(ceil_div(rows, block_m) * tiles, integers, constants)
