# SPDX-License-Identifier: BSD-3-Clause
"""The registered operators themselves: what they skip, what they allocate, and how they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from segpose_kernels import backends
from segpose_kernels.testing.counters import OperatorCounter
from segpose_kernels.testing.numerics import Reference, assert_close_to_reference
from segpose_kernels.testing.problems import ConvSpec, ConvTensors, by_name

pytestmark = pytest.mark.usefixtures("poison")

SPECS = (by_name("conv-k3s2"), by_name("transposed-k4s2"))


def geometry(spec: ConvSpec) -> list[Any]:
    """Attributes in the schema's order, the slope last."""
    shared: list[Any] = [list(spec.stride), list(spec.padding)]
    if spec.transposed:
        return [*shared, list(spec.output_padding), spec.groups, list(spec.dilation), spec.op_slope]
    return [*shared, list(spec.dilation), spec.groups, spec.op_slope]


def forward(spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None, *attributes: Any) -> Tensor:
    op: Callable[..., Tensor] = getattr(torch.ops.segpose, f"{spec.op}_act")
    return op(x, w, b, *(attributes or geometry(spec)))


def backward(
    spec: ConvSpec,
    grad: Tensor,
    output: Tensor | None,
    x: Tensor,
    w: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    op: Callable[..., tuple[Tensor, Tensor, Tensor]]
    op = getattr(torch.ops.segpose, f"{spec.op}_act_backward")
    return op(grad, output, x, w, *geometry(spec), *needs)


@pytest.fixture(params=SPECS, ids=str)
def spec(request: pytest.FixtureRequest) -> ConvSpec:
    chosen: ConvSpec = request.param
    return chosen


@pytest.fixture
def tensors(spec: ConvSpec, generator: torch.Generator) -> ConvTensors:
    return spec.make_tensors(generator=generator)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_backward_gives_what_is_needed(
    spec: ConvSpec, tensors: ConvTensors, needs: tuple[bool, bool, bool]
) -> None:
    """A gradient that is not needed is an empty tensor of shape (0,)."""
    reference = Reference(spec, tensors)
    output = forward(spec, tensors.input, tensors.weight, tensors.bias)
    grads = backward(spec, tensors.grad_output, output, tensors.input, tensors.weight, needs)
    for name, grad, needed in zip(("input", "weight", "bias"), grads, needs, strict=True):
        if needed:
            assert_close_to_reference(f"grad_{name}", grad, reference.results[f"grad_{name}"])
        else:
            assert tuple(grad.shape) == (0,), name
            assert grad.dtype == tensors.input.dtype


def test_results_are_allocated_through_torch(spec: ConvSpec, tensors: ConvTensors) -> None:
    """Poisoning reaches the results: each comes from an allocation that torch fills with NaN."""
    with OperatorCounter() as counter:
        output = forward(spec, tensors.input, tensors.weight, tensors.bias)
        backward(spec, tensors.grad_output, output, tensors.input, tensors.weight)
    fills = counter.counts["aten::fill_"]
    assert fills >= 4, dict(counter.counts)


def test_only_own_kernels_run(spec: ConvSpec, tensors: ConvTensors) -> None:
    with OperatorCounter() as counter:
        output = forward(spec, tensors.input, tensors.weight, tensors.bias)
        backward(spec, tensors.grad_output, output, tensors.input, tensors.weight)
    assert counter.of("segpose::") == {
        f"segpose::{spec.op}_act": 1,
        f"segpose::{spec.op}_act_backward": 1,
    }
    assert counter.aten_compute == {}


def test_fakes_have_the_kernels_strides(spec: ConvSpec, tensors: ConvTensors) -> None:
    for x, w in itertools.product(
        (tensors.input, tensors.input.contiguous(memory_format=torch.channels_last)),
        (tensors.weight, tensors.weight.contiguous(memory_format=torch.channels_last)),
    ):
        output = forward(spec, x, w, tensors.bias)
        grads = backward(spec, tensors.grad_output, output, x, w)
        meta = [t.to("meta") for t in (x, w, tensors.grad_output)]
        meta_bias = None if tensors.bias is None else tensors.bias.to("meta")
        fake_output = forward(spec, meta[0], meta[1], meta_bias)
        fake_grads = backward(spec, meta[2], fake_output, meta[0], meta[1])
        for real, fake in zip((output, *grads), (fake_output, *fake_grads), strict=True):
            assert (real.shape, real.stride()) == (fake.shape, fake.stride())


def filter_layouts(w: Tensor) -> dict[str, Tensor]:
    """The same filter in memory of several orders; where extents are one, these are ambiguous."""
    strides = [7 if size == 1 else stride for size, stride in zip(w.shape, w.stride(), strict=True)]
    return {
        "contiguous": w,
        "channels_last": w.contiguous(memory_format=torch.channels_last),
        "reversed": w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "odd": w.as_strided(w.shape, strides),
        "sliced": torch.randn([size + 1 for size in w.shape])[tuple(map(slice, w.shape))],
        "expanded": w[:, :, :1, :1].expand(w.shape),
    }


@pytest.mark.parametrize("extents", list(itertools.product((1, 3), repeat=4)), ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_fakes_have_the_strides_of_extents_of_one(
    transposed: bool, extents: tuple[int, int, int, int]
) -> None:
    outer, inner, *kernel = extents
    shape = (2, outer if transposed else inner, 4, 3)
    spec = replace(by_name("transposed-k2s2" if transposed else "conv-k1s1"), padding=(0, 0))
    for name, w in filter_layouts(torch.randn(outer, inner, *kernel)).items():
        for x in (torch.randn(shape), torch.randn(shape).to(memory_format=torch.channels_last)):
            output = forward(spec, x, w, None)
            grads = backward(spec, torch.ones_like(output), output, x, w)
            for mode in (torch.device("meta"), FakeTensorMode()):
                with mode:
                    fake_x, fake_w = (torch.empty_strided(t.shape, t.stride()) for t in (x, w))
                    fake_output = forward(spec, fake_x, fake_w, None)
                    given = torch.ones_like(fake_output), fake_output, fake_x, fake_w
                    fake_grads = backward(spec, *given)
                for real, fake in zip((output, *grads), (fake_output, *fake_grads), strict=True):
                    assert (real.shape, real.stride()) == (fake.shape, fake.stride()), name


def malformed(spec: ConvSpec) -> dict[str, tuple[Any, ...]]:
    """Calls of the forward operator that no caller may make, by what is wrong with each."""
    t = spec.make_tensors()
    x, w, b = t.input, t.weight, t.bias
    assert b is not None
    wide = torch.randn(spec.n, spec.c_in + 1, spec.h, spec.w)
    names = ["stride", "padding", "output_padding", "groups", "dilation", "slope"]
    if not spec.transposed:
        names = ["stride", "padding", "dilation", "groups", "slope"]

    def attribute(name: str, value: Any) -> tuple[Any, ...]:
        changed = geometry(spec)
        changed[names.index(name)] = value
        return (x, w, b, *changed)

    cases: dict[str, tuple[Any, ...]] = {
        "3-D input": (x[0], w, b),
        "5-D input": (x[None], w, b),
        "3-D weight": (x, w[0], b),
        "channels": (wide, w, b),
        "bias length": (x, w, torch.randn(spec.c_out + 1)),
        "bias dimensions": (x, w, torch.randn(spec.c_out, 1)),
        "weight dtype": (x, w.double(), b),
        "bias dtype": (x, w, b.double()),
        "integer dtype": (x.int(), w.int(), b.int()),
        "complex dtype": (x + 0j, w + 0j, b + 0j),
        "empty kernel": (x, w[..., :0], b),
        "empty extent": (x[..., :0], w, b),
        "no output channels": ((x, w[:, :0], b[:0]) if spec.transposed else (x, w[:0], b[:0])),
        "stride 0": attribute("stride", [0, 1]),
        "stride -1": attribute("stride", [1, -1]),
        "one stride of three": attribute("stride", [1, 1, 1]),
        "padding -1": attribute("padding", [-1, 0]),
        "dilation 0": attribute("dilation", [1, 0]),
        "groups 0": attribute("groups", 0),
        "groups -1": attribute("groups", -1),
        "groups that do not divide": attribute("groups", 2),
        "output too small": (
            attribute("padding", [50, 50]) if spec.transposed else attribute("dilation", [50, 50])
        ),
        "dilation 2**40": attribute("dilation", [2**40, 2**40]),
        "padding 2**63 - 1": attribute("padding", [2**63 - 1, 0]),
        "stride 2**31": attribute("stride", [2**31, 1]),
        "more elements than 2**60": (
            attribute("dilation", [2**31 - 1, 2**31 - 1])
            if spec.transposed
            else attribute("padding", [2**31 - 1, 2**31 - 1])
        ),
    }
    if spec.transposed:
        cases["output_padding -1"] = attribute("output_padding", [0, -1])
        cases["output_padding over stride and dilation"] = attribute("output_padding", [2, 2])
    return cases


@pytest.mark.parametrize("fault", sorted(malformed(SPECS[0]) | malformed(SPECS[1])))
def test_malformed_forward_raises(spec: ConvSpec, fault: str) -> None:
    """A bad call is an exception with a sentence, never a crash or a number."""
    cases = malformed(spec)
    if fault not in cases:
        pytest.skip(f"{fault} does not apply to {spec.op}")
    x, w, b, *attributes = cases[fault]
    with pytest.raises(RuntimeError) as raised:
        forward(spec, x, w, b, *attributes)
    assert len(str(raised.value)) > 10


@pytest.mark.parametrize(
    "fault",
    ["no output", "grad shape", "grad 3-D", "grad dtype", "output shape", "output dtype", "input"],
)
def test_malformed_backward_raises(spec: ConvSpec, tensors: ConvTensors, fault: str) -> None:
    output: Tensor | None = forward(spec, tensors.input, tensors.weight, tensors.bias)
    grad, x = tensors.grad_output, tensors.input
    assert output is not None
    if fault == "no output":
        output = None
    elif fault == "grad shape":
        grad = grad[:, :, :-1]
    elif fault == "grad 3-D":
        grad = grad[0]
    elif fault == "grad dtype":
        grad = grad.double()
    elif fault == "output shape":
        output = output[:, :, :, :-1]
    elif fault == "output dtype":
        output = output.double()
    else:
        x = x[:, :-1]
    with pytest.raises(RuntimeError):
        backward(spec, grad, output, x, tensors.weight)


def test_library_is_loaded() -> None:
    """These tests mean something only with the compiled library; say so before the rest fails."""
    assert hasattr(torch.ops.segpose, "conv2d_act"), f"not loaded: {vars(backends)}"
