# SPDX-License-Identifier: BSD-3-Clause
"""The Triton kernels as compiled for 8.0 and 9.0, executed by ptxsim against float64.

Every launch inside `tritonsim.simulated` raises on any report of the simulator and on any element
of an output that was not written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tritonsim
from torch._library.triton import set_wrap_triton_enabled

from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.gpu_problems import GPU_LAYERS, GPU_PROBLEMS
from segpose_kernels.testing.numerics import (
    TF32,
    Reference,
    assert_close_to_reference,
    assert_results_match,
)
from segpose_kernels.testing.spec import ConvSpec, ConvTensors
from segpose_kernels.triton import calls, tiles
from segpose_kernels.triton import plan as plans
from segpose_kernels.triton.launch import launch_gather, launch_wgrad
from segpose_kernels.triton.plan import Choice, Epilogue, Operands
from segpose_kernels.triton.plan_gather import plan_gather
from segpose_kernels.triton.plan_wgrad import plan_wgrad
from segpose_kernels.triton.problem import ConvProblem
from segpose_kernels.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("poison")

ARCHITECTURES = (80, 90)
# Name: dtype, and torch's setting for float32 convolutions.
ARITHMETIC: dict[str, tuple[torch.dtype, str]] = {
    "fp16": (torch.float16, "tf32"),
    "bf16": (torch.bfloat16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


@pytest.fixture(autouse=True)
def restored_precision() -> Iterator[None]:
    settings: Any = torch.backends.cudnn
    before = settings.conv.fp32_precision
    yield
    settings.conv.fp32_precision = before


def choose(arithmetic: str) -> tuple[torch.dtype, Any]:
    """dtype and tolerance of a kind of arithmetic, after setting torch's switch for it."""
    dtype, precision = ARITHMETIC[arithmetic]
    settings: Any = torch.backends.cudnn
    settings.conv.fp32_precision = precision
    return dtype, TF32 if arithmetic == "tf32" else None


def check(spec: ConvSpec, arithmetic: str, cc: int, layout: str, **options: Any) -> list[str]:
    """Output and three gradients by name; returns the kernels that ran."""
    dtype, rule = choose(arithmetic)
    tensors = spec.make_tensors(
        dtype, input_layout=layout, weight_layout=layout, grad_layout=layout
    )
    with tritonsim.simulated(cc, **options) as simulator:
        results = run_fused(spec, tensors, backend="triton")
    assert_results_match(spec, tensors, results, rule=rule)
    return [launch.name for launch in simulator.launches]


def table() -> Iterator[Any]:
    """Every row in every arithmetic, each on one architecture by turns unless all are asked for:
    fp16 and bf16, which share their code, meet both between them.
    """
    for row, spec in enumerate((*GPU_PROBLEMS, *GPU_LAYERS)):
        for column, arithmetic in enumerate(ARITHMETIC):
            for turn, cc in enumerate(ARCHITECTURES):
                rest = (row + column + turn) % 2 == 1
                yield pytest.param(
                    spec,
                    arithmetic,
                    cc,
                    id=f"{spec.name}-{arithmetic}-sm{cc}",
                    marks=[pytest.mark.slow] if rest else [],
                )


@pytest.mark.parametrize(("spec", "arithmetic", "cc"), list(table()))
def test_problem_table(spec: ConvSpec, arithmetic: str, cc: int) -> None:
    check(spec, arithmetic, cc, "channels_last")


# Every tile ----------------------------------------------------------------------------------


def every_tile() -> Iterator[Any]:
    kinds = {"half": "fp16", "tf32": "tf32", "ieee": "fp32"}
    for (kind, family), candidates in tiles._GATHER.items():
        for tile in candidates:
            yield pytest.param("gather", tile, kinds[kind], 10 * family, False)
    for kind, candidates in tiles._FLAT_GATHER.items():
        for tile in candidates:
            yield pytest.param("gather", tile, kinds[kind], 90, True)
    for (kind, family), candidates in tiles._WGRAD.items():
        for tile in candidates:
            yield pytest.param("wgrad", tile, kinds[kind], 10 * family, False)


def tile_id(value: Any) -> str | None:
    if isinstance(value, Tile):
        return f"{value.m}x{value.n}x{value.k}w{value.warps}"
    return {True: "flat", False: ""}.get(value) if isinstance(value, bool) else None


def spec_of(problem: ConvProblem, transposed: bool) -> ConvSpec:
    """The public call whose forward is fprop (or dgrad) of a problem."""
    sizes = (problem.k, problem.c, problem.p, problem.q)
    if not transposed:
        sizes = (problem.c, problem.k, problem.h, problem.w)
    return ConvSpec(
        "tile",
        "conv_transpose2d" if transposed else "conv2d",
        problem.n,
        *sizes,
        (problem.r, problem.s),
        stride=problem.stride,
        padding=problem.padding,
        activation="none",
    )


@pytest.mark.parametrize(
    ("op", "tile", "arithmetic", "cc", "flat"), list(every_tile()), ids=tile_id
)
def test_every_tile(op: str, tile: Tile, arithmetic: str, cc: int, flat: bool) -> None:
    """Two ragged tiles on each axis of the result, and more K tiles than stages."""
    dtype, rule = choose(arithmetic)
    operands = Operands(dtype, ARITHMETIC[arithmetic][1], tritonsim.device(cc))
    choice = Choice("igemm", tile, 2)
    if op == "gather":
        red = 7 if flat else (tile.stages + 2) * tile.k - 8
        rows = tile.m // 8 + 1
        square = ConvProblem(1, rows, 8, red, rows, 8, tile.n + 8, 1, 1)
        if flat:
            square = ConvProblem(1, rows, 8, 7, rows, 8, tile.n + 8, 5, 3, padding=(2, 1))
        spec = spec_of(square, False)
        tensors = spec.make_tensors(dtype, input_layout="channels_last")
        plan = plan_gather(square, "fprop", operands, Epilogue(bias=True), choice)
        target = torch.empty(spec.output_shape, dtype=dtype)
        with set_wrap_triton_enabled(False), tritonsim.simulated(cc):
            result = launch_gather(plan, tensors.input, None, tensors.weight, tensors.bias, target)
        compare("output", result, spec, tensors, rule)
        return
    rows = (2 * (tile.stages + 1) * tile.k) // 8 + 1
    square = ConvProblem(1, rows, 8, tile.n + 8, rows, 8, tile.m + 8, 1, 1)
    spec = spec_of(square, False)
    tensors = spec.make_tensors(dtype, input_layout="channels_last", grad_layout="channels_last")
    wgrad = plan_wgrad(square, operands, bias=True, choice=choice)
    assert wgrad.tile == tile
    target = torch.empty(spec.weight_shape, dtype=dtype)
    with set_wrap_triton_enabled(False), tritonsim.simulated(cc):
        grad_weight, sums = launch_wgrad(wgrad, tensors.grad_output, tensors.input, None, target)
    assert sums is not None
    compare("grad_weight", grad_weight, spec, tensors, rule)
    compare("grad_bias", sums, spec, tensors, rule)


def compare(name: str, actual: Tensor, spec: ConvSpec, tensors: ConvTensors, rule: Any) -> None:
    reference = Reference(spec, tensors)
    same_dtype = Reference(spec, tensors, tensors.input.dtype)
    assert_close_to_reference(
        name,
        actual,
        reference.results[name],
        terms=lambda: reference.terms[name],
        eager_result=lambda: same_dtype.results[name],
        rule=rule,
    )


# Other conditions ----------------------------------------------------------------------------

EDGES = tuple(
    spec
    for spec in GPU_PROBLEMS
    if spec.name
    in (
        "conv-k3s2",
        "conv-groups3-narrow",
        "transposed-k2s2",
        "transposed-d2s3",
        "transposed-c10-c149",
    )
)


@pytest.fixture
def everything_is_wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans as for tensors of 2**31 elements; none of them is remembered."""
    monkeypatch.setattr(plans, "_INT32_LIMIT", 1)
    calls.forget()
    yield
    calls.forget()


@pytest.mark.usefixtures("everything_is_wide")
@pytest.mark.parametrize(("spec", "cc"), zip(EDGES, itertools.cycle(ARCHITECTURES)), ids=str)
def test_64_bit_offsets(spec: ConvSpec, cc: int) -> None:
    """The code for tensors of 2**31 elements and more gives the same on small ones."""
    with tritonsim.simulated(cc) as simulator:
        tensors = spec.make_tensors(torch.float16)
        assert_results_match(spec, tensors, run_fused(spec, tensors, backend="triton"))
    wide = {launch.name: launch.arguments.get("WIDE", True) for launch in simulator.launches}
    assert all(wide.values()), wide


@pytest.mark.parametrize("spec", EDGES, ids=str)
def test_tensors_off_a_16_byte_boundary(spec: ConvSpec) -> None:
    check(spec, "fp16", 90, "channels_last", misalign=2)


@pytest.mark.parametrize("spec", EDGES, ids=str)
def test_ones_as_constants(spec: ConvSpec) -> None:
    """Inductor launches with every argument that equals 1 folded into the code."""
    small = replace(spec, n=1)
    check(small, "bf16", 80, "channels_last", ones_are_constants=True)
    if spec.groups == 1:
        pixel = replace(small, h=1, w=1, kernel=(1, 1), stride=(1, 1), dilation=(1, 1))
        pixel = replace(pixel, padding=(0, 0), output_padding=(0, 0))
        check(pixel, "bf16", 90, "channels_last", ones_are_constants=True)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "offset", "odd_strides", "expanded"])
def test_any_strides(layout: str) -> None:
    for name in ("conv-k3s2", "transposed-k2s2"):
        spec = next(spec for spec in GPU_PROBLEMS if spec.name == name)
        check(spec, "fp16", 80, layout)


@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_masks_where_kernels_load(op: Any, activation: Any) -> None:
    """Products without taps to spare mask the gradient in the kernels, not in a pass before them;
    the bias gradient of the convolution falls out of wgrad.
    """
    spec = ConvSpec("1x1", op, 2, 24, 40, 5, 6, (1, 1), activation=activation, slope=0.2)
    kernels = check(spec, "fp16", 90, "channels_last")
    expected = ["igemm_kernel", "igemm_kernel", "wgrad_kernel"]
    if op == "conv_transpose2d":
        expected.insert(1, "mask_kernel")
    assert kernels == expected


@pytest.mark.parametrize("arithmetic", ["fp16", "tf32"])
def test_results_do_not_depend_on_timing(arithmetic: str) -> None:
    """Bitwise the same for other orders of the warps, with sums over several splits."""
    dtype, _ = choose(arithmetic)
    spec = ConvSpec("splits", "conv2d", 1, 16, 24, 40, 32, (3, 3), padding=(1, 1))
    tensors = spec.make_tensors(dtype, input_layout="channels_last")
    results = []
    for schedule in (None, 1):
        with tritonsim.simulated(90, schedule=schedule) as simulator:
            wanted = ("weight", "bias")
            results.append(run_fused(spec, tensors, backend="triton", requires_grad=wanted))
    assert "reduce_kernel" in [launch.name for launch in simulator.launches]
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


def test_activation_edges() -> None:
    """relu(NaN) = NaN, relu(-inf) = 0, leaky(-inf) = -inf; masks stop infinite gradients."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 2.0]).reshape(1, 1, 1, 8).half()
    w = torch.ones(1, 1, 1, 1).half()
    for slope in (0.0, 0.5):
        params = ([1, 1], [0, 0], [1, 1], 1, slope)
        with tritonsim.simulated(90):
            op = torch.ops.segpose_triton
            y = op.conv2d_act(x, w, None, *params)
            grad = torch.full_like(x, inf)
            gx, _, _ = op.conv2d_act_backward(grad, y, x, w, *params, True, False, False)
        act = torch.nn.functional.leaky_relu(x.float(), slope) if slope else x.float().relu()
        torch.testing.assert_close(y.float(), act, rtol=0, atol=0, equal_nan=True)
        expected = torch.where(y <= 0, grad * slope, grad) if slope else grad.masked_fill(y <= 0, 0)
        expected[..., 0] = inf if slope == 0 else inf * slope
        torch.testing.assert_close(gx, expected, rtol=0, atol=0, equal_nan=True)
