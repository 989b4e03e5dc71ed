# SPDX-License-Identifier: BSD-3-Clause
"""What the machine itself can do at most, measured in the same run: arithmetic and memory.

With these every time stands beside the one that the machine allows: the longer of doing all
products of the direct definition and of moving each tensor once. An algorithm with fewer products
(Winograd, FFT) may beat it.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Limits", "measure_limits"]

# Bytes in motion (read and written) of the copies, from inside a core's cache to far outside.
_COPY_BYTES = tuple(2**power for power in range(18, 29, 2))
_SMALLEST_BANDWIDTH_CALL = 1e-3

# Units that a process held to an instruction set has; all of them where it is not named here.
_UNITS: dict[str, tuple[str, ...]] = {"generic": ("vector",), "avx2": ("vector", "avx2")}


@dataclass(frozen=True)
class Limits:
    """Limits of a device.

    Attributes:
        flops: operations a second by dtype name, all threads together; a dtype without a unit of
            its own is computed in float32.
        bandwidth: (bytes in motion, bytes a second) of copies, by growing size.
        source: how they were found, for a caption.
    """

    flops: dict[str, float]
    bandwidth: tuple[tuple[int, float], ...]
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON gives it back."""
        return asdict(self) | {"bandwidth": [list(point) for point in self.bandwidth]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Limits:
        bandwidth = tuple((int(size), float(rate)) for size, rate in data["bandwidth"])
        return cls(dict(data["flops"]), bandwidth, data["source"])

    def peak(self, dtype: str) -> float:
        """Operations a second in a dtype."""
        return max(self.flops.get(dtype, 0.0), self.flops["float32"])

    def memory_rates(self) -> tuple[float, ...]:
        """Bandwidth of memory, and of a cache where small copies show one: those that are slower
        than large ones wait for their launch.
        """
        smallest, largest = self.bandwidth[0][1], self.bandwidth[-1][1]
        return (largest, smallest) if smallest > largest else (largest,)

    def bytes_per_second(self, moved: float) -> float:
        """Bandwidth for a call that moves so many bytes, between the measured sizes."""
        sizes = [math.log(size) for size, _ in self.bandwidth]
        at = math.log(max(moved, 1.0))
        if at <= sizes[0]:
            return self.bandwidth[0][1]
        for i in range(1, len(sizes)):
            if at <= sizes[i]:
                share = (at - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
                low, high = self.bandwidth[i - 1][1], self.bandwidth[i][1]
                return float(low * (high / low) ** share)
        return self.bandwidth[-1][1]

    def floor(self, dtype: str, flops: float, moved: float | None) -> float:
        """Least seconds of a call with so many operations and bytes."""
        arithmetic = flops / self.peak(dtype)
        return (
            arithmetic if moved is None else max(arithmetic, moved / self.bytes_per_second(moved))
        )


def measure_limits(
    device: str, threads: int, *, isa: str | None = None, seconds: float = 0.2
) -> Limits | None:
    """Limits of the CPU with so many threads, or of the GPU; None if the package was not built.

    On CPU arithmetic is counted in registers by `_limits`, on every thread at once; bandwidth is
    that of torch's copy. On GPU arithmetic is the best of torch's matrix products. With `isa`
    "avx2" or "generic" the units of newer instruction sets do not count.
    """
    if device == "cuda":
        return _cuda_limits(seconds)
    try:
        native = importlib.import_module("segpose_kernels._limits")
    except ImportError:
        return None
    best: dict[str, float] = {}
    units = {}
    for unit, dtype in native.units():
        if unit not in _UNITS.get(isa or "", (unit,)):
            continue
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(native.flops_per_second, unit, seconds) for _ in range(threads)]
            together = sum(job.result() for job in jobs)
        if together > best.get(dtype, 0.0):
            best[dtype], units[dtype] = together, unit
    bandwidth = tuple((size, _copy_rate(size, "cpu", seconds)) for size in _COPY_BYTES)
    how = ", ".join(f"{dtype} by {unit}" for dtype, unit in units.items())
    return Limits(best, bandwidth, f"{how} in registers; bandwidth of torch's copy")


def _copy_rate(moved: int, device: str, seconds: float) -> float:
    """Bytes a second, read and written, of the best of the copies that move `moved` bytes each."""
    source = torch.ones(moved // 8, device=device)
    target = torch.empty_like(source)
    calls, best = 1, 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        took = _timed_copies(target, source, calls, device)
        if took < _SMALLEST_BANDWIDTH_CALL:
            calls *= 2
        else:
            best = max(best, calls * moved / took)
    return best


def _timed_copies(target: torch.Tensor, source: torch.Tensor, calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        target.copy_(source)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


_PRODUCT_SIZES = (2048, 4096, 8192)


def _cuda_limits(seconds: float) -> Limits:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    switches = torch.backends.cuda.matmul
    before = switches.allow_tf32
    switches.allow_tf32 = torch.backends.cudnn.allow_tf32  # float32 as convolutions take it
    try:
        flops = {
            str(dtype).removeprefix("torch."): _product_rate(dtype, _PRODUCT_SIZES, seconds)
            for dtype in dtypes
        }
    finally:
        switches.allow_tf32 = before
    bandwidth = tuple((size, _copy_rate(size, "cuda", seconds)) for size in _COPY_BYTES)
    return Limits(flops, bandwidth, "best of torch's matrix products; bandwidth of torch's copy")


def _product_rate(dtype: torch.dtype, sizes: Sequence[int], seconds: float) -> float:
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device="cuda").to(dtype)
        out = torch.mm(a, a)
        end = time.perf_counter() + seconds / len(sizes)
        while time.perf_counter() < end:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                torch.mm(a, a, out=out)
            torch.cuda.synchronize()
            best = max(best, 10 * 2.0 * size**3 / (time.perf_counter() - start))
    return best
