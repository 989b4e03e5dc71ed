# SPDX-License-Identifier: BSD-3-Clause
"""Run a named problem through the fused functions and collect its results by name."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..functional import conv2d_act, conv_transpose2d_act
from .spec import ConvSpec, ConvTensors

__all__ = ["OPERANDS", "call_fused", "run_fused"]

OPERANDS = ("input", "weight", "bias")


def call_fused(
    spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None, *, backend: str = "cpu"
) -> Tensor:
    """One forward call. A named backend raises where it cannot run: nothing falls back silently."""
    function = conv_transpose2d_act if spec.transposed else conv2d_act
    return function(x, w, b, **spec.attributes, **spec.activation_arguments, backend=backend)


def run_fused(
    spec: ConvSpec,
    tensors: ConvTensors,
    *,
    backend: str = "cpu",
    requires_grad: Collection[str] = OPERANDS,
) -> dict[str, Tensor]:
    """Output and the gradients of the operands in `requires_grad`: "output", "grad_input", ...

    Memory layouts of the operands and of the incoming gradient are kept as they are.
    """
    operands: dict[str, Tensor] = {}
    for name in OPERANDS:
        tensor: Tensor | None = getattr(tensors, name)
        if tensor is not None:
            operands[name] = tensor.detach().requires_grad_(name in requires_grad)
    output = call_fused(
        spec, operands["input"], operands["weight"], operands.get("bias"), backend=backend
    )
    results = {"output": output.detach()}
    wanted = [name for name in operands if name in requires_grad]
    if wanted:
        grads = torch.autograd.grad(
            output, [operands[name] for name in wanted], tensors.grad_output
        )
        results |= {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results
