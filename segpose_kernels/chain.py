# SPDX-License-Identifier: BSD-3-Clause
"""A chain of layers as one node of the autograd graph, on the CPU kernels.

Each layer reads what the one before it wrote, and nobody else sees the values in between. Small
layers spend more time on their way through Python, autograd and the dispatcher than in the kernels;
a chain goes that way once forward and once backward. The kernels are those of the single layers,
and so are the results, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autograd import NativeOp, Params, _backward, native_ops, transforms_active
from .backends import NAMESPACE

__all__ = ["Chain", "Layer"]

_below_autograd = torch._C._AutoDispatchBelowAutograd
# A batch of gradients, of torch.autograd.grad(is_grads_batched=True).
_is_batched = torch._C._functorch.is_legacy_batchedtensor


@dataclass(frozen=True)
class Layer:
    """A layer without its parameters: the operator's `params`, and whether it has a bias."""

    op: NativeOp
    params: Params
    has_bias: bool

    @property
    def negative_slope(self) -> float:
        return float(self.params[-1])

    def code(self) -> list[int]:
        """The numbers that csrc/cpu/chain.cpp reads."""
        g = self.op.geometry(self.params)
        return [
            int(g.transposed),
            *g.stride,
            *g.padding,
            *g.output_padding,
            *g.dilation,
            g.groups,
            int(self.has_bias),
        ]


class Chain:
    """Layers that follow each other; called with an input and their parameters in order.

    Input [N, C_in, H, W] of the first, output [N, C_out, P, Q] of the last layer. The parameters
    are the weight of each layer and, where it has one, its bias.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.code = [number for layer in layers for number in layer.code()]
        self.slopes = [layer.negative_slope for layer in layers]
        operators = getattr(torch.ops, NAMESPACE)
        self.forward = operators.conv_chain.default
        self.backward = operators.conv_chain_backward.default

    def __call__(
        self, x: Tensor, parameters: Sequence[Tensor], *, contiguous: bool = False
    ) -> Tensor:
        """The output, in torch's default memory format if `contiguous`."""
        y: Tensor = _FusedChain.apply(x, self, contiguous, *parameters)
        return y

    def values(self, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The input and the output of every layer, differentiable."""
        values = [x]
        rest = iter(parameters)
        for layer in self.layers:
            weight = next(rest)
            bias = next(rest) if layer.has_bias else None
            values.append(layer.op(values[-1], weight, bias, layer.params))
        return values

    def layered_backward(
        self,
        grad: Tensor,
        values: Sequence[Tensor],
        parameters: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients by input and parameters, layer by layer: differentiable again."""
        grads: list[Tensor | None] = [None] * len(needs)
        end = len(needs)
        passed: Tensor | None = grad
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            first = end - (2 if layer.has_bias else 1)
            needed = any(needs[:first]), needs[first], layer.has_bias and needs[end - 1]
            if passed is None or not any(needed):
                break
            output = None if layer.negative_slope == 1 else values[index + 1]
            passed, grads[first], by_bias = _backward(
                layer.op,
                layer.params,
                needed,
                passed,
                output,
                values[index],
                parameters[first - 1],
            )
            if layer.has_bias:
                grads[end - 1] = by_bias
            end = first
        if needs[0]:
            grads[0] = passed
        return grads


class _FusedChain(torch.autograd.Function):
    """Reverse mode. Where the backward is differentiated again it computes the values in between
    again, since those it has kept are no part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain, contiguous: bool, *parameters: Tensor) -> Tensor:
        with _below_autograd():
            outputs: list[Tensor] = chain.forward(
                x, parameters, chain.code, chain.slopes, contiguous
            )
        *inner, last = outputs[: len(chain.layers)]
        # Without an activation nobody needs the last output, which the caller may change in place.
        needed = None if chain.slopes[-1] == 1 else last
        ctx.save_for_backward(x, *parameters, *inner, needed)
        ctx.set_materialize_grads(False)
        ctx.chain = chain
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        chain: Chain = ctx.chain
        saved = ctx.saved_tensors
        end = len(saved) - len(chain.layers)
        x, parameters, outputs = saved[0], saved[1:end], saved[end:-1]
        last = grad if saved[-1] is None else saved[-1]  # any tensor where it is not read
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            values = chain.values(x, parameters)
            grads = chain.layered_backward(grad, values, parameters, needs)
        elif transforms_active() or _is_batched(grad):
            grads = chain.layered_backward(grad, [x, *outputs, last], parameters, needs)
        else:
            with _below_autograd():
                grads = chain.backward(
                    grad, (x, *outputs, last), parameters, chain.code, chain.slopes, needs
                )
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return grads[0], None, None, *grads[1:]


def native_layer(transposed: bool, params: Params, has_bias: bool) -> Layer:
    """A layer of the C++ operator for convolutions or for transposed ones."""
    return Layer(native_ops["conv_transpose2d" if transposed else "conv2d"], params, has_bias)
