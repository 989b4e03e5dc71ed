# SPDX-License-Identifier: BSD-3-Clause
"""Plans of wgrad: the reduction over output pixels in chunks that are added in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .plan import (
    Choice,
    Launch,
    Operands,
    alignment,
    hint,
    is_narrow,
    is_wide,
    padded,
    split_count,
)
from .problem import ConvProblem
from .tile_costs import best_wgrad_tile
from .tiles import Demands, Tile, ceil_div, power_of_two, wgrad_candidates

__all__ = ["WgradPlan", "plan_wgrad", "wgrad_tiles"]


@dataclass(frozen=True)
class WgradPlan(Launch):
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
            alignment(channels, operands.itemsize) * operands.itemsize
            for channels in (problem.k_per_group, problem.c_per_group)
        )
        < 8
    )
    return Demands(
        operands.itemsize,
        operands.precision,
        operands.device,
        masked=masked,
        accumulators=16 if odd else 64 if masked or is_wide(problem) else 128,
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
    if is_narrow(problem, "fprop", operands.dtype):
        return _plan_direct_wgrad(problem, operands, mask_x, mask_slope)
    if problem.groups == 1:
        problem = padded(padded(problem, "fprop", operands.itemsize), "dgrad", operands.itemsize)
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
            hint(pixels),
            demands,
        )
    flat, tiles_n = _wgrad_columns(problem, tile.n)
    tiles_k = ceil_div(problem.k_per_group, tile.m)
    k_align = alignment(problem.k_per_group, operands.itemsize)
    c_align = alignment(problem.c_per_group, operands.itemsize)
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
        "EVEN_M": problem.k_per_group % tile.m == 0,
        "EVEN_N": not flat and problem.c_per_group % tile.n == 0,
        "MASK_X": mask_x and mask_slope != 1,
        "MASK_SLOPE": mask_slope,
        "PRECISION": operands.precision,
        "WIDE": is_wide(problem),
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
    splits = split_count(
        hint(integers["pixels"]), block_p, tiles_k * tiles_t, operands.device.multiprocessors
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
        "WIDE": is_wide(problem),
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
