# SPDX-License-Identifier: BSD-3-Clause
"""Which tile is best without measuring: cycles of a launch, by published rates and a fit.

The model counts rounds of programs on a multiprocessor and steps along gemm_k. A step takes as long
as its products or its loads, shared among the programs that are resident together, or, with few of
them, as long as memory takes to answer, spread over the stages in flight. Rates are those of
whitepapers; the other figures were fitted to 8,000 timings of 51 layers in float16 and TF32 on an
H200, where the chosen tile takes 2 to 4% longer than the best of all that were measured, in wgrad 7
to 9%, in the geometric mean.
`segpose tune` and `segpose_kernels.benchmark` measure instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .tiles import Demands, Tile, ceil_div, family_of

__all__ = ["best_gather_tile", "best_wgrad_tile"]

# Multiply-adds per cycle and multiprocessor: whitepapers of A100 and H100. mma.sync reaches about
# 60% of wgmma's rate on 9.0, and a tile below 64 rows cannot use wgmma.
_RATES = {("half", 8): 1024, ("tf32", 8): 512, ("ieee", 8): 64}
_RATES |= {("half", 9): 2048, ("tf32", 9): 1024, ("ieee", 9): 128}
_WGMMA_ROWS = 64
_MMA_SYNC_SHARE = 0.6


@dataclass(frozen=True)
class _Costs:
    """Of one kernel, all but the shares in cycles.

    `share` of the published rate is reached by tiles above 64 rows, `low_share` by others; `l2`
    bytes come from L2 in a cycle, `positions` positions of B are computed in one (per two bytes of
    an element). `load` is the way from memory, `step` a step besides products and loads, `start`
    the start and the end of a program.
    """

    share: float
    low_share: float
    l2: float
    positions: float
    load: float
    step: float
    start: float


_GATHER = _Costs(0.8, 0.6, 56, math.inf, 1400, 80, 5000)
_WGRAD = _Costs(0.8, 0.4, 40, 68, 1300, 350, 3000)
# Registers of a multiprocessor, and of a thread besides its results.
_REGISTERS = 65_536
_OTHER_REGISTERS = 64
# A sum over splits: cycles of its launch, and bytes per cycle of DRAM.
_REDUCE_CYCLES = 7000
_DRAM_BYTES = 4000


def _resident(tile: Tile, demands: Demands) -> int:
    """Programs that a multiprocessor holds."""
    shared = tile.shared_bytes(demands.itemsize, demands.masked) + 1024
    registers = 32 * tile.warps * min(255, tile.accumulators + _OTHER_REGISTERS)
    return max(1, min(demands.device.shared_bytes // shared, _REGISTERS // registers))


def _cycles(costs: _Costs, tile: Tile, programs: int, steps: int, demands: Demands) -> float:
    """Cycles of a launch of so many programs with so many steps each."""
    family = family_of(demands.device)
    rate: float = _RATES[demands.kind, family]
    rate *= costs.share if tile.m > _WGMMA_ROWS else costs.low_share
    if family == 9 and demands.kind != "ieee" and (tile.m < _WGMMA_ROWS or tile.warps < 4):
        rate *= _MMA_SYNC_SHARE
    products = tile.m * tile.n * tile.k / rate
    loads = (tile.m + tile.n) * tile.k * demands.itemsize / costs.l2
    positions = tile.n * tile.k * demands.itemsize / 2 / costs.positions
    alone = costs.load / max(1, tile.stages - 1)

    def round_of(together: int) -> float:
        step = max(alone, together * max(products, loads, positions) + costs.step)
        return costs.start + steps * step

    resident = _resident(tile, demands)
    multiprocessors = demands.device.multiprocessors
    rounds, left = divmod(programs, resident * multiprocessors)
    last = round_of(ceil_div(left, multiprocessors)) if left else 0
    return rounds * round_of(resident) + last


def best_gather_tile(
    candidates: list[Tile],
    pixels: int,  # of one phase
    cols: int,
    taps: int,  # of an average phase; 1 where gemm_k is flat
    red: int,  # channels of a tap; all of gemm_k where it is flat
    programs: int,  # phases * groups
    demands: Demands,
) -> Tile:
    """The candidate with the fewest cycles."""

    def cycles(tile: Tile) -> tuple[float, int]:
        tiles = ceil_div(pixels, tile.m) * ceil_div(cols, tile.n) * programs
        total = _cycles(_GATHER, tile, tiles, taps * ceil_div(red, tile.k), demands)
        return total, tile.m * tile.n  # where memory is the limit, more programs ask it

    return min(candidates, key=cycles)


def best_wgrad_tile(
    candidates: list[Tile],
    rows: int,
    column_tiles: dict[int, int],  # by tile.n
    outputs: int,  # elements of the filter gradient
    programs: int,  # groups
    pixels: int,
    demands: Demands,
) -> tuple[Tile, int]:
    """The candidate and the number of splits with the fewest cycles, partial sums included."""

    multiprocessors = demands.device.multiprocessors

    def tiles_of(tile: Tile) -> int:
        return ceil_div(rows, tile.m) * column_tiles[tile.n] * programs

    def cycles(choice: tuple[Tile, int]) -> float:
        tile, splits = choice
        steps = ceil_div(ceil_div(pixels, splits), tile.k)
        total = _cycles(_WGRAD, tile, tiles_of(tile) * splits, steps, demands)
        if splits > 1:
            total += _REDUCE_CYCLES + 8 * outputs * splits / _DRAM_BYTES
        return total

    def splits_of(tile: Tile) -> list[int]:
        """Powers of two, and what fills the device up to four times; four steps each at least."""
        filling = (waves * multiprocessors // tiles_of(tile) for waves in (1, 2, 3, 4))
        most = min(256, pixels // (4 * tile.k))
        return [1, *(s for s in (2, 4, 8, 16, 32, 64, 128, 256, *filling) if 1 < s <= most)]

    return min(((tile, s) for tile in candidates for s in splits_of(tile)), key=cycles)
