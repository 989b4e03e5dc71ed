# SPDX-License-Identifier: BSD-3-Clause
"""The public functions: argument forms, padding strings, memory formats, activations, backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segpose_kernels
from segpose_kernels import backends, conv2d_act, conv_transpose2d_act
from segpose_kernels.reference import (
    activate,
    conv2d_act_reference,
    conv_transpose2d_act_reference,
)

ACTIVATIONS = ("none", "relu", "leaky_relu")
# torch's own operator warns that it copies the input, in every call that asks for this.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

LOW_PRECISION = (torch.bfloat16, torch.float16)

CONV_CALLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ints": {"stride": 2, "padding": 1, "dilation": 2},
    "tuples": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "lists": {"stride": [1, 2], "padding": [0, 1]},
    "one-element": {"stride": (2,), "padding": [1]},
    "size": {"padding": torch.Size([1, 2])},
    "tensor": {"stride": torch.tensor(2)},
    "valid": {"padding": "valid", "stride": 2},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": (2, 3)},
}

TRANSPOSED_CALLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ints": {"stride": 2, "padding": 1, "output_padding": 1},
    "tuples": {"stride": (2, 3), "padding": (0, 1), "output_padding": (1, 2), "dilation": (2, 1)},
    "output_padding-below-dilation": {"stride": 2, "output_padding": 2, "dilation": 3},
    "lists": {"stride": [1, 2], "dilation": [2, 1]},
    "one-element": {"stride": (2,), "output_padding": [1]},
}


def close(name: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{name}: {text}")
    assert actual.stride() == expected.stride(), f"{name}: {actual.stride()}, {expected.stride()}"


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("call", CONV_CALLS.values(), ids=CONV_CALLS)
def test_conv2d_arguments_as_torch(call: dict[str, Any], bias: bool) -> None:
    x, w, b = draw(2, 3, 9, 8), draw(4, 3, 3, 2), draw(4) if bias else None
    close(
        "output",
        conv2d_act(x, w, b, **call, negative_slope=0.2),
        conv2d_act_reference(x, w, b, **call, negative_slope=0.2),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("call", TRANSPOSED_CALLS.values(), ids=TRANSPOSED_CALLS)
def test_conv_transpose2d_arguments_as_torch(call: dict[str, Any], bias: bool) -> None:
    x, w, b = draw(2, 3, 5, 4), draw(3, 4, 3, 2), draw(4) if bias else None
    close(
        "output",
        conv_transpose2d_act(x, w, b, **call, negative_slope=0.2),
        conv_transpose2d_act_reference(x, w, b, **call, negative_slope=0.2),
    )


def test_positional_order_is_torchs() -> None:
    x, w = draw(2, 4, 6, 7), draw(6, 2, 3, 3)
    close(
        "conv2d",
        conv2d_act(x, w, None, 2, 1, 2, 2, activation="none"),
        F.conv2d(x, w, None, 2, 1, 2, 2),
    )
    w = draw(4, 3, 3, 3)
    close(
        "conv_transpose2d",
        conv_transpose2d_act(x, w, None, 2, 1, 1, 2, 2, activation="none"),
        F.conv_transpose2d(x, w, None, 2, 1, 1, 2, 2),
    )


@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (3, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)], ids=str)
def test_same_padding_with_even_kernels(kernel: tuple[int, int], dilation: Any) -> None:
    """An odd total is one more row or column after the input than before it."""
    x = draw(2, 3, 7, 6).requires_grad_()
    w = draw(4, 3, *kernel).requires_grad_()
    y = conv2d_act(x, w, padding="same", dilation=dilation, activation="none")
    expected = F.conv2d(x, w, padding="same", dilation=dilation)
    close("output", y, expected)
    grad = torch.randn_like(y)
    for name, ours, theirs in zip(
        ("grad_input", "grad_weight"),
        torch.autograd.grad(y, (x, w), grad),
        torch.autograd.grad(expected, (x, w), grad),
        strict=True,
    ):
        close(name, ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_unbatched_input(activation: str) -> None:
    x = draw(3, 6, 5)
    w = draw(4, 3, 3, 3)
    y = conv2d_act(x, w, padding=1, activation=activation)
    close("conv2d", y, conv2d_act_reference(x, w, padding=1, activation=activation))
    assert y.dim() == 3
    w = draw(3, 4, 3, 3)
    y = conv_transpose2d_act(x, w, stride=2, activation=activation)
    close(
        "conv_transpose2d", y, conv_transpose2d_act_reference(x, w, stride=2, activation=activation)
    )


@pytest.mark.parametrize("weight_last", [False, True], ids=["w-nchw", "w-nhwc"])
@pytest.mark.parametrize("input_last", [False, True], ids=["x-nchw", "x-nhwc"])
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_memory_format_follows_torchs_rule(op: str, input_last: bool, weight_last: bool) -> None:
    """Output and grad_input are channels_last if input or weight is; grad_weight is as weight."""
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    function = conv2d_act if op == "conv2d" else conv_transpose2d_act
    x = draw(2, 3, 6, 5).to(memory_format=formats[input_last]).requires_grad_()
    shape = (4, 3, 3, 2) if op == "conv2d" else (3, 4, 3, 2)
    w = draw(*shape).to(memory_format=formats[weight_last]).requires_grad_()
    y = function(x, w)
    grad_input, grad_weight = torch.autograd.grad(y, (x, w), torch.randn_like(y))
    expected = formats[input_last or weight_last]
    assert y.is_contiguous(memory_format=expected)
    assert grad_input.is_contiguous(memory_format=expected)
    assert grad_weight.stride() == w.stride()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_output_dtype(dtype: torch.dtype) -> None:
    x, w, b = draw(1, 3, 6, 6).to(dtype), draw(4, 3, 3, 3).to(dtype), draw(4).to(dtype)
    y = conv2d_act(x, w, b)
    assert y.dtype is dtype
    expected = conv2d_act_reference(x.double(), w.double(), b.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)


# Activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, -0.5, 0.3, 1.0, 2.5, math.nan], ids=str)
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_any_slope_gives_torchs_answer(op: str, slope: float) -> None:
    """A slope <= 0 has a mask that the sign of the output does not show."""
    function = conv2d_act if op == "conv2d" else conv_transpose2d_act
    reference = conv2d_act_reference if op == "conv2d" else conv_transpose2d_act_reference
    tensors = [draw(2, 3, 5, 5), draw(3, 3, 2, 2), draw(3)]
    for t in tensors:
        t.requires_grad_()
    y = function(*tensors, negative_slope=slope)
    expected = reference(*tensors, negative_slope=slope)
    torch.testing.assert_close(y, expected, equal_nan=True)
    grad = torch.randn_like(y)
    for name, ours, theirs in zip(
        ("grad_input", "grad_weight", "grad_bias"),
        torch.autograd.grad(y, tensors, grad),
        torch.autograd.grad(expected, tensors, grad),
        strict=True,
    ):
        torch.testing.assert_close(
            ours, theirs, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("slope", [None, 0.0, 0.1], ids=["relu", "leaky-0", "leaky-0.1"])
def test_edges_of_the_activation(slope: float | None) -> None:
    """relu(NaN) = NaN, relu(-inf) = 0, leaky_relu(-inf, 0) = NaN; and their gradients."""
    edges = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0], dtype=torch.float64)
    x = edges.reshape(1, 1, 1, -1).clone().requires_grad_()
    w = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    activation = "relu" if slope is None else "leaky_relu"
    slope = 0.0 if slope is None else slope
    for function in (conv2d_act, conv_transpose2d_act):
        y = function(x, w, activation=activation, negative_slope=slope)
        expected = activate(x * w, activation, slope)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
        (grad,) = torch.autograd.grad(y.sum(), x)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(grad, expected_grad, equal_nan=True, rtol=0, atol=0)


def test_integer_slope_is_a_number() -> None:
    x, w = draw(1, 2, 4, 4), draw(2, 2, 3, 3)
    close("output", conv2d_act(x, w, negative_slope=1), F.conv2d(x, w))


# Backends ------------------------------------------------------------------------------------


def test_backends_are_an_ordered_list_with_reasons() -> None:
    assert [backend.name for backend in backends.BACKENDS] == ["cuda", "triton", "cpu", "aten"]
    for backend in backends.BACKENDS:
        assert backend.missing is None or len(backend.missing) > 10


def test_auto_takes_the_first_that_supports_the_call() -> None:
    expected = "cpu" if backends.LIBRARY.loaded else "aten"
    assert backends.select("auto", "cpu", torch.float32) == expected
    assert backends.select("auto", "cpu", torch.int64) == "aten"
    assert backends.select("auto", "xpu", torch.float32) == "aten"
    assert backends.select("aten", "cpu", torch.float32) == "aten"


def test_library_is_loaded() -> None:
    """An installation whose library is missing passes nothing by falling back."""
    assert backends.LIBRARY.missing is None


@pytest.mark.parametrize("name", ["cpu", "aten"])
def test_named_backends_agree(name: str) -> None:
    x, w, b = draw(2, 3, 6, 5), draw(3, 4, 3, 3), draw(4)
    close(
        name,
        conv_transpose2d_act(x, w, b, 2, 1, 1, backend=name),
        conv_transpose2d_act_reference(x, w, b, 2, 1, 1),
    )


# Ids of their own: "cuda" alone is the mark of tests that need a device.
@pytest.mark.parametrize("name", ["cuda", "triton"], ids=["backend-cuda", "backend-triton"])
def test_a_backend_that_cannot_run_says_why(name: str) -> None:
    x, w = draw(1, 3, 5, 5), draw(4, 3, 3, 3)
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run this call: .{{10,}}"):
        conv2d_act(x, w, backend=name)


def test_cpu_backend_refuses_dtypes_without_kernels() -> None:
    x, w = torch.ones(1, 1, 3, 3, dtype=torch.int64), torch.ones(1, 1, 2, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="it computes bfloat16, float16, float32, float64"):
        conv2d_act(x, w, activation="relu", backend="cpu")
    close("auto", conv2d_act(x, w, activation="relu"), F.conv2d(x, w).relu())


def test_complex_runs_on_aten() -> None:
    x, w = draw(1, 2, 4, 4).to(torch.complex128), draw(2, 2, 3, 3).to(torch.complex128)
    close("output", conv2d_act(x, w, activation="none"), F.conv2d(x, w))


def test_meta_tensors_get_shapes() -> None:
    x, w = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(3, 4, 3, 3, device="meta")
    assert conv_transpose2d_act(x, w, stride=2).shape == (2, 4, 17, 17)


def test_torch_function_sees_one_call() -> None:
    """Symbolic tracing keeps the public function as one node."""

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return segpose_kernels.conv2d_act(x, w, stride=2, negative_slope=0.1)

    graph = torch.fx.symbolic_trace(Layer())
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [conv2d_act]
    x, w = draw(1, 3, 5, 5), draw(4, 3, 3, 3)
    close("traced", graph(x, w), conv2d_act(x, w, stride=2, negative_slope=0.1))


def test_zero_batch() -> None:
    x = draw(0, 3, 6, 5).requires_grad_()
    for w, function in ((draw(4, 3, 3, 3), conv2d_act), (draw(3, 4, 3, 3), conv_transpose2d_act)):
        w.requires_grad_()
        b = draw(4).requires_grad_()
        y = function(x, w, b)
        assert y.shape[:2] == (0, 4)
        grads = torch.autograd.grad(y.sum(), (x, w, b))
        for name, grad, leaf in zip(("input", "weight", "bias"), grads, (x, w, b), strict=True):
            close(f"grad_{name}", grad, torch.zeros_like(leaf))


def test_inference_mode_and_no_grad_give_the_same_numbers() -> None:
    x, w = draw(2, 3, 6, 5), draw(4, 3, 3, 3).requires_grad_()
    expected = conv2d_act(x, w)
    with torch.no_grad():
        y = conv2d_act(x, w)
        assert not y.requires_grad
    assert torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(conv2d_act(x, w), expected)
        with torch.enable_grad():
            assert torch.equal(conv2d_act(x, w), expected)


@pytest.mark.parametrize("backend", ["auto", "cpu", "aten"])
@pytest.mark.parametrize(("batch", "groups"), [(2, 1), (2, 2), (0, 1)])
def test_no_input_channels(backend: str, batch: int, groups: int) -> None:
    """As torch has it: a result without channels, and gradients of zero."""
    x, w, b = torch.randn(batch, 0, 6, 5), torch.randn(4, 0, 3, 3), torch.randn(4)
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    y = conv2d_act(x, w, b, groups=groups, backend=backend)
    expected = F.leaky_relu(F.conv2d(x, w, b, groups=groups))
    assert y.shape == expected.shape == (batch, 0, 4, 3)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    with torch.device("meta"):
        fake = conv2d_act(torch.empty(x.shape), torch.empty(w.shape), torch.empty(4), groups=groups)
    assert fake.shape == y.shape
    compiled = torch.compile(lambda x: conv2d_act(x, w, b, groups=groups), backend="aot_eager")
    assert compiled(x).shape == y.shape
    with pytest.raises(RuntimeError, match=f"expected weight to be at least {groups} at dim"):
        conv_transpose2d_act(x, torch.randn(0, 4, 3, 3), groups=groups)
