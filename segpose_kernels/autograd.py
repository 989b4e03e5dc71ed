# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of the native operators, and their fakes for torch.compile and torch.export.

Three ways lead into one operator, by what the call needs:

- no gradient: the operator itself, below autograd;
- reverse mode: `_Fused`, an autograd Function without `setup_context`, the cheapest to enter;
- func transforms, vmap and forward-mode AD: `_FusedTransformable`.

While compiling, the operator is called plainly: its derivatives are registered with it, and the
forward and the backward operator each stay one node of the graph. Called plainly under a func
transform or in forward mode, where a registered autograd Function is refused or its tangent taken
to be zero, it is computed by aten.

The backward operators take their mask from the saved *output*: with negative_slope > 0 its sign is
that of the pre-activation, and relu's output is positive exactly where its gradient passes. Without
an activation (negative_slope 1) no output is saved. Double backward goes through
aten._convolution_double_backward between two applications of the same mask, which is piecewise
constant and has no derivative of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .backends import LIBRARY, NAMESPACE
from .reference import activate
from .shapes import conv_extents, conv_transpose_extents, empty_gradient, empty_output

__all__ = ["NativeOp", "make_ops", "native_ops", "transforms_active"]

Params = tuple[Any, ...]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]

Implementations = tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad


def transforms_active() -> bool:
    """Whether a torch.func transform or a level of forward-mode AD is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether no subclass and no mode (fakes, tracers, counters) wants to see the operator."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(tensor is None or tensor.__class__ in _PLAIN for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Parameters of a call in the words of aten.convolution."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order that aten's convolutions take them."""
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )


class NativeOp:
    """A registered forward operator and its backward, of the C++ library or of another namespace.

    `params` are the operator's arguments after the tensors, in schema order; the last is
    negative_slope: 1 for no activation, 0 for ReLU, else leaky ReLU's.

    `implementations` are the operator and its backward where they are Python functions: plain
    tensors then skip the dispatcher, which takes 15 us to come back to Python.
    """

    def __init__(
        self,
        label: str,
        *,
        transposed: bool,
        namespace: str = NAMESPACE,
        implementations: Implementations | None = None,
    ) -> None:
        self.label = label
        self.name = f"{label}_act"
        self.qualified_name = f"{namespace}::{self.name}"
        self.transposed = transposed
        registered = getattr(torch.ops, namespace)
        self.forward: Callable[..., Tensor] = getattr(registered, self.name).default
        self.backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = getattr(
            registered, f"{self.name}_backward"
        ).default
        self.implementations = implementations

    def run_forward(self, x: Tensor, w: Tensor, b: Tensor | None, params: Params) -> Tensor:
        """The operator below autograd."""
        if self.implementations is not None and _are_plain(x, w, b):
            return self.implementations[0](x, w, b, *params)
        with _below_autograd():
            return self.forward(x, w, b, *params)

    def run_backward(
        self, grad: Tensor, y: Tensor | None, x: Tensor, w: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The backward operator below autograd."""
        if self.implementations is not None and _are_plain(grad, y, x, w):
            return self.implementations[1](grad, y, x, w, *rest)
        with _below_autograd():
            return self.backward(grad, y, x, w, *rest)

    def geometry(self, params: Params) -> Geometry:
        if self.transposed:
            stride, padding, output_padding, groups, dilation, _ = params
            return Geometry(stride, padding, dilation, True, output_padding, groups)
        stride, padding, dilation, groups, _ = params
        return Geometry(stride, padding, dilation, False, (0, 0), groups)

    def convolution(self, x: Tensor, w: Tensor, b: Tensor | None, params: Params) -> Tensor:
        """The operator without its activation, on aten: linear in (x, b) and in (w, b)."""
        arguments = self.geometry(params).arguments
        y: Tensor = torch.ops.aten.convolution(x, w, b, *arguments)
        return y

    def composed(self, x: Tensor, w: Tensor, b: Tensor | None, params: Params) -> Tensor:
        """The operator on aten, which knows every derivative."""
        slope = params[-1]
        activation = "none" if slope == 1 else "relu" if slope == 0 else "leaky_relu"
        return activate(self.convolution(x, w, b, params), activation, slope)

    def composed_backward(
        self, grad: Tensor, y: Tensor | None, x: Tensor, w: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        """The backward operator on aten."""
        params, needs = rest[:-3], rest[-3:]
        masked, biases = mask(grad, y, params[-1]), [grad.shape[1]]
        arguments = self.geometry(params).arguments
        grads = torch.ops.aten.convolution_backward(masked, x, w, biases, *arguments, needs)
        return tuple(x.new_empty(0) if g is None else g for g in grads)

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None, params: Params) -> Tensor:
        """Output [N, C_out, P, Q] for input [N, C_in, H, W], differentiable in every mode."""
        y: Tensor
        if torch.compiler.is_compiling():
            y = self.forward(x, w, b, *params)
        elif transforms_active():
            y = _FusedTransformable.apply(x, w, b, _Call(self, params))
        # Inference mode records nothing, also where gradients are enabled inside.
        elif (
            torch.is_grad_enabled()
            and _any_requires_grad(x, w, b)
            and not torch.is_inference_mode_enabled()
        ):
            y = _Fused.apply(x, w, b, self, params)
        else:
            y = self.run_forward(x, w, b, params)
        return y


@dataclass(frozen=True, eq=False)
class _Call:
    """What a call has besides tensors, opaque to the pytrees of torch.func."""

    op: NativeOp
    params: Params
    needs: tuple[bool, ...] = (True, True, True)

    @property
    def negative_slope(self) -> float:
        return float(self.params[-1])


def mask(grad: Tensor, output: Tensor | None, negative_slope: float) -> Tensor:
    """Gradient through the activation, from the sign of its output; NaN passes a ReLU."""
    if negative_slope == 1 or output is None:
        return grad
    if negative_slope == 0:
        return grad.masked_fill(output <= 0, 0)
    return torch.where(output > 0, grad, grad * negative_slope)


def _needed(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> Grads:
    """The operator's placeholders for gradients that were not asked for, as None."""
    x, w, b = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return x, w, b


def _backward(
    op: NativeOp,
    params: Params,
    needs: tuple[bool, ...],
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    w: Tensor,
) -> Grads:
    """Gradients by input, weight and bias; differentiable again if a graph is being built."""
    if torch.is_grad_enabled() or transforms_active():
        grads = _FusedBackward.apply(grad, y, x, w, _Call(op, params, needs))
    else:
        grads = op.run_backward(grad, y, x, w, *params, *needs)
    return _needed(grads, needs)


def _double_backward(
    call: _Call,
    cotangents: Sequence[Tensor | None],  # by grad_input, grad_weight, grad_bias
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    w: Tensor,
    needs: tuple[bool, bool, bool],  # of grad_output, input, weight
) -> Grads:
    """Gradients of the backward operator by grad_output, input and weight."""
    # A gradient that was not asked for is a placeholder, and so is its cotangent.
    ggx, ggw, ggb = _needed(cotangents, call.needs)
    if (ggx is None and ggw is None and ggb is None) or not any(needs):
        return None, None, None
    slope = call.negative_slope
    arguments = call.op.geometry(call.params).arguments
    by_grad, by_input, by_weight = torch.ops.aten._convolution_double_backward(
        ggx, ggw, ggb, mask(grad, y, slope), w, x, *arguments, needs
    )
    if by_grad is not None:
        by_grad = mask(by_grad, y, slope)
    return _needed((by_grad, by_input, by_weight), needs)


# Functions -----------------------------------------------------------------------------------


class _Fused(torch.autograd.Function):
    """Reverse mode. No `setup_context`: torch binds its arguments by signature on every call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, op: NativeOp, params: Params
    ) -> Tensor:
        y = op.run_forward(x, w, b, params)
        ctx.save_for_backward(x, w, None if params[-1] == 1 else y)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.params = op, params
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None, None
        x, w, y = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return *_backward(ctx.op, ctx.params, needs, grad, y, x, w), None, None


class _FusedTransformable(torch.autograd.Function):
    """The same for torch.func, vmap and forward-mode AD."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, call: _Call) -> Tensor:
        with _below_autograd():
            return call.op.forward(x, w, b, *call.params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, ctx.call = inputs
        y = None if ctx.call.negative_slope == 1 else output
        ctx.save_for_backward(x, w, y)
        ctx.save_for_forward(x, w, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w, y = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return *_backward(ctx.call.op, ctx.call.params, needs, grad, y, x, w), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """act'(y) * (conv(x', w) + conv(x, w') + b')."""
        x, w, y = ctx.saved_tensors
        x_t, w_t, b_t, _ = tangents
        call = ctx.call
        if x_t is None and w_t is not None:
            tangent = call.op.convolution(x, w_t, b_t, call.params)
        else:
            x_t = torch.zeros_like(x) if x_t is None else x_t
            tangent = call.op.convolution(x_t, w, b_t, call.params)
            if w_t is not None:
                tangent = tangent + call.op.convolution(x, w_t, None, call.params)
        return mask(tangent, y, call.negative_slope)


class _FusedBackward(torch.autograd.Function):
    """The backward operator with its own derivatives, for double backward and torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, y: Tensor | None, x: Tensor, w: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _below_autograd():
            return call.op.backward(grad, y, x, w, *call.params, *call.needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        grad, y, x, w = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        by_grad, by_input, by_weight = _double_backward(ctx.call, cotangents, grad, y, x, w, needs)
        return by_grad, None, by_input, by_weight, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Linear in grad, and by the product rule in (grad, w) and (grad, x)."""
        grad, y, x, w = ctx.saved_tensors
        grad_t, _, x_t, w_t, _ = tangents
        op, params, needs = ctx.call.op, ctx.call.params, ctx.call.needs
        terms: list[Grads] = []
        if grad_t is not None:
            terms.append(_backward(op, params, needs, grad_t, y, x, w))
        cross = needs[0] and w_t is not None, needs[1] and x_t is not None, False
        if any(cross):
            x_t, w_t = x if x_t is None else x_t, w if w_t is None else w_t
            terms.append(_backward(op, params, cross, grad, y, x_t, w_t))
        shapes = x.shape, w.shape, (grad.shape[1],)
        gx, gw, gb = (
            _sum([term[i] for term in terms], x, shape if need else (0,))
            for i, (shape, need) in enumerate(zip(shapes, needs, strict=True))
        )
        return gx, gw, gb


def _sum(terms: Sequence[Tensor | None], like: Tensor, shape: Sequence[int]) -> Tensor:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else like.new_zeros(shape)


# Registration --------------------------------------------------------------------------------

# The devices that have kernels, and fakes. Each by itself: torch.library.custom_op has put a kernel
# of its own behind the name of them all.
_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
# What is registered lasts as long as these.
_libraries: list[torch.library.Library] = []


def _output_shape(op: NativeOp, x: Tensor, w: Tensor, params: Params) -> list[int]:
    g = op.geometry(params)
    size, kernel = x.shape[2:], w.shape[2:]
    if op.transposed:
        extents = conv_transpose_extents(
            size, kernel, g.stride, g.padding, g.output_padding, g.dilation
        )
        return [x.shape[0], w.shape[1] * g.groups, *extents]
    return [x.shape[0], w.shape[0], *conv_extents(size, kernel, g.stride, g.padding, g.dilation)]


def _register_fakes(op: NativeOp) -> None:
    check = checks.check_conv_transpose2d if op.transposed else checks.check_conv2d

    def forward(x: Tensor, w: Tensor, b: Tensor | None, *params: Any) -> Tensor:
        check(x, w, b, *params[:-1])
        return empty_output(x, w, _output_shape(op, x, w, params))

    def backward(
        grad: Tensor, y: Tensor | None, x: Tensor, w: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_input, need_weight, need_bias = rest[-3:]
        return (
            empty_output(x, w, x.shape) if need_input else x.new_empty(0),
            empty_gradient(w) if need_weight else x.new_empty(0),
            x.new_empty(grad.shape[1] if need_bias else 0),
        )

    torch.library.register_fake(op.qualified_name, forward)
    torch.library.register_fake(f"{op.qualified_name}_backward", backward)


def _kernel(operator: Any, keys: Any, *inputs: Any) -> Any:
    """The call goes on below autograd, as one call to whoever counts them."""
    with _below_autograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


def _register_autograd(op: NativeOp, library: Any) -> None:
    """Derivatives of the plain operators, which torch.compile and torch.export trace.

    Not by torch.library.register_autograd: its kernel drops the tangents of forward mode where
    nothing requires a gradient, and func transforms refuse its Function.
    """

    def forward(keys: Any, x: Tensor, w: Tensor, b: Tensor | None, *params: Any) -> Tensor:
        y: Tensor
        if transforms_active():
            y = op.composed(x, w, b, params)
        elif torch.is_grad_enabled() and _any_requires_grad(x, w, b):
            y = _Fused.apply(x, w, b, op, params)
        else:
            y = _kernel(op.forward, keys, x, w, b, *params)
        return y

    def backward(
        keys: Any, grad: Tensor, y: Tensor | None, x: Tensor, w: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...]
        if transforms_active():
            grads = op.composed_backward(grad, y, x, w, *rest)
        elif torch.is_grad_enabled() and _any_requires_grad(grad, x, w):
            grads = _FusedBackward.apply(grad, y, x, w, _Call(op, rest[:-3], rest[-3:]))
        else:
            grads = _kernel(op.backward, keys, grad, y, x, w, *rest)
        return grads

    for key in _AUTOGRAD_KEYS:
        library.impl(op.name, forward, key, with_keyset=True)
        library.impl(f"{op.name}_backward", backward, key, with_keyset=True)


def make_ops(
    namespace: str, implementations: Mapping[str, Implementations] | None = None
) -> dict[str, NativeOp]:
    """The operators registered in `namespace` by name, with fakes and formulas."""
    ops = {
        label: NativeOp(
            label,
            transposed=label == "conv_transpose2d",
            namespace=namespace,
            implementations=None if implementations is None else implementations[label],
        )
        for label in ("conv2d", "conv_transpose2d")
    }
    library = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for op in ops.values():
        _register_fakes(op)
        # Not by `implementations`, which leave the checks to their caller.
        plain = NativeOp(op.label, transposed=op.transposed, namespace=namespace)
        _register_autograd(plain, library)
    return ops


# The operators of the C++ library; empty without the library.
native_ops = make_ops(NAMESPACE) if LIBRARY.loaded else {}
