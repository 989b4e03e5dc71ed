# SPDX-License-Identifier: BSD-3-Clause
"""Shapes, memory formats and autograd subsets: what a caller sees besides the numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import conv2d_act
from segpose_kernels.testing.fused import OPERANDS, call_fused, run_fused
from segpose_kernels.testing.numerics import TOLERANCES, assert_results_match
from segpose_kernels.testing.problems import ConvSpec, as_layout, by_name
from segpose_kernels.testing.spec import Activation

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = tuple(TOLERANCES)
BOTH = (by_name("conv-k3s2"), by_name("transposed-k4s2"))
FORMAT_PROBLEMS = (
    *BOTH,
    by_name("conv-groups2"),
    by_name("conv-k1s1"),
    by_name("conv-depthwise"),
    by_name("conv-c1-c1"),
    by_name("conv-one-row"),
    by_name("conv-to-1pixel"),
    by_name("conv-empty-batch"),
    by_name("transposed-k2s2"),
    by_name("transposed-groups2"),
    by_name("transposed-c1-c1"),
    by_name("transposed-1pixel-k5s3"),
    by_name("transposed-empty-batch"),
)


def eager_output(spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    function = F.conv_transpose2d if spec.transposed else F.conv2d
    y = function(x, w, b, **spec.attributes)
    return y if spec.activation == "none" else F.leaky_relu(y, spec.slope)


def dense_strides(shape: torch.Size, channels_last: bool) -> tuple[int, ...]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layouts", itertools.product(("contiguous", "channels_last"), repeat=2), ids="-".join
)
@pytest.mark.parametrize("spec", FORMAT_PROBLEMS, ids=str)
def test_output_format_is_torchs(
    spec: ConvSpec, layouts: tuple[str, str], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """channels_last if input or weight is; strides equal to those of torch's own result."""
    tensors = spec.make_tensors(
        dtype, generator=generator, input_layout=layouts[0], weight_layout=layouts[1]
    )
    actual = call_fused(spec, tensors.input, tensors.weight, tensors.bias)
    reference = eager_output(spec, tensors.input, tensors.weight, tensors.bias)
    # A dimension of one element has no order in memory: torch itself is not consistent there.
    strides = [
        (a, r)
        for a, r, size in zip(actual.stride(), reference.stride(), actual.shape, strict=True)
        if size > 1
    ]
    if actual.numel():
        assert all(a == r for a, r in strides), (actual.stride(), reference.stride())
    assert actual.shape == reference.shape
    channels_last = torch.channels_last
    assert actual.is_contiguous() or actual.is_contiguous(memory_format=channels_last)


@pytest.mark.parametrize(
    "layouts", itertools.product(("contiguous", "channels_last", "sliced"), repeat=2), ids="-".join
)
@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_gradient_formats(
    spec: ConvSpec, layouts: tuple[str, str], generator: torch.Generator
) -> None:
    """grad_input in the output's format, grad_weight in the weight's, whatever came in."""
    channels_last = "channels_last" in layouts
    for grad_layout in ("contiguous", "channels_last", "sliced"):
        tensors = spec.make_tensors(
            generator=generator,
            input_layout=layouts[0],
            weight_layout=layouts[1],
            grad_layout=grad_layout,
        )
        results = run_fused(spec, tensors)
        grad_input, grad_weight = results["grad_input"], results["grad_weight"]
        assert grad_input.stride() == dense_strides(grad_input.shape, channels_last)
        assert grad_weight.stride() == torch.empty_like(tensors.weight).stride()
        assert results["grad_bias"].stride() == (1,)


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_sliced_channels_last_keeps_the_format(spec: ConvSpec, generator: torch.Generator) -> None:
    """A channels_last tensor cut along H and C is still one to torch, though not dense."""
    tensors = spec.make_tensors(generator=generator)
    n, c, h, w = spec.input_shape
    larger = torch.randn(n, c + 3, h + 2, w).contiguous(memory_format=torch.channels_last)
    view = larger[:, 1 : c + 1, 1 : h + 1].copy_(tensors.input)
    tensors = replace(tensors, input=view)
    results = run_fused(spec, tensors)
    assert_results_match(spec, tensors, results)
    expected = eager_output(spec, tensors.input, tensors.weight, tensors.bias)
    assert results["output"].stride() == expected.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        replace(by_name("transposed-k4s2"), h=9, w=23, c_in=24, c_out=37, bias=True),
        replace(by_name("transposed-k2s2"), h=8, w=8, c_in=64, c_out=64),
        replace(by_name("conv-k3s2"), stride=(1, 1), h=21, w=19, c_in=32, c_out=45),
        # In float64 its result is too large to be written twice.
        replace(by_name("transposed-k2s2"), n=1, h=1030, w=1024, c_in=2, c_out=9),
    ],
    ids=["phases", "whole-vectors", "winograd", "large"],
)
def test_both_formats_hold_the_same_values(
    spec: ConvSpec, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """To the bit: a result in the default format is one in channels_last, transposed."""
    tensors = spec.make_tensors(dtype, generator=generator)
    operands = tensors.input, tensors.weight, tensors.bias
    contiguous = call_fused(spec, *operands)
    last = call_fused(spec, as_layout(tensors.input, "channels_last"), *operands[1:])
    assert contiguous.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous, last)


@pytest.mark.parametrize("size_one", ["batch", "channels", "pixels"])
@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_strides_of_size_one_dimensions_mean_nothing(
    spec: ConvSpec, size_one: str, generator: torch.Generator
) -> None:
    if size_one == "batch":
        spec = replace(spec, n=1)
    elif size_one == "channels":
        spec = replace(spec, c_in=1, c_out=1)
    else:
        spec = replace(spec, h=1, w=1, padding=(1, 1), kernel=(3, 3))
    tensors = spec.make_tensors(generator=generator)
    odd = replace(
        tensors,
        input=as_layout(tensors.input, "odd_strides"),
        weight=as_layout(tensors.weight, "odd_strides"),
        grad_output=as_layout(tensors.grad_output, "odd_strides"),
    )
    plain_results, odd_results = run_fused(spec, tensors), run_fused(spec, odd)
    for name, expected in plain_results.items():
        assert torch.equal(odd_results[name], expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_unbatched(spec: ConvSpec, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A 3-D input gives a 3-D output and gradient with the numbers of a batch of one."""
    spec = replace(spec, n=1)
    tensors = spec.make_tensors(dtype, generator=generator)
    expected = run_fused(spec, tensors)
    x = tensors.input[0].clone().requires_grad_()
    y = call_fused(spec, x, tensors.weight, tensors.bias)
    (grad,) = torch.autograd.grad(y, x, tensors.grad_output[0])
    assert y.shape == spec.output_shape[1:]
    assert torch.equal(y, expected["output"][0])
    assert torch.equal(grad, expected["grad_input"][0])


@pytest.mark.parametrize("spec", BOTH, ids=str)
@pytest.mark.parametrize(
    "subset",
    [s for k in (1, 2, 3) for s in itertools.combinations(OPERANDS, k)],
    ids="-".join,
)
def test_every_subset_of_requires_grad(
    spec: ConvSpec, subset: tuple[str, ...], generator: torch.Generator
) -> None:
    """Each of the seven subsets gives the gradients asked for, bitwise those of the full call."""
    tensors = spec.make_tensors(generator=generator)
    full = run_fused(spec, tensors)
    results = run_fused(spec, tensors, requires_grad=subset)
    assert set(results) == {"output", *(f"grad_{name}" for name in subset)}
    for name, value in results.items():
        assert torch.equal(value, full[name]), name
    leaves = {
        name: getattr(tensors, name).detach().clone().requires_grad_(name in subset)
        for name in OPERANDS
    }
    y = call_fused(spec, leaves["input"], leaves["weight"], leaves["bias"])
    y.backward(tensors.grad_output)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in subset), name


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_modes_without_gradients(spec: ConvSpec, generator: torch.Generator) -> None:
    tensors = spec.make_tensors(generator=generator)
    x, w, b = tensors.input.requires_grad_(), tensors.weight.requires_grad_(), tensors.bias
    expected = call_fused(spec, x, w, b)
    assert expected.requires_grad
    with torch.no_grad():
        y = call_fused(spec, x, w, b)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    with torch.inference_mode():
        y = call_fused(spec, x, w, b)
        assert y.is_inference()
        # A tensor made inside as well.
        doubled = call_fused(spec, x.detach() * 2, w, b)
    assert torch.equal(y, expected)
    assert doubled.is_inference()
    assert not call_fused(spec, x.detach(), w.detach(), b).requires_grad


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_saved_tensors(spec: ConvSpec, activation: Activation, generator: torch.Generator) -> None:
    """Backward keeps input, weight and, with an activation, the output itself: no copy of any."""
    spec = replace(spec, activation=activation)
    tensors = spec.make_tensors(generator=generator)
    x, w = tensors.input.requires_grad_(), tensors.weight.requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call_fused(spec, x, w, tensors.bias)
    allowed = {x.data_ptr(), w.data_ptr()} | ({y.data_ptr()} if activation != "none" else set())
    assert {t.data_ptr() for t in saved} <= allowed


@pytest.mark.parametrize("shape", [(12, 10, 3), (1, 10, 3), (12, 1, 3), (12, 10, 1)], ids=str)
def test_one_image_of_pixels(shape: tuple[int, int, int]) -> None:
    """As cameras give it, [H, W, C]: the fake and torch tell the format by the same strides."""
    x, weight = torch.rand(shape).permute(2, 0, 1)[None], torch.randn(8, shape[2], 3, 3)
    expected = F.conv2d(x, weight, padding=1)
    y = conv2d_act(x, weight, padding=1)
    fake = conv2d_act(x.to("meta"), weight.to("meta"), padding=1)
    assert y.stride() == fake.stride()
    assert y.is_contiguous() == expected.is_contiguous()
    compiled = torch.compile(
        lambda x: conv2d_act(x, weight, padding=1) * 2, fullgraph=True, backend="aot_eager"
    )
    assert compiled(x).stride() == y.stride()
