# SPDX-License-Identifier: BSD-3-Clause
"""Plans of fprop and dgrad: each destination pixel gathers from the source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .plan import (
    NARROW,
    Choice,
    Direction,
    Epilogue,
    Launch,
    Operands,
    alignment,
    gather_shape,
    hint,
    is_narrow,
    is_wide,
    padded,
)
from .problem import ConvProblem
from .tile_costs import best_gather_tile
from .tiles import Demands, Tile, ceil_div, gather_candidates, power_of_two

__all__ = ["GatherPlan", "gather_tiles", "plan_gather"]


@dataclass(frozen=True)
class GatherPlan(Launch):
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


def _gather_demands(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> Demands:
    red, cols = gather_shape(problem, direction)
    masked = epilogue.mask_slope != 1
    # A result that is not stored in a vector has a pointer of its own.
    odd = alignment(cols, operands.itemsize) * operands.itemsize < 8
    most = 64 if masked or is_wide(problem) else 128
    if odd:
        most = 16 if operands.itemsize == 4 and operands.precision == "ieee" else 32
    return Demands(
        operands.itemsize,
        operands.precision,
        operands.device,
        masked=masked,
        flat=_is_flat(red, operands.itemsize),
        across=direction == "dgrad" and operands.itemsize == 2 and not odd,
        accumulators=most,
    )


def _is_flat(red: int, itemsize: int) -> bool:
    """Whether gemm_k runs over (tap, channel) pairs: few channels, or no whole vectors of them."""
    return red < NARROW or alignment(red, itemsize) * itemsize < 16


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
    if is_narrow(problem, direction, operands.dtype):
        return _plan_direct(problem, direction, operands, epilogue)
    bias_period = problem.k if direction == "fprop" else problem.c
    if problem.groups == 1:
        problem = padded(problem, direction, operands.itemsize)
    channels = problem.k if direction == "dgrad" else problem.c
    problem = problem.folded()
    red, cols = gather_shape(problem, direction)
    phases = _phases(problem, direction)
    pixels = _phase_pixels(problem, direction)
    demands = _gather_demands(problem, direction, operands, epilogue)
    taps = ceil_div(problem.r * problem.s, phases)
    tile = choice.tile if choice is not None else None
    if tile is None:
        tile = best_gather_tile(
            gather_tiles(problem, direction, operands, epilogue),
            hint(pixels),
            cols,
            1 if demands.flat else taps,
            taps * red if demands.flat else red,
            phases * problem.groups,
            demands,
        )
    # A folded dgrad repeats the bias over its taps, and vectors must not cross the repeats.
    cols_align = alignment(math.gcd(cols, bias_period), operands.itemsize)
    red_align = alignment(red, operands.itemsize)
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
        "WIDE": is_wide(problem),
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
        "WIDE": is_wide(problem),
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
