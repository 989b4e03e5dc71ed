# SPDX-License-Identifier: BSD-3-Clause
"""Tile shapes of the tensor-core kernels: candidates, and what a device can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .device import Device

__all__ = [
    "Demands",
    "Tile",
    "ceil_div",
    "family_of",
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

    @property
    def label(self) -> str:
        """Short and unique, for names of kernels."""
        return f"{self.m}x{self.n}x{self.k}-w{self.warps}s{self.stages}"

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"


# Candidates for the architectures of a family: 8 for mma.sync (8.x, 12.x), 9 for wgmma and tcgen05
# (9.x and 10.x). On 8.0 and 9.0 no kernel of docs/kernels.md spills; beside them, on 9.0, wgrad
# with ragged or single channels and TF32 with 64-bit offsets do, by at most 148 bytes.
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
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 6),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 32, 64, 4, 4),
        Tile(64, 32, 128, 4, 4),
        Tile(64, 16, 64, 4, 4),
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
        Tile(128, 128, 32, 8, 4),
        Tile(64, 128, 32, 4, 3),
        Tile(128, 64, 32, 4, 4),
        Tile(64, 64, 32, 4, 6),
        Tile(128, 32, 32, 4, 3),
        Tile(64, 32, 64, 4, 4),
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
# These spill where the filter lies along gemm_k.
_GATHER_ACROSS: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("half", 9): (Tile(128, 128, 64, 4, 3),),
}

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
        Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 64, 64, 4, 3),
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


def family_of(device: Device) -> int:
    return 9 if device.capability[0] >= 9 and device.capability[0] != 12 else 8


@dataclass(frozen=True)
class Demands:
    """What a pass asks of a tile."""

    itemsize: int
    precision: str  # of float32 products: "tf32" or "ieee"
    device: Device
    masked: bool = False  # an operand is masked where it is loaded
    flat: bool = False  # gemm_k runs over single elements
    across: bool = False  # the filter lies along gemm_n
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
    family = family_of(demands.device)
    tiles = _FLAT_GATHER[demands.kind] if demands.flat else _GATHER[demands.kind, family]
    if demands.across and not demands.flat:
        tiles += _GATHER_ACROSS.get((demands.kind, family), ())
    widest = power_of_two(cols, 16, 256)
    result: dict[Tile, None] = {}
    for tile in _fitting(tiles, demands):
        if tile.n <= widest:
            result[replace(tile, k=min(tile.k, power_of_two(red, 16, 128)))] = None
    return list(result)


def wgrad_candidates(rows: int, cols: int, demands: Demands) -> list[Tile]:
    """Tiles for wgrad with `rows` filters of `cols` elements."""
    tallest, widest = power_of_two(rows, 16, 256), power_of_two(cols, 16, 256)
    return [
        tile
        for tile in _fitting(_WGRAD[demands.kind, family_of(demands.device)], demands)
        if tile.m <= tallest and tile.n <= widest
    ]
