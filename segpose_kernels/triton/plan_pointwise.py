# SPDX-License-Identifier: BSD-3-Clause
"""Plans of passes over whole tensors: masks and sums of a gradient, bias and activation,
filters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import Launch, Operands, alignment, hint, needs_int64, split_count
from .problem import ConvProblem, concrete
from .tiles import ceil_div, power_of_two

__all__ = [
    "MaskPlan",
    "PointwisePlan",
    "mask_first",
    "plan_bias_activation",
    "plan_mask",
    "plan_reduced_last",
]

_FILTER_BLOCK = 64


@dataclass(frozen=True)
class MaskPlan(Launch):
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
    splits = split_count(hint(rows), block_m, tiles, operands.device.multiprocessors)
    align = alignment(columns, operands.itemsize)
    integers = {
        "rows": rows,
        "columns_units": columns // align,
        "chunk": ceil_div(ceil_div(rows, splits), block_m) * block_m,
        "tiles": tiles,
    }
    constants = {
        "ALIGN": align,
        "MASK_SLOPE": slope,
        "WIDE": needs_int64(rows * columns),
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
class PointwisePlan(Launch):
    """One launch of bias_activation_kernel or reduced_last_kernel."""

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
    block_n = power_of_two(hint(columns), 8, 256)
    block_m = 2048 // block_n
    tiles = ceil_div(columns, block_n)
    integers = {"rows": rows, "columns": columns, "channels": c, "tiles": tiles}
    constants = {
        "ROWS_ARE_CHANNELS": not channels_last,
        "SLOPE": slope,
        "WIDE": needs_int64(rows * columns),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return PointwisePlan(ceil_div(rows, block_m) * tiles, integers, constants)


def _plan_reduced_last(
    w_shape: tuple[int, ...],  # [K, C/groups, R, S]
    shape: tuple[int, ...],  # [groups, C/groups, R, S, K/groups] of the padded and folded problem
    channels_last: bool,
) -> PointwisePlan:
    """A filter dense in channels_last, or contiguous, with its filters side by side."""
    filters, w_channels, w_r, w_s = w_shape
    groups, channels, r, s, red = shape
    row = channels * r * s
    tiles_row, tiles_red = ceil_div(row, _FILTER_BLOCK), ceil_div(red, _FILTER_BLOCK)
    integers = {
        "filters": filters,
        "red": red,
        "row": row,
        "w_channels": w_channels,
        "w_taps": w_r * w_s,
        "channels": channels,
        "taps": r * s,
        "tiles_row": tiles_row,
        "tiles_red": tiles_red,
    }
    constants = {
        "CHANNELS_LAST": channels_last,
        "WIDE": needs_int64(math.prod(shape)),
        "BLOCK": _FILTER_BLOCK,
    }
    return PointwisePlan(groups * tiles_row * tiles_red, integers, constants)


_known_reduced_last = functools.lru_cache(maxsize=4096)(_plan_reduced_last)


def plan_reduced_last(
    w_shape: tuple[int, ...], shape: tuple[int, ...], channels_last: bool
) -> PointwisePlan:
    """See `_plan_reduced_last`. Extents that are symbols, while tracing, are not remembered."""
    plan = _known_reduced_last if concrete(*w_shape, *shape) else _plan_reduced_last
    return plan(w_shape, shape, channels_last)
