# SPDX-License-Identifier: BSD-3-Clause
"""Every Triton kernel with plans that reach all of its tiles and variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tritonsim import device

from segpose_kernels.triton import tiles
from segpose_kernels.triton.device import Device
from segpose_kernels.triton.direct import direct_kernel, direct_wgrad_kernel
from segpose_kernels.triton.kernels import igemm_kernel, wgrad_kernel
from segpose_kernels.triton.plan import Choice, Direction, Epilogue, Operands
from segpose_kernels.triton.plan_gather import GatherPlan, plan_gather
from segpose_kernels.triton.plan_pointwise import (
    MaskPlan,
    PointwisePlan,
    plan_bias_activation,
    plan_mask,
    plan_reduced_last,
)
from segpose_kernels.triton.plan_wgrad import WgradPlan, plan_wgrad
from segpose_kernels.triton.pointwise import (
    bias_activation_kernel,
    mask_kernel,
    reduce_kernel,
    reduced_last_kernel,
)
from segpose_kernels.triton.problem import ConvProblem
from segpose_kernels.triton.tiles import Tile

__all__ = ["Case", "cases"]

_KINDS = {
    "half": (torch.float16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "ieee": (torch.float32, "ieee"),
}
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
    family = tiles.family_of(shape)
    fused, masked = Epilogue(True, 0.01), Epilogue(mask_slope=0.01)
    many = 2**20  # images: offsets of 64 bits

    def case(label: str, tile: Tile, *arguments: Any, **flags: bool) -> Case:
        full = f"{label.split('_')[0]}_{name}_{tile.label}"
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
    for tile in tiles._GATHER_ACROSS.get((kind, family), ()):
        up, ragged = _conv(tile.n, 2 * tile.k, 4, 2), _conv(tile.n + 8, 2 * tile.k + 8, 4, 2)
        yield case("dgrad", tile, up, "dgrad", fused, listed=True, simulated=True)
        yield case("dgrad_ragged", tile, ragged, "dgrad", fused)
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
    for tile in tiles._WGRAD[kind, tiles.family_of(shape)]:
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
            full = f"wgrad_{name}_{tile.label}" + (f"_{variant}" if variant else "")
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
        for last in (True, False):
            filters = plan_reduced_last((64, 32, 3, 3), (1, 32, 3, 3, 64), last)
            label = "krsc" if last else "kcrs"
            pointers = dict.fromkeys(("w_ptr", "out_ptr"), dtype)
            yield Case(
                f"reduced_last_{name}_{label}", reduced_last_kernel, filters, pointers, listed
            )


def cases(cc: int) -> Iterator[Case]:
    """Every kernel at every tile of the tables, for an architecture such as 80 or 90."""
    shape = device(cc)
    for kind in _KINDS:
        yield from _gather_cases(kind, shape)
        yield from _wgrad_cases(kind, shape)
    yield from _other_cases(shape)
