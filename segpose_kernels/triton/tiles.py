# SPDX-License-Identifier: BSD-3-Clause
"""Tile shapes of the tensor-core kernels: candidates, what a device can hold, and which is best.

The choice without tuning minimises a count of cycles from published rates (`_RATES`); it has to
rank tiles, not to predict times. `segpose tune` and `segpose_kernels.benchmark` measure instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .device import Device

__all__ = ["Tile", "arithmetic", "best_gather_tile", "best_wgrad_tile", "ceil_div", "power_of_two"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """Smallest power of two >= n, within [low, high]; these are powers of two."""
    result = low
    while result < n and result < high:
        result *= 2
    return result


@dataclass(frozen=True)
class Tile:
    """BLOCK_M x BLOCK_N results of one program, in steps of BLOCK_K."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, masked: bool) -> int:
        """Shared memory of the pipeline's buffers, an upper bound.

        A masked operand has its mask beside it, and counts as A, the larger of the two.
        """
        a, b = self.m * self.k, self.n * self.k
        return self.stages * (a + b + (max(a, b) if masked else 0)) * itemsize

    @property
    def accumulators(self) -> int:
        """Registers a thread needs for its float32 results alone."""
        return self.m * self.n // (32 * self.warps)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"


def arithmetic(itemsize: int, precision: str) -> str:
    """Which units multiply: "half" (fp16, bf16), "tf32" or "ieee" (float32 on CUDA cores)."""
    return "half" if itemsize == 2 else precision


# Candidates, each compiled without spilling for every variant of its kernel on the architectures
# named. "8" is mma.sync, "9" wgmma and later.
_GATHER: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("half", 8): (
        Tile(128, 128, 32, 8, 4),
        Tile(128, 64, 32, 4, 4),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 32, 32, 4, 4),
        Tile(64, 32, 64, 4, 3),
        Tile(128, 16, 32, 4, 4),
    ),
    ("half", 9): (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 32, 64, 4, 3),
        Tile(64, 32, 64, 4, 3),
        Tile(128, 16, 64, 4, 3),
    ),
    ("tf32", 8): (
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(128, 32, 32, 4, 3),
        Tile(64, 32, 32, 4, 3),
        Tile(128, 16, 32, 4, 3),
    ),
    ("tf32", 9): (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 4, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(128, 32, 32, 4, 3),
        Tile(64, 32, 32, 4, 3),
        Tile(128, 16, 32, 4, 3),
    ),
    ("ieee", 8): (
        Tile(64, 64, 16, 4, 3),
        Tile(64, 32, 16, 4, 3),
        Tile(64, 16, 16, 4, 3),
    ),
}
_GATHER["ieee", 9] = _GATHER["ieee", 8]

_WGRAD: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("half", 8): (
        Tile(128, 128, 32, 8, 4),
        Tile(64, 128, 32, 8, 4),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 32, 64, 4, 3),
        Tile(32, 64, 64, 4, 3),
        Tile(16, 64, 64, 4, 3),
        Tile(32, 32, 64, 4, 3),
        Tile(16, 16, 64, 4, 3),
    ),
    ("half", 9): (
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 32, 64, 4, 3),
        Tile(32, 64, 64, 4, 3),
        Tile(16, 64, 64, 4, 3),
        Tile(32, 32, 64, 4, 3),
        Tile(16, 16, 64, 4, 3),
    ),
    ("tf32", 8): (
        Tile(64, 64, 32, 4, 3),
        Tile(64, 32, 32, 4, 3),
        Tile(32, 64, 32, 4, 3),
        Tile(16, 64, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(16, 16, 32, 4, 3),
    ),
    ("ieee", 8): (
        Tile(64, 64, 16, 4, 3),
        Tile(64, 32, 16, 4, 3),
        Tile(32, 64, 16, 4, 3),
        Tile(16, 64, 16, 4, 3),
        Tile(32, 32, 16, 4, 3),
        Tile(16, 16, 16, 4, 3),
    ),
}
_WGRAD["tf32", 9] = _WGRAD["tf32", 8]
_WGRAD["ieee", 9] = _WGRAD["ieee", 8]

# Multiply-adds per cycle and multiprocessor: whitepapers of A100 and H100. mma.sync reaches about
# 60% of wgmma's rate on 9.0, and a tile below 64 rows cannot use wgmma.
_RATES = {("half", 8): 1024, ("tf32", 8): 512, ("ieee", 8): 64}
_RATES |= {("half", 9): 2048, ("tf32", 9): 1024, ("ieee", 9): 128}
_WGMMA_ROWS = 64
_MMA_SYNC_SHARE = 0.6
# Bytes per cycle that a multiprocessor gets from L2, cycles to fill and drain a pipeline, and bytes
# per cycle of DRAM for all of them together.
_L2_BYTES = 32
_START_CYCLES = 1500
_DRAM_BYTES = 1500


def _family(device: Device) -> int:
    return 9 if device.capability[0] >= 9 and device.capability[0] != 12 else 8


def _fitting(tiles: Iterable[Tile], itemsize: int, masked: bool, device: Device) -> Iterator[Tile]:
    """Tiles whose pipeline fits into shared memory, with fewer stages where that helps."""
    for tile in tiles:
        for stages in range(tile.stages, 1, -1):
            fewer = replace(tile, stages=stages)
            if fewer.shared_bytes(itemsize, masked) <= device.shared_bytes:
                yield fewer
                break


def gather_candidates(
    cols: int, red: int, itemsize: int, precision: str, masked: bool, device: Device
) -> list[Tile]:
    """Tiles for fprop and dgrad with `cols` destination and `red` source channels in a group."""
    key = arithmetic(itemsize, precision), _family(device)
    widest = power_of_two(cols, 16, 256)
    result: dict[Tile, None] = {}
    for tile in _fitting(_GATHER[key], itemsize, masked, device):
        if tile.n <= widest:
            result[replace(tile, k=min(tile.k, power_of_two(red, 16, 64)))] = None
    return list(result)


def wgrad_candidates(
    rows: int, cols: int, itemsize: int, precision: str, masked: bool, device: Device
) -> list[Tile]:
    """Tiles for wgrad with `rows` filters and `cols` columns of them."""
    key = arithmetic(itemsize, precision), _family(device)
    tallest, widest = power_of_two(rows, 16, 128), power_of_two(cols, 16, 128)
    return [
        tile
        for tile in _fitting(_WGRAD[key], itemsize, masked, device)
        if tile.m <= tallest and tile.n <= widest
    ]


def _program_cycles(tile: Tile, depth: int, itemsize: int, precision: str, device: Device) -> float:
    """Cycles of one program that reduces over `depth`."""
    family = _family(device)
    rate: float = _RATES[arithmetic(itemsize, precision), family]
    if family == 9 and precision != "ieee" and (tile.m < _WGMMA_ROWS or tile.warps < 4):
        rate *= _MMA_SYNC_SHARE
    steps = ceil_div(depth, tile.k)
    compute = tile.m * tile.n * tile.k / rate
    loads = (tile.m + tile.n) * tile.k * itemsize / _L2_BYTES
    return _START_CYCLES + steps * max(compute, loads)


def best_gather_tile(
    candidates: list[Tile],
    pixels: int,  # of one phase
    cols: int,
    depth: int,  # of an average phase
    programs: int,  # phases * groups
    itemsize: int,
    precision: str,
    device: Device,
) -> Tile:
    """The candidate with the fewest cycles."""

    def cycles(tile: Tile) -> float:
        tiles = ceil_div(pixels, tile.m) * ceil_div(cols, tile.n) * programs
        waves = ceil_div(tiles, device.multiprocessors)
        return waves * _program_cycles(tile, depth, itemsize, precision, device)

    return min(candidates, key=cycles)


def best_wgrad_tile(
    candidates: list[Tile],
    rows: int,
    column_tiles: dict[int, int],  # by tile.n
    outputs: int,  # elements of the filter gradient
    programs: int,  # groups
    pixels: int,
    itemsize: int,
    precision: str,
    device: Device,
) -> tuple[Tile, int]:
    """The candidate and the number of splits with the fewest cycles, partial sums included."""

    def cycles(choice: tuple[Tile, int]) -> float:
        tile, splits = choice
        tiles = ceil_div(rows, tile.m) * column_tiles[tile.n] * programs * splits
        waves = ceil_div(tiles, device.multiprocessors)
        chunk = ceil_div(pixels, splits)
        total = waves * _program_cycles(tile, chunk, itemsize, precision, device)
        if splits > 1:
            total += _START_CYCLES + 8 * outputs * splits / _DRAM_BYTES
        return total

    choices = [
        (tile, splits)
        for tile in candidates
        for splits in (1, 2, 4, 8, 16, 32, 64)
        if splits == 1 or pixels >= 4 * splits * tile.k
    ]
    return min(choices, key=cycles)
