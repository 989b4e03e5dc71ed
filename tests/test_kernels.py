# SPDX-License-Identifier: BSD-3-Clause
"""The kernels on every named problem: output and each gradient by name against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from segpose_kernels.testing.fused import OPERANDS, call_fused, run_fused
from segpose_kernels.testing.numerics import TOLERANCES, assert_results_match
from segpose_kernels.testing.problems import (
    AUTOENCODER,
    CPM2DPOSE,
    GEOMETRIES,
    KERNEL_PROBLEMS,
    LAYOUTS,
    SEGNET,
    TRANSPOSED,
    ConvSpec,
    by_name,
)
from segpose_kernels.testing.spec import Activation

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = tuple(TOLERANCES)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("spec", KERNEL_PROBLEMS, ids=str)
def test_output_and_gradients_match_float64(
    spec: ConvSpec, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    tensors = spec.make_tensors(
        dtype,
        generator=generator,
        input_layout=layout,
        weight_layout=layout,
        grad_layout=layout,
    )
    assert_results_match(spec, tensors, run_fused(spec, tensors))


# A subset for one run per instruction set: a wide and a narrow channel count, ragged extents, an
# empty phase, groups, depthwise and dilation, in both operators.
COMPACT = tuple(
    by_name(name)
    for name in (
        "conv-k3s2",
        "conv-k7s1",
        "conv-d2s3",
        "conv-groups2",
        "conv-depthwise",
        "conv-c21-c149",
        "conv-c1-c1",
        "transposed-k2s3",
        "transposed-k4s2",
        "transposed-d2s2",
        "transposed-depthwise",
        "transposed-c149-c21",
        "transposed-c1-c1",
        "transposed-empty-batch",
    )
)


@pytest.mark.compact
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("spec", COMPACT, ids=str)
def test_each_activation(
    spec: ConvSpec, activation: Activation, dtype: torch.dtype, generator: torch.Generator
) -> None:
    spec = replace(spec, activation=activation, slope=0.2)
    tensors = spec.make_tensors(dtype, generator=generator)
    assert_results_match(spec, tensors, run_fused(spec, tensors))


def vector_remainders() -> tuple[ConvSpec, ...]:
    """Output and input channels and widths around the multiples of 8, 16 and 32 that tiles have."""
    counts = (7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65)
    conv = by_name("conv-k3s1")
    transposed = by_name("transposed-k4s2")
    specs = []
    for i, count in enumerate(counts):
        other = counts[(i * 5 + 3) % len(counts)]
        for base in (conv, transposed):
            name = f"{base.op}-c{other}-c{count}"
            width = 2 + count % 13
            specs.append(replace(base, name=name, n=1, c_in=other, c_out=count, w=width))
    return tuple(specs)


@pytest.mark.compact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("spec", vector_remainders(), ids=str)
def test_ragged_tiles(spec: ConvSpec, dtype: torch.dtype, generator: torch.Generator) -> None:
    tensors = spec.make_tensors(dtype, generator=generator, input_layout="channels_last")
    assert_results_match(spec, tensors, run_fused(spec, tensors))


LAYOUT_PROBLEMS = tuple(
    by_name(name)
    for name in (
        "conv-k3s2",
        "conv-groups2",
        "conv-depthwise",
        "conv-k1s1",
        "conv-c1-c1",
        "conv-one-row",
        "transposed-k4s2",
        "transposed-k2s2",
        "transposed-groups2",
        "transposed-1pixel-k5s3",
        "transposed-c1-c1",
    )
)


@pytest.mark.parametrize("operand", ["input", "weight", "grad"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
@pytest.mark.parametrize("spec", LAYOUT_PROBLEMS, ids=str)
def test_any_strides(spec: ConvSpec, layout: str, operand: str, generator: torch.Generator) -> None:
    """Slices, offsets, stride 0 and meaningless strides of one operand; the neighbours are NaN."""
    layouts: dict[str, Any] = {f"{operand}_layout": layout}
    tensors = spec.make_tensors(generator=generator, **layouts)
    assert_results_match(spec, tensors, run_fused(spec, tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    "layouts", itertools.product(("channels_last", "sliced"), repeat=3), ids="-".join
)
@pytest.mark.parametrize("spec", LAYOUT_PROBLEMS[::3], ids=str)
def test_mixed_layouts(
    spec: ConvSpec, layouts: tuple[str, str, str], dtype: torch.dtype, generator: torch.Generator
) -> None:
    input_layout, weight_layout, grad_layout = layouts
    tensors = spec.make_tensors(
        dtype,
        generator=generator,
        input_layout=input_layout,
        weight_layout=weight_layout,
        grad_layout=grad_layout,
    )
    assert_results_match(spec, tensors, run_fused(spec, tensors))


@pytest.mark.parametrize("spec", [by_name("conv-k3s2"), by_name("transposed-k4s2")], ids=str)
def test_gradient_of_a_sum(spec: ConvSpec, generator: torch.Generator) -> None:
    """`y.sum().backward()` sends one number with stride 0 in every dimension."""
    tensors = spec.make_tensors(generator=generator)
    ones = torch.ones(()).expand(spec.output_shape)
    tensors = replace(tensors, grad_output=ones)
    assert ones.stride() == (0, 0, 0, 0)
    assert_results_match(spec, tensors, run_fused(spec, tensors))
    leaves = [t.detach().requires_grad_() for t in (tensors.input, tensors.weight)]
    call_fused(spec, leaves[0], leaves[1], tensors.bias).sum().backward()
    results = {f"grad_{n}": t.grad for n, t in zip(OPERANDS, leaves, strict=False)}
    assert_results_match(spec, tensors, {n: g for n, g in results.items() if g is not None})


@pytest.mark.parametrize("spec", [by_name("conv-k3s2"), by_name("transposed-k4s2")], ids=str)
def test_operands_that_share_memory(spec: ConvSpec, generator: torch.Generator) -> None:
    """One tensor as both input and weight is read, never written."""
    square = replace(spec, n=5, c_in=5, c_out=5, h=spec.kernel[0], w=spec.kernel[1], bias=False)
    square = replace(square, padding=(0, 0))
    tensors = square.make_tensors(generator=generator)
    tensors = replace(tensors, input=tensors.weight)
    before = tensors.weight.clone()
    assert_results_match(square, tensors, run_fused(square, tensors))
    assert torch.equal(tensors.weight, before)


@pytest.mark.parametrize("spec", [by_name("conv-groups2"), by_name("transposed-d2s3")], ids=str)
def test_operands_are_not_written(spec: ConvSpec, generator: torch.Generator) -> None:
    tensors = spec.make_tensors(generator=generator)
    operands = [tensors.input, tensors.weight, tensors.bias, tensors.grad_output]
    before = [t.clone() for t in operands if t is not None]
    run_fused(spec, tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, operands, strict=True) if b is not None)


# Channels of the real layers on small maps: long reductions and many blocks of channels.
DEEP = tuple(
    replace(spec, name=f"{spec.name}-deep", n=min(spec.n, 2), h=min(spec.h, 8), w=min(spec.w, 7))
    for spec in (
        by_name("cpm-conv4_1"),
        by_name("cpm-conv5_1"),
        by_name("cpm-conv6_1"),
        by_name("segnet-encoder3"),
        by_name("transposed-simple-baseline-1"),
        by_name("transposed-unet-bottom"),
        by_name("transposed-dcgan-1"),
        by_name("transposed-fcn-x8"),
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("spec", DEEP, ids=str)
def test_deep_channels(spec: ConvSpec, dtype: torch.dtype, generator: torch.Generator) -> None:
    tensors = spec.make_tensors(dtype, generator=generator)
    assert_results_match(spec, tensors, run_fused(spec, tensors))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", dict.fromkeys((*AUTOENCODER, *SEGNET, *CPM2DPOSE, *TRANSPOSED)), ids=str
)
def test_full_extent(spec: ConvSpec, generator: torch.Generator) -> None:
    tensors = spec.make_tensors(generator=generator)
    assert_results_match(spec, tensors, run_fused(spec, tensors))


def test_problems_cover_what_they_promise() -> None:
    """The table keeps its edges when someone edits it."""
    kernel_strides = {(s.kernel[0], s.stride[0]) for s in GEOMETRIES if s.transposed}
    assert {(1, 1), (2, 2), (3, 1), (3, 2), (4, 2), (5, 2), (7, 1), (2, 3)} <= kernel_strides
    for op in ("conv2d", "conv_transpose2d"):
        specs = [s for s in GEOMETRIES if s.op == op]
        assert {0, 1, 3} <= {s.n for s in specs}
        assert {1, 3, 10, 21, 149} <= {c for s in specs for c in (s.c_in, s.c_out)}
        assert {(2, 2), (2, 3)} <= {(s.dilation[0], s.stride[0]) for s in specs}
        assert any(s.groups == 2 for s in specs)
        assert {1, 2} <= {s.c_out // s.c_in for s in specs if s.groups == s.c_in > 1}
        assert any(s.padding[0] > s.kernel[0] for s in specs)
        assert any((s.h, s.w) == (1, 1) for s in specs)
    assert any(s.output_padding[0] >= s.stride[0] for s in GEOMETRIES)
    names = [s.name for s in (*KERNEL_PROBLEMS, *AUTOENCODER, *SEGNET, *CPM2DPOSE, *TRANSPOSED)]
    assert len(set(names)) == len(names)


def test_work_of_the_models() -> None:
    """Counts that the literature and the lecture's model give, in GFLOP."""
    assert sum(s.flops for s in CPM2DPOSE) / 1e9 == pytest.approx(60.3, abs=0.05)
    stated = (0.013, 0.029, 0.036, 0.822, 0.437, 0.805, 1.611, 0.026, 1.074, 1.074, 4.295, 1.074)
    assert [round(s.flops / 1e9, 3) for s in TRANSPOSED] == [*stated, 0.231]
