# SPDX-License-Identifier: BSD-3-Clause
"""One suite for the operators of every backend that has kernels.

On a machine with a GPU its kernels run there. Without one they run in ptxsim on CPU tensors: the
CUDA kernels as compiled for 8.0, the Triton kernels for 9.0.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cudasim
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from segpose_kernels import auto, backends, conv2d_act, conv_transpose2d_act
from segpose_kernels.autograd import NativeOp, native_ops
from segpose_kernels.reference import conv2d_act_reference, conv_transpose2d_act_reference
from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.numerics import TF32, assert_results_match
from segpose_kernels.testing.spec import ConvSpec

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

FUNCTIONS = {"conv2d": conv2d_act, "conv_transpose2d": conv_transpose2d_act}
REFERENCES = {"conv2d": conv2d_act_reference, "conv_transpose2d": conv_transpose2d_act_reference}
OPS = tuple(FUNCTIONS)


@dataclass(frozen=True)
class Target:
    """A backend, the device of its tensors, and what lets it run there."""

    name: str
    backend: str
    device: str
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    simulated: bool = False

    def __str__(self) -> str:
        return self.name

    def op(self, label: str) -> NativeOp:
        if self.backend == "triton":
            return auto.triton_op(label)
        if self.backend == "cuda" and self.simulated:
            return cudasim.operators()[1][label]
        return native_ops[label]


def targets() -> Iterator[Any]:
    yield Target("cpu", "cpu", "cpu")
    if torch.cuda.is_available():
        for backend in backends.BACKENDS:
            if backend.name in ("cuda", "triton") and backend.missing is None:
                name = f"gpu-{backend.name}"
                yield pytest.param(
                    Target(name, backend.name, "cuda"), id=name, marks=pytest.mark.cuda
                )
        return
    no_nvcc = pytest.mark.skipif(not cudasim.have_nvcc(), reason="no nvcc to compile the kernels")
    yield pytest.param(
        Target("cuda-sm80", "cuda", "cpu", cudasim.simulated, simulated=True),
        id="cuda-sm80",
        marks=no_nvcc,
    )
    try:
        import tritonsim
    except ImportError:  # no Triton for this platform
        return
    yield Target("triton-sm90", "triton", "cpu", partial(tritonsim.simulated, 90), simulated=True)


@pytest.fixture(params=list(targets()), ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    chosen: Target = request.param
    with chosen.context():
        yield chosen


SPECS = (
    ConvSpec("conv", "conv2d", 2, 5, 6, 7, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    ConvSpec("conv-groups", "conv2d", 1, 4, 6, 5, 6, (3, 3), dilation=(1, 2), groups=2),
    ConvSpec(
        "transposed",
        "conv_transpose2d",
        2,
        5,
        6,
        4,
        3,
        (3, 2),
        stride=(2, 1),
        padding=(1, 0),
        output_padding=(1, 0),
    ),
    ConvSpec("transposed-depthwise", "conv_transpose2d", 1, 4, 4, 4, 3, (2, 3), groups=4),
)


def rule_for(target: Target, dtype: torch.dtype) -> Any:
    tf32 = target.backend != "cpu" and auto.float32_precision() == "tf32"
    return TF32 if dtype == torch.float32 and tf32 else None


def operands(op: str, groups: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Input [2, 4, 4, 3], a weight for it and a bias; all require grad."""
    shapes = ((2, 4, 4, 3), (4, 4 // groups, 2, 2), (4,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def on_device(tensors: list[Tensor], target: Target) -> list[Tensor]:
    return [t.detach().to(target.device).requires_grad_() for t in tensors]


def call(target: Target, op: str, **geometry: Any) -> Callable[..., Tensor]:
    return partial(FUNCTIONS[op], **geometry, negative_slope=0.3, backend=target.backend)


def reference(op: str, **geometry: Any) -> Callable[..., Tensor]:
    return partial(REFERENCES[op], **geometry, negative_slope=0.3)


def close(name: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected.cpu(), msg=lambda text: f"{name}: {text}")


# Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_output_and_gradients(target: Target, spec: ConvSpec, dtype: torch.dtype) -> None:
    tensors = spec.make_tensors(dtype, device=target.device)
    results = run_fused(spec, tensors, backend=target.backend)
    assert_results_match(spec, tensors, results, rule=rule_for(target, dtype))


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
def test_activations(target: Target, spec: ConvSpec, activation: Any) -> None:
    spec = replace(spec, activation=activation, slope=0.2, bias=activation != "none")
    tensors = spec.make_tensors(torch.float16, device=target.device)
    assert_results_match(spec, tensors, run_fused(spec, tensors, backend=target.backend))


@pytest.mark.parametrize("operand", ["input", "weight", "grad"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_layouts(target: Target, operand: str, layout: str) -> None:
    layouts: dict[str, Any] = {f"{operand}_layout": layout}
    for spec in (SPECS[0], SPECS[2]):
        tensors = spec.make_tensors(torch.float16, device=target.device, **layouts)
        assert_results_match(spec, tensors, run_fused(spec, tensors, backend=target.backend))


@pytest.mark.parametrize("weight_last", [False, True], ids=["w-nchw", "w-nhwc"])
@pytest.mark.parametrize("input_last", [False, True], ids=["x-nchw", "x-nhwc"])
@pytest.mark.parametrize("op", OPS)
def test_memory_formats(target: Target, op: str, input_last: bool, weight_last: bool) -> None:
    """Output and grad_input are channels_last if input or weight is; grad_weight is as weight."""
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    x, w, _ = on_device(operands(op, dtype=torch.float16), target)
    x = x.detach().to(memory_format=formats[input_last]).requires_grad_()
    w = w.detach().to(memory_format=formats[weight_last]).requires_grad_()
    y = call(target, op)(x, w, None)
    grad_input, grad_weight = torch.autograd.grad(y, (x, w), torch.randn_like(y))
    expected = formats[input_last or weight_last]
    assert y.is_contiguous(memory_format=expected)
    assert grad_input.is_contiguous(memory_format=expected)
    assert grad_weight.stride() == w.stride()


@pytest.mark.parametrize("op", OPS)
def test_unbatched_and_empty(target: Target, op: str) -> None:
    x, w, b = on_device(operands(op), target)
    close("unbatched", call(target, op)(x[0], w, b), reference(op)(x[0], w, b))
    empty = x[:0].detach().requires_grad_()
    y = call(target, op)(empty, w, b)
    assert y.shape[0] == 0
    grads = torch.autograd.grad(y.sum(), (empty, w, b))
    for name, grad, leaf in zip(("input", "weight", "bias"), grads, (empty, w, b), strict=True):
        close(f"grad_{name}", grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("op", OPS)
def test_gradient_of_a_sum(target: Target, op: str) -> None:
    """`y.sum().backward()` sends a gradient whose strides are all 0."""
    tensors = on_device(operands(op), target)
    ours = torch.autograd.grad(call(target, op)(*tensors).sum(), tensors)
    theirs = torch.autograd.grad(reference(op)(*tensors).sum(), tensors)
    for name, a, b in zip(("input", "weight", "bias"), ours, theirs, strict=True):
        close(f"grad_{name}", a, b)


def test_results_repeat_bit_by_bit(target: Target) -> None:
    spec = SPECS[2]
    tensors = spec.make_tensors(torch.float16, device=target.device)
    first, second = (run_fused(spec, tensors, backend=target.backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_every_subset_of_requires_grad(target: Target, op: str) -> None:
    tensors = operands(op)
    for needs in itertools.product((True, False), repeat=3):
        if not any(needs):
            continue
        ours = [t.requires_grad_(n) for t, n in zip(on_device(tensors, target), needs, strict=True)]
        theirs = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        call(target, op, stride=2)(*ours).square().sum().backward()
        reference(op, stride=2)(*theirs).square().sum().backward()
        for name, a, b in zip(("input", "weight", "bias"), ours, theirs, strict=True):
            assert (a.grad is None) == (b.grad is None), (needs, name)
            if a.grad is not None and b.grad is not None:
                close(f"{needs} grad_{name}", a.grad, b.grad)


@pytest.mark.parametrize("op", OPS)
def test_double_backward(target: Target, op: str) -> None:
    tensors = on_device(operands(op), target)
    results = []
    for function in (call(target, op, stride=(2, 1)), reference(op, stride=(2, 1))):
        y = function(*tensors)
        grads = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        again = torch.autograd.grad(sum((g * g).sum() for g in grads), tensors)
        results.append((*grads, *again))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        close(f"order {1 + i // 3} gradient {i % 3}", a, b)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_in_both_modes(target: Target, op: str) -> None:
    x, w, b = on_device(operands(op, groups=2), target)
    x, w = x.detach()[:1, :, :3, :2], w.detach()[..., :1]
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    assert gradcheck(
        call(target, op, groups=2, stride=2), leaves, check_forward_ad=True, fast_mode=True
    )


@pytest.mark.parametrize("op", OPS)
def test_func_transforms(target: Target, op: str) -> None:
    x, w, b = (t.detach() for t in on_device(operands(op), target))
    ours, theirs = call(target, op), reference(op)

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda w, x: function(x[None], w, b).square().sum()

    transforms = torch.func.vmap(torch.func.grad(loss(ours)), in_dims=(None, 0))
    expected = torch.func.vmap(torch.func.grad(loss(theirs)), in_dims=(None, 0))
    close("per-sample gradients", transforms(w, x), expected(w, x))
    tangents = [
        torch.func.jvp(lambda w, f=f: f(x, w, b), (w,), (w.cos(),))[1] for f in (ours, theirs)
    ]
    close("tangent", *tangents)


@pytest.mark.parametrize("op", OPS)
def test_what_is_saved(target: Target, op: str) -> None:
    """Input and weight; the output only where an activation's mask needs it."""
    tensors = on_device(operands(op, dtype=torch.float16), target)
    for activation, expected in (("none", 2), ("relu", 3)):
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(target, op, activation=activation)(*tensors)
        assert len(kept) == expected


# The operators as registered -----------------------------------------------------------------


def raw(spec: ConvSpec) -> list[Any]:
    """Arguments of the registered operator after the tensors."""
    shared: list[Any] = [list(spec.stride), list(spec.padding)]
    if spec.transposed:
        return [*shared, list(spec.output_padding), spec.groups, list(spec.dilation), spec.op_slope]
    return [*shared, list(spec.dilation), spec.groups, spec.op_slope]


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
def test_opcheck(target: Target, spec: ConvSpec) -> None:
    """Without a GPU the kernels cannot run from a compiled graph: that part is left out then."""
    tests: tuple[str, ...] = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not target.simulated:
        tests += ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    op = target.op(spec.op)
    t = spec.make_tensors(torch.float64, device=target.device)
    leaves = [
        tensor.requires_grad_() for tensor in (t.input, t.weight, t.bias) if tensor is not None
    ]
    torch.library.opcheck(op.forward, (*leaves, *raw(spec)), test_utils=tests)
    y = op.forward(*leaves, *raw(spec)).detach()
    arguments = (t.grad_output.requires_grad_(), y, *leaves[:2], *raw(spec), True, True, True)
    torch.library.opcheck(op.backward, arguments, test_utils=tests)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fakes_have_the_kernels_strides(target: Target, spec: ConvSpec, last: bool) -> None:
    op = target.op(spec.op)
    layout = "channels_last" if last else "contiguous"
    t = spec.make_tensors(torch.float16, device=target.device, weight_layout=layout)
    y = op.forward(t.input, t.weight, t.bias, *raw(spec))
    grads = op.backward(t.grad_output, y, t.input, t.weight, *raw(spec), True, True, True)
    fakes = [tensor.to("meta") for tensor in (t.input, t.weight, t.grad_output)]
    bias = None if t.bias is None else t.bias.to("meta")
    fake_y = op.forward(fakes[0], fakes[1], bias, *raw(spec))
    fake_grads = op.backward(fakes[2], fake_y, fakes[0], fakes[1], *raw(spec), True, True, True)
    for real, fake in zip((y, *grads), (fake_y, *fake_grads), strict=True):
        assert (real.shape, real.stride()) == (fake.shape, fake.stride())


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
def test_malformed_calls_raise(target: Target, spec: ConvSpec) -> None:
    """A bad call of a registered operator is a sentence, never a read out of bounds."""
    op = target.op(spec.op)
    t = spec.make_tensors(torch.float32, device=target.device)
    x, w, b, grad = t.input, t.weight, t.bias, t.grad_output
    params = raw(spec)
    y = op.forward(x, w, b, *params)
    needs = (True, True, True)
    calls: dict[str, Callable[[], object]] = {
        "channels": lambda: op.forward(x[:, 1:], w, b, *params),
        "3-D input": lambda: op.forward(x[0], w, b, *params),
        "bias": lambda: op.forward(x, w, torch.cat((b, b)), *params),  # type: ignore[arg-type]
        "dtypes": lambda: op.forward(x, w.double(), b, *params),
        "integers": lambda: op.forward(x.int(), w.int(), None, *params),
        "stride": lambda: op.forward(x, w, b, [0, 1], *params[1:]),
        "no output": lambda: op.backward(grad, None, x, w, *params, *needs),
        "grad shape": lambda: op.backward(grad[:, :, 1:], y, x, w, *params, *needs),
        "grad dtype": lambda: op.backward(grad.double(), y, x, w, *params, *needs),
        "output shape": lambda: op.backward(grad, y[:, 1:], x, w, *params, *needs),
        "output dtype": lambda: op.backward(grad, y.double(), x, w, *params, *needs),
    }
    for name, bad in calls.items():
        with pytest.raises(RuntimeError) as raised:
            bad()
        assert len(str(raised.value)) > 10, name
