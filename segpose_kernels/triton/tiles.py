# SPDX-License-Identifier: BSD-3-Clause
"""Tile shapes of the tensor-core kernels: candidates, what a device can hold, and which is best.

The choice without tuning minimises a count of cycles from published rates (`_RATES`); it has to
rank tiles, not to predict times. `segpose tune` and `segpose_kernels.benchmark` measure instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .device import Device

__all__ = [
    "Demands",
    "Tile",
    "best_gather_tile",
    "best_wgrad_tile",
    "ceil_div",
    "gather_candidates",
    "power_of_two",
    "wgrad_candidates",
]


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
        """Registers of a thread for its float32 results."""
        return self.m * self.n // (32 * self.warps)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"


# Candidates, each compiled without spilling for every variant of its kernel on the architectures of
# its family: 8 for mma.sync (8.x and 12.x), 9 for wgmma and tcgen05 (9.x and 10.x).
_GATHER: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("half", 8): (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 32, 4, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(128, 32, 32, 4, 4),
        Tile(64, 32, 32, 4, 4),
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
        Tile(128, 64, 32, 8, 2),
        Tile(64, 64, 16, 4, 4),
        Tile(128, 32, 16, 4, 4),
        Tile(64, 32, 32, 4, 3),
        Tile(128, 16, 32, 4, 3),
    ),
    ("tf32", 9): (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(128, 32, 32, 4, 3),
        Tile(64, 32, 32, 4, 3),
        Tile(128, 16, 32, 4, 3),
    ),
    ("ieee", 8): (
        Tile(64, 128, 16, 8, 2),
        Tile(32, 64, 16, 4, 3),
        Tile(64, 32, 16, 4, 3),
        Tile(64, 16, 16, 4, 3),
    ),
}
_GATHER["ieee", 9] = _GATHER["ieee", 8]

# Flat tiles load single elements and keep them in registers on the way: few stages, many warps.
_FLAT_GATHER: dict[str, tuple[Tile, ...]] = {
    "half": (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 4, 2), Tile(64, 16, 32, 4, 2)),
    "tf32": (Tile(64, 64, 16, 8, 2), Tile(64, 32, 16, 8, 2), Tile(64, 16, 16, 4, 2)),
    "ieee": (Tile(64, 64, 16, 8, 1), Tile(64, 32, 16, 8, 2), Tile(64, 16, 16, 8, 2)),
}

_WGRAD: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("half", 8): (
        Tile(128, 128, 32, 8, 4),
        Tile(64, 128, 32, 8, 3),
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
    # wgmma takes 32-bit operands along gemm_k only, and here both lie across it: the compiler then
    # transposes word by word with 8-way bank conflicts. These tiles make it use mma.sync.
    ("tf32", 9): (
        Tile(32, 128, 32, 4, 3),
        Tile(64, 64, 32, 2, 3),
        Tile(32, 64, 32, 4, 3),
        Tile(16, 64, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(16, 16, 32, 4, 3),
    ),
    ("ieee", 8): (
        Tile(64, 64, 16, 8, 3),
        Tile(64, 32, 16, 4, 3),
        Tile(32, 64, 16, 4, 3),
        Tile(16, 64, 16, 4, 3),
        Tile(32, 32, 16, 4, 3),
        Tile(16, 16, 16, 4, 3),
    ),
}
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


@dataclass(frozen=True)
class Demands:
    """What a pass asks of a tile."""

    itemsize: int
    precision: str  # of float32 products: "tf32" or "ieee"
    device: Device
    masked: bool = False  # an operand is masked where it is loaded
    flat: bool = False  # gemm_k runs over single elements
    accumulators: int = 128  # most results that a thread may hold

    @property
    def kind(self) -> str:
        """Which units multiply: "half" (fp16, bf16), "tf32" or "ieee" (float32 on CUDA cores)."""
        return "half" if self.itemsize == 2 else self.precision


def _fitting(tiles: Iterable[Tile], demands: Demands) -> Iterator[Tile]:
    """Tiles that registers and shared memory hold, with fewer stages where that helps."""
    for tile in tiles:
        if tile.accumulators > demands.accumulators:
            continue
        for stages in range(tile.stages, 1, -1):
            fewer = replace(tile, stages=stages)
            shared = fewer.shared_bytes(demands.itemsize, demands.masked)
            if shared <= demands.device.shared_bytes:
                yield fewer
                break


def gather_candidates(cols: int, red: int, demands: Demands) -> list[Tile]:
    """Tiles for fprop and dgrad with `cols` destination channels in a group.

    They reduce over `red` source channels, or over that many (tap, channel) pairs if flat.
    """
    family = _family(demands.device)
    tiles = _FLAT_GATHER[demands.kind] if demands.flat else _GATHER[demands.kind, family]
    widest = power_of_two(cols, 16, 256)
    result: dict[Tile, None] = {}
    for tile in _fitting(tiles, demands):
        if tile.n <= widest:
            result[replace(tile, k=min(tile.k, power_of_two(red, 16, 64)))] = None
    return list(result)


def wgrad_candidates(rows: int, cols: int, demands: Demands) -> list[Tile]:
    """Tiles for wgrad with `rows` filters of `cols` elements."""
    tallest, widest = power_of_two(rows, 16, 128), power_of_two(cols, 16, 128)
    return [
        tile
        for tile in _fitting(_WGRAD[demands.kind, _family(demands.device)], demands)
        if tile.m <= tallest and tile.n <= widest
    ]


def _program_cycles(tile: Tile, depth: int, demands: Demands) -> float:
    """Cycles of one program that reduces over `depth`."""
    family = _family(demands.device)
    rate: float = _RATES[demands.kind, family]
    if family == 9 and demands.kind != "ieee" and (tile.m < _WGMMA_ROWS or tile.warps < 4):
        rate *= _MMA_SYNC_SHARE
    steps = ceil_div(depth, tile.k)
    compute = tile.m * tile.n * tile.k / rate
    loads = (tile.m + tile.n) * tile.k * demands.itemsize / _L2_BYTES
    return _START_CYCLES + steps * max(compute, loads)


def best_gather_tile(
    candidates: list[Tile],
    pixels: int,  # of one phase
    cols: int,
    depth: int,  # of an average phase
    programs: int,  # phases * groups
    demands: Demands,
) -> Tile:
    """The candidate with the fewest cycles."""

    def cycles(tile: Tile) -> float:
        tiles = ceil_div(pixels, tile.m) * ceil_div(cols, tile.n) * programs
        waves = ceil_div(tiles, demands.device.multiprocessors)
        return waves * _program_cycles(tile, depth, demands)

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
        waves = ceil_div(tiles_of(tile) * splits, multiprocessors)
        total = waves * _program_cycles(tile, ceil_div(pixels, splits), demands)
        if splits > 1:
            total += _START_CYCLES + 8 * outputs * splits / _DRAM_BYTES
        return total

    def splits_of(tile: Tile) -> list[int]:
        """Powers of two, and what fills the device once and twice; no split below four steps."""
        filling = (waves * multiprocessors // tiles_of(tile) for waves in (1, 2))
        most = min(64, pixels // (4 * tile.k))
        return [1, *(s for s in (2, 4, 8, 16, 32, 64, *filling) if 1 < s <= most)]

    return min(((tile, s) for tile in candidates for s in splits_of(tile)), key=cycles)
