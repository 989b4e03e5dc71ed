# SPDX-License-Identifier: BSD-3-Clause
"""What the compiler makes of every Triton kernel, and what the simulator counts in it.

`kernel_facts()` gives one row for each kernel at its default configurations and each architecture,
as plain data. Nothing here is a measurement of time: figures are static (registers, spills, shared
memory, SASS) or simulated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ptxsim import Counters
from ptxsim.toolchain import cubin_resources, sass_summary
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

__all__ = [
    "ARCHITECTURES",
    "SIMULATED",
    "Case",
    "cases",
    "kernel_facts",
    "simulated_figures",
    "static_row",
]

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
    """One compiled kernel: `name` is <op>_<dtype>_<tile>[_<variant>].

    `listed` cases make the table; the others are further variants of the same code, compiled to see
    that none of them spills. `simulated` ones have aligned channels and a K loop to count.
    """

    name: str
    kernel: Any
    plan: Plan
    pointers: dict[str, torch.dtype | None]
    listed: bool = False
    simulated: bool = False


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
    listed: bool = False,
    simulated: bool = False,
) -> Case:
    operands = Operands(dtype, precision, shape)
    plan = plan_gather(problem, direction, operands, epilogue, Choice("igemm", tile))
    pointers: dict[str, torch.dtype | None] = dict.fromkeys(_GATHER_POINTERS, dtype)
    if epilogue.mask_slope == 1:
        pointers["saved_ptr"] = None
    if not epilogue.bias:
        pointers["bias_ptr"] = None
    return Case(label, igemm_kernel, plan, pointers, listed, simulated)


def _gather_cases(kind: str, shape: Device) -> Iterator[Case]:
    dtype, precision = _KINDS[kind]
    name = kind if kind != "half" else "f16"
    family = tiles._family(shape)
    fused, masked = Epilogue(True, 0.01), Epilogue(mask_slope=0.01)
    many = 2**20  # images: offsets of 64 bits

    def case(label: str, tile: Tile, *arguments: Any, **flags: bool) -> Case:
        full = f"{label.split('_')[0]}_{name}_{tile.m}x{tile.n}x{tile.k}"
        variant = label.partition("_")[2]
        full += f"_{variant}" if variant else ""
        return _gather_case(full, dtype, precision, tile, shape, *arguments, **flags)

    for tile in tiles._GATHER[kind, family]:
        c, n = 2 * tile.k, tile.n
        up = _conv(n, c, 4, 2)
        both = {"listed": True, "simulated": True}
        yield case("fprop", tile, _conv(c, n, 3), "fprop", fused, **both)
        yield case("dgrad", tile, up, "dgrad", fused, **both)
        if tile.accumulators <= 64:
            largest = tile == tiles._GATHER[kind, family][0] or tile.m * tile.n == 128 * 64
            yield case("dgrad_masked", tile, up, "dgrad", masked, listed=largest)
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
            listed = c == 4
            yield case(f"fprop_flat{c}", tile, _conv(c, tile.n, 3), "fprop", fused, listed=listed)
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
            yield Case(full, wgrad_kernel, plan, pointers, not variant, not variant)


def _other_cases(shape: Device) -> Iterator[Case]:
    """Direct and pointwise kernels."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        name = {torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}[dtype]
        operands = Operands(dtype, "ieee", shape)
        listed = dtype != torch.float64
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
                yield Case(
                    f"{direction}_direct_{name}_{label}", direct_kernel, plan, gather, listed
                )
            plan = plan_wgrad(problem, operands, mask_x=True, mask_slope=0.01)
            pointers = wgrad | {"out_ptr": partial}
            yield Case(f"wgrad_direct_{name}_{label}", direct_wgrad_kernel, plan, pointers, listed)
        mask = plan_mask(4096, 64, operands, 0.01, store=True, sums=True)
        pointers = dict.fromkeys(("grad_ptr", "saved_ptr", "out_ptr"), dtype)
        yield Case(f"mask_{name}", mask_kernel, mask, pointers | {"sums_out_ptr": partial}, listed)
        for last in (True, False):
            after = plan_bias_activation((1, 64, 16, 16), last, 0.01)
            label = "nhwc" if last else "nchw"
            pointers = dict.fromkeys(("y_ptr", "bias_ptr"), dtype)
            yield Case(
                f"bias_activation_{name}_{label}", bias_activation_kernel, after, pointers, listed
            )
        parts = PointwisePlan(
            8, {"count": 4096, "bias_count": 64, "splits": 4, "tiles": 16}, {"BLOCK": 256}
        )
        pointers = {"parts_ptr": partial, "bias_parts_ptr": partial}
        pointers |= {"out_ptr": dtype, "bias_out_ptr": dtype}
        yield Case(f"reduce_{name}", reduce_kernel, parts, pointers, listed)


def cases(cc: int) -> Iterator[Case]:
    """Every kernel at every tile of the tables, for an architecture such as 80 or 90."""
    shape = device(cc)
    for kind in _KINDS:
        yield from _gather_cases(kind, shape)
        yield from _wgrad_cases(kind, shape)
    yield from _other_cases(shape)


# Static --------------------------------------------------------------------------------------

_GROUPS = {
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "DMMA"),
    "load": ("LDG", "LDGSTS", "LDS", "LDSM", "UTMALDG"),
    "local": ("LDL", "STL"),
}


def static_row(case: Case, cc: int, simulator: Simulator) -> dict[str, Any]:
    """Compile a case and read off what the compiler and the disassembler say."""
    tensors = {
        name: None if dtype is None else torch.empty(16, dtype=dtype)
        for name, dtype in case.pointers.items()
    }
    options = {"num_warps": case.plan.warps, "num_stages": case.plan.stages}
    arguments = {**case.plan.integers, **case.plan.constants, **options}
    kernel, _ = simulator.compile(case.kernel, tensors, arguments)
    usage = cubin_resources(kernel.asm["cubin"])[kernel.metadata.name]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        counts = sass_summary(cubin)[kernel.metadata.name]
    sums = {group: sum(counts.get(m, 0) for m in names) for group, names in _GROUPS.items()}
    shared = kernel.metadata.shared
    return {
        "name": case.name,
        "backend": "triton",
        "arch": f"sm_{cc}",
        "registers": usage.registers,
        "spill_bytes": 4 * sums["local"],
        "stack_bytes": usage.stack_bytes,
        "shared_bytes": shared,
        "ctas_per_sm": _ctas(cc, kernel.threads, usage.registers, shared),
        "sass": sums | counts,
        "simulated": {},
        "problem": None,
        "note": None,
    }


def _ctas(cc: int, threads: int, registers: int, shared: int) -> int:
    """Resident blocks: CUDA C++ Programming Guide, "Compute Capabilities" and "Occupancy"."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // registers_per_warp // 4 * 4 // (threads // 32)
    by_shared = (_SHARED_KIB[cc] << 10) // (shared + 1024)
    return min(by_registers, by_shared, _THREADS[cc] // threads, 32)


# Simulated -----------------------------------------------------------------------------------

_SHORT, _LONG = 6, 10  # tiles of K, both more than any pipeline has stages
_WGMMA = "one wgmma does the work of many mma.sync, so the ratio of instructions is no cost"
_TF32_WGRAD = (
    "both operands lie across the reduction: words are loaded one by one from shared memory"
)


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _count_gather(case: Case, plan: GatherPlan, cc: int, depth: int) -> tuple[Counters, int, str]:
    """Counters of two row tiles of a 1x1 convolution, the bytes it must move, and the problem."""
    dtype, tile = case.pointers["out_ptr"], plan.tile
    assert dtype is not None
    assert tile is not None
    rows, red = tile.m // 8, depth * tile.k
    channels = (tile.n, red) if plan.direction == "dgrad" else (red, tile.n)
    problem = ConvProblem(1, rows, 16, channels[0], rows, 16, channels[1], 1, 1)
    operands = Operands(dtype, str(plan.constants["PRECISION"]), device(cc))
    chosen = plan_gather(
        problem, plan.direction, operands, Epilogue(True, 0.01), Choice("igemm", tile)
    )
    source, w = _draw(dtype, 1, red, rows, 16), _draw(dtype, problem.k, problem.c, 1, 1)
    bias, target = torch.randn(tile.n).to(dtype), _draw(dtype, 1, tile.n, rows, 16)
    counters = Counters()
    with set_wrap_triton_enabled(False), simulated(cc, counters=counters):
        launch_gather(chosen, source, None, w, bias, target)
    return counters, sum(t.nbytes for t in (source, w, bias, target)), str(problem)


def _count_wgrad(case: Case, plan: WgradPlan, cc: int, depth: int) -> tuple[Counters, int, str]:
    """The same for one tile of a filter gradient."""
    dtype, tile = case.pointers["y_ptr"], plan.tile
    assert dtype is not None
    assert tile is not None
    rows = depth * tile.k // 16
    problem = ConvProblem(1, rows, 16, tile.n, rows, 16, tile.m, 1, 1)
    operands = Operands(dtype, str(plan.constants["PRECISION"]), device(cc))
    chosen = plan_wgrad(problem, operands, choice=Choice("igemm", tile, 1))
    y, x = _draw(dtype, 1, tile.m, rows, 16), _draw(dtype, 1, tile.n, rows, 16)
    target = _draw(dtype, tile.m, tile.n, 1, 1)
    counters = Counters()
    with set_wrap_triton_enabled(False), simulated(cc, counters=counters):
        launch_wgrad(chosen, y, x, None, target)
    return counters, sum(t.nbytes for t in (y, x, target)), str(problem)


@dataclass
class _Sums:
    """Totals over instructions of one kind."""

    executed: int = 0
    wavefronts: int = 0
    passes: int = 0


def _sums(counters: Counters) -> dict[str, _Sums]:
    found: dict[str, _Sums] = {}
    for stats in counters.instructions.values():
        kind = "ldmatrix" if "ldmatrix" in stats.text else stats.kind
        total = found.setdefault(kind, _Sums())
        total.executed += stats.executed
        total.wavefronts += stats.wavefronts
        total.passes += stats.passes
    return found


def simulated_figures(case: Case, cc: int) -> dict[str, Any]:
    """The columns "simulated", "problem" and "note" of a case, from two lengths of its K loop."""
    plan = case.plan
    runs = []
    for depth in (_SHORT, _LONG):
        if isinstance(plan, GatherPlan):
            runs.append(_count_gather(case, plan, cc, depth))
        else:
            assert isinstance(plan, WgradPlan)
            runs.append(_count_wgrad(case, plan, cc, depth))
    (short, _, _), (long, least, problem) = runs
    before, after = _sums(short), _sums(long)
    figures: dict[str, float] = {}
    for kind, name in (
        ("ldmatrix", "ldmatrix"),
        ("async copy", "cp_async"),
        ("ld shared", "ld_shared"),
    ):
        total = after.get(kind, _Sums())
        if total.passes:
            figures[f"wavefronts_{name}"] = round(total.wavefronts / total.passes, 3)
    figures["sector_efficiency"] = round(long.global_efficiency(), 3)
    grown = {k: after[k].executed - before.get(k, _Sums()).executed for k in after}
    tensor = grown.pop("tensor", 0)
    grown.pop("move", 0)  # names of registers, which the assembler resolves
    if tensor:
        figures["instructions_per_mma"] = round(sum(grown.values()) / tensor, 3)
    moved = long.unique_bytes() + long.unique_bytes(write=True)
    figures["dram_over_minimum"] = round(moved / least, 3)
    note = None
    if cc >= 90 and plan.tile is not None and plan.tile.m >= 64 and tensor:
        note = _WGMMA
    elif isinstance(plan, WgradPlan) and "tf32" in case.name:
        note = _TF32_WGRAD
    return {"simulated": figures, "problem": problem, "note": note}


def kernel_facts(
    architectures: Sequence[int] = ARCHITECTURES, *, simulate: bool = True
) -> list[dict[str, Any]]:
    """One row for each kernel at its default configurations and each architecture.

    Keys: name, backend ("triton"), arch ("sm_80", ...), registers, spill_bytes (of spill
    instructions), stack_bytes, shared_bytes, ctas_per_sm, sass (counts by mnemonic, and summed as
    tensor, load, local), simulated (figures by name, for aligned tiles on 8.0 and 9.0), problem
    (on which they were counted), note. Takes some minutes.
    """
    rows: list[dict[str, Any]] = []
    for cc in architectures:
        simulator = Simulator(cc)
        for case in cases(cc):
            if not case.listed:
                continue
            row = static_row(case, cc, simulator)
            if simulate and case.simulated and cc in SIMULATED:
                row |= simulated_figures(case, cc)
            rows.append(row)
    return rows
