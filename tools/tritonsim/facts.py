# SPDX-License-Identifier: BSD-3-Clause
"""What the compiler makes of every Triton kernel, and what the simulator counts in it.

`kernel_facts()` gives one row for each kernel, tile and architecture, as plain data. Nothing here
is a measurement of time: rows are static (registers, spills, shared memory, SASS) or simulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ptxsim import Counters
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from segpose_kernels.triton import tiles
from segpose_kernels.triton.device import Device
from segpose_kernels.triton.direct import direct_kernel, direct_wgrad_kernel
from segpose_kernels.triton.kernels import igemm_kernel, wgrad_kernel
from segpose_kernels.triton.launch import launch_gather, launch_wgrad
from segpose_kernels.triton.plan import (
    Choice,
    Direction,
    Epilogue,
    GatherPlan,
    MaskPlan,
    Operands,
    PointwisePlan,
    WgradPlan,
    plan_bias_activation,
    plan_gather,
    plan_mask,
    plan_wgrad,
)
from segpose_kernels.triton.pointwise import bias_activation_kernel, mask_kernel, reduce_kernel
from segpose_kernels.triton.problem import ConvProblem
from segpose_kernels.triton.tiles import Tile

from . import Simulator, device, simulated

__all__ = ["ARCHITECTURES", "SIMULATED", "Case", "cases", "kernel_facts"]

ARCHITECTURES = (80, 90, 100, 120)
SIMULATED = (80, 90)

_KINDS = {
    "half": (torch.float16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "ieee": (torch.float32, "ieee"),
}
_REGISTERS = 65536  # of a multiprocessor
_THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
# Shared memory of a multiprocessor in KiB; 1 KiB of it goes with every block.
_SHARED_KIB = {80: 164, 90: 228, 100: 228, 120: 100}

Plan = GatherPlan | WgradPlan | MaskPlan | PointwisePlan


@dataclass(frozen=True)
class Case:
    """One compiled kernel: `name` is <op>_<dtype>_<tile>[_<variant>]."""

    name: str
    kernel: Any
    plan: Plan
    pointers: dict[str, torch.dtype | None]
    main: bool = False  # a tile with aligned channels, for which figures are simulated

    @property
    def warps(self) -> int:
        return self.plan.warps


def _conv(c: int, k: int, r: int, stride: int = 1, *, n: int = 1, extent: int = 16) -> ConvProblem:
    """A square convolution with padding (r - 1) // 2."""
    pad = (r - 1) // 2
    out = (extent + 2 * pad - r) // stride + 1
    pair = stride, stride
    return ConvProblem(n, extent, extent, c, out, out, k, r, r, pair, (pad, pad), (1, 1), 1)


_GATHER_POINTERS = ("src_ptr", "saved_ptr", "w_ptr", "bias_ptr", "out_ptr")


def _gather_case(
    label: str,
    dtype: torch.dtype,
    precision: str,
    tile: Tile,
    shape: Device,
    problem: ConvProblem,
    direction: Direction,
    epilogue: Epilogue,
    main: bool = False,
) -> Case:
    operands = Operands(dtype, precision, shape)
    plan = plan_gather(problem, direction, operands, epilogue, Choice("igemm", tile))
    pointers: dict[str, torch.dtype | None] = dict.fromkeys(_GATHER_POINTERS, dtype)
    if epilogue.mask_slope == 1:
        pointers["saved_ptr"] = None
    if not epilogue.bias:
        pointers["bias_ptr"] = None
    return Case(label, igemm_kernel, plan, pointers, main)


def _gather_cases(kind: str, shape: Device) -> Iterator[Case]:
    dtype, precision = _KINDS[kind]
    name = kind if kind != "half" else "f16"
    family = tiles._family(shape)
    fused, masked = Epilogue(True, 0.01), Epilogue(mask_slope=0.01)
    many = 2**20  # images: offsets of 64 bits

    def case(label: str, tile: Tile, *arguments: Any, main: bool = False) -> Case:
        full = f"{label.split('_')[0]}_{name}_{tile.m}x{tile.n}x{tile.k}"
        variant = label.partition("_")[2]
        full += f"_{variant}" if variant else ""
        return _gather_case(full, dtype, precision, tile, shape, *arguments, main=main)

    for tile in tiles._GATHER[kind, family]:
        c, n = 2 * tile.k, tile.n
        up = _conv(n, c, 4, 2)
        yield case("fprop", tile, _conv(c, n, 3), "fprop", fused, main=True)
        yield case("dgrad", tile, up, "dgrad", fused, main=True)
        if tile.accumulators <= 64:
            yield case("dgrad_masked", tile, up, "dgrad", masked, main=True)
            yield case("fprop_masked-ragged", tile, _conv(c + 8, n + 8, 3), "fprop", masked)
        yield case("fprop_ragged", tile, _conv(c + 8, n + 8, 3), "fprop", fused)
        yield case("dgrad_ragged", tile, _conv(n + 8, c + 8, 4, 2), "dgrad", fused)
        if tile.accumulators <= (16 if kind == "ieee" else 32):
            yield case("fprop_odd", tile, _conv(c, n + 5, 3), "fprop", fused)
            yield case("dgrad_odd", tile, _conv(n + 5, c + 8, 4, 2), "dgrad", fused)
        if tile.accumulators <= 64:
            yield case("fprop_wide", tile, _conv(c + 8, n, 3, n=many), "fprop", fused)
            yield case("dgrad_wide", tile, _conv(n, c + 8, 4, 2, n=many), "dgrad", fused)
    for tile in tiles._FLAT_GATHER[kind]:
        for c in (1, 4, 8):
            yield case(f"fprop_flat{c}", tile, _conv(c, tile.n, 3), "fprop", fused)
            yield case(f"dgrad_flat{c}", tile, _conv(tile.n, c, 4, 2), "dgrad", fused)
            yield case(f"dgrad_flat{c}-masked", tile, _conv(tile.n, c, 4, 2), "dgrad", masked)


def _wgrad_cases(kind: str, shape: Device) -> Iterator[Case]:
    dtype, precision = _KINDS[kind]
    name = kind if kind != "half" else "f16"
    operands = Operands(dtype, precision, shape)
    variants: dict[str, tuple[ConvProblem | None, dict[str, Any]]] = {
        "": (None, {"bias": True}),
        "masked-y": (None, {"bias": True, "mask_slope": 0.01}),
        "masked-x": (None, {"mask_x": True, "mask_slope": 0.01}),
        "ragged": (_conv(40, 136, 3), {"bias": True}),
        "single": (_conv(1, 1, 3), {"bias": True}),
        "wide": (_conv(128, 128, 3, n=2**20), {"bias": True}),
    }
    for tile in tiles._WGRAD[kind, tiles._family(shape)]:
        for variant, (problem, options) in variants.items():
            if variant.startswith("masked") and tile.accumulators > 64:
                continue
            if tile.accumulators > {"wide": 64, "single": 16}.get(variant, 128):
                continue
            problem = _conv(tile.n, tile.m, 3) if problem is None else problem
            plan = plan_wgrad(problem, operands, choice=Choice("igemm", tile, 2), **options)
            masked = "mask_slope" in options
            pointers: dict[str, torch.dtype | None] = {
                "y_ptr": dtype,
                "x_ptr": dtype,
                "saved_ptr": dtype if masked else None,
                "out_ptr": torch.float32,
                "bias_out_ptr": torch.float32 if plan.bias else None,
            }
            full = f"wgrad_{name}_{tile.m}x{tile.n}x{tile.k}" + (f"_{variant}" if variant else "")
            main = not variant or variant.startswith("masked")
            yield Case(full, wgrad_kernel, plan, pointers, main)


def _other_cases(shape: Device) -> Iterator[Case]:
    """Direct and pointwise kernels."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        name = {torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}[dtype]
        operands = Operands(dtype, "ieee", shape)
        gather = dict.fromkeys(_GATHER_POINTERS, dtype)
        wgrad = dict.fromkeys(("y_ptr", "x_ptr", "saved_ptr"), dtype)
        partial = torch.float64 if dtype == torch.float64 else torch.float32
        both: tuple[Direction, Direction] = ("fprop", "dgrad")
        for label, channels, groups in (("depthwise", 64, 64), ("narrow", 64, 16)):
            pair = (2, 2)
            problem = ConvProblem(
                1, 16, 16, channels, 8, 8, channels, 3, 3, pair, (1, 1), (1, 1), groups
            )
            for direction in both:
                epilogue = Epilogue(True, 0.01, 0.01)
                plan = plan_gather(problem, direction, operands, epilogue)
                yield Case(f"{direction}_direct_{name}_{label}", direct_kernel, plan, gather)
            plan = plan_wgrad(problem, operands, mask_x=True, mask_slope=0.01)
            pointers = wgrad | {"out_ptr": partial}
            yield Case(f"wgrad_direct_{name}_{label}", direct_wgrad_kernel, plan, pointers)
        mask = plan_mask(4096, 64, operands, 0.01, store=True, sums=True)
        pointers = dict.fromkeys(("grad_ptr", "saved_ptr", "out_ptr"), dtype)
        yield Case(f"mask_{name}", mask_kernel, mask, pointers | {"sums_out_ptr": partial})
        for last in (True, False):
            after = plan_bias_activation((1, 64, 16, 16), last, 0.01)
            label = "nhwc" if last else "nchw"
            pointers = dict.fromkeys(("y_ptr", "bias_ptr"), dtype)
            yield Case(f"bias_activation_{name}_{label}", bias_activation_kernel, after, pointers)
        parts = PointwisePlan(
            8, {"count": 4096, "bias_count": 64, "splits": 4, "tiles": 16}, {"BLOCK": 256}
        )
        pointers = {"parts_ptr": partial, "bias_parts_ptr": partial}
        pointers |= {"out_ptr": dtype, "bias_out_ptr": dtype}
        yield Case(f"reduce_{name}", reduce_kernel, parts, pointers)


def cases(cc: int) -> Iterator[Case]:
    """Every kernel at every tile of the tables, for an architecture such as 80 or 90."""
    shape = device(cc)
    for kind in _KINDS:
        yield from _gather_cases(kind, shape)
        yield from _wgrad_cases(kind, shape)
    yield from _other_cases(shape)


def _static(case: Case, cc: int, simulator: Simulator) -> dict[str, Any]:
    tensors = {
        name: None if dtype is None else torch.empty(16, dtype=dtype)
        for name, dtype in case.pointers.items()
    }
    options = {"num_warps": case.plan.warps, "num_stages": case.plan.stages}
    arguments = {**case.plan.integers, **case.plan.constants, **options}
    kernel, _ = simulator.compile(case.kernel, tensors, arguments)
    usage = kernel.resources()
    sass = {name: count for name, count in usage.sass.items() if count}
    spills = 4 * (usage.sass.get("LDL", 0) + usage.sass.get("STL", 0))
    return {
        "name": case.name,
        "backend": "triton",
        "arch": f"{cc // 10}.{cc % 10}",
        "threads": kernel.threads,
        "registers": usage.registers,
        "spill_bytes": spills,
        "stack_bytes": usage.stack_bytes,
        "shared_bytes": kernel.metadata.shared,
        "ctas_per_sm": _ctas(cc, kernel.threads, usage.registers, kernel.metadata.shared),
        "sass": sass,
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
        "tcgen05": "tcgen05.mma" in kernel.asm["ptx"],
    }


def _ctas(cc: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that fit on a multiprocessor; registers go in units of 256 to a warp."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // (per_warp * threads // 32)
    by_shared = (_SHARED_KIB[cc] << 10) // (shared + 1024)
    return min(by_registers, by_shared, _THREADS[cc] // threads, 32)


# Simulated figures --------------------------------------------------------------------------


def _simulate(case: Case, cc: int, depth: int) -> tuple[Counters, float]:
    """Counters of a launch that reduces over `depth` tiles of K, and the bytes it must move."""
    plan = case.plan
    assert isinstance(plan, (GatherPlan, WgradPlan))
    assert plan.tile is not None
    tile, counters = plan.tile, Counters()
    dtype = case.pointers["out_ptr"] if isinstance(plan, GatherPlan) else case.pointers["y_ptr"]
    assert dtype is not None

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    operands = Operands(dtype, str(plan.constants["PRECISION"]), device(cc))
    slope = float(plan.constants["MASK_SLOPE"])
    with set_wrap_triton_enabled(False), simulated(cc, counters=counters):
        if isinstance(plan, GatherPlan):
            side = 2 * tile.m // 16
            problem = ConvProblem(1, side, 16, depth * tile.k, side, 16, tile.n, 1, 1, groups=1)
            epilogue = Epilogue(slope == 1, 1.0 if slope != 1 else 0.01, slope)
            direction = plan.direction
            if direction == "dgrad":
                problem = ConvProblem(1, side, 16, tile.n, side, 16, depth * tile.k, 1, 1, groups=1)
            chosen = plan_gather(problem, direction, operands, epilogue, Choice("igemm", tile))
            source = draw(1, depth * tile.k, side, 16)
            w = draw(problem.k, problem.c, 1, 1)
            bias = draw(1, tile.n, 1, 1).flatten() if epilogue.bias else None
            saved = draw(*source.shape) if slope != 1 else None
            target = draw(1, tile.n, side, 16)
            launch_gather(chosen, source, saved, w, bias, target)
            least = [source, w, bias, saved, target]
        else:
            rows = depth * tile.k // 16
            problem = ConvProblem(1, rows, 16, tile.n, rows, 16, tile.m, 1, 1, groups=1)
            mask_x = bool(plan.constants["MASK_X"])
            chosen_wgrad = plan_wgrad(
                problem,
                operands,
                mask_x=mask_x,
                mask_slope=slope,
                choice=Choice("igemm", tile, 1),
            )
            y, x = draw(1, tile.m, rows, 16), draw(1, tile.n, rows, 16)
            saved = None if slope == 1 else draw(*(x if mask_x else y).shape)
            target = draw(tile.m, tile.n, 1, 1)
            launch_wgrad(chosen_wgrad, y, x, saved, target)
            least = [y, x, saved, target]
    return counters, float(sum(t.nbytes for t in least if t is not None))


def _simulated(case: Case, cc: int) -> dict[str, Any]:
    """Figures of a tile with aligned channels; the K loop's by the difference of two depths."""
    short, _ = _simulate(case, cc, 6)
    long, least = _simulate(case, cc, 10)
    before, after = short.mix(), long.mix()
    tensor = after.get("tensor", 0) - before.get("tensor", 0)
    others = sum(after.values()) - sum(before.values()) - tensor
    moved = long.unique_bytes() + long.unique_bytes(write=True)
    return {
        "shared_wavefronts_per_request": round(long.shared_conflict_factor(), 2),
        "load_sector_efficiency": round(long.global_efficiency("async copy"), 2),
        "store_sector_efficiency": round(long.global_efficiency("st global"), 2),
        "instructions_per_tensor_instruction": round(others / tensor, 2) if tensor else None,
        "dram_bytes_over_minimum": round(moved / least, 2),
    }


def kernel_facts(
    architectures: Sequence[int] = ARCHITECTURES,
    *,
    simulate: bool = True,
    only: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """One row for each kernel, tile and architecture.

    Keys: name, backend ("triton"), arch, threads, registers, spill_bytes, stack_bytes,
    shared_bytes, ctas_per_sm, sass (counts of instructions by mnemonic), wgmma, tcgen05, and for
    aligned tiles on 8.0 and 9.0 the simulated figures (shared_wavefronts_per_request, ...).
    `only` keeps the cases of these names.
    """
    wanted = None if only is None else set(only)
    rows: list[dict[str, Any]] = []
    for cc in architectures:
        simulator = Simulator(cc)
        for case in cases(cc):
            if wanted is not None and case.name not in wanted:
                continue
            row = _static(case, cc, simulator)
            if simulate and case.main and cc in SIMULATED:
                row |= _simulated(case, cc)
            rows.append(row)
    return rows
