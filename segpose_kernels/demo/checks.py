# SPDX-License-Identifier: BSD-3-Clause
"""Is an optimized model right? Its outputs and all its gradients, compared with plain torch.

Two comparisons that complete each other. The whole model in float64, where rounding plays no part:
output, the image's gradient and every parameter's. And each layer in float32 on the input it gets
in the model: output and gradients of input, weight and bias, ours and torch's both against float64.

Gradients of a whole model in float32 are no test: where two pixels under a max pool, or a
pre-activation and zero, are equal but for rounding, either way to send the gradient is right, and
two runs of plain torch on different machines differ by percents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..swap import optimize, validate

WHOLE, LAYERS = "whole model, float64", "each layer, float32"
# Of rounding in float64, through some thirty layers.
LARGEST_ERROR_FLOAT64 = 1e-11


@dataclass(frozen=True)
class ModelCheck:
    """Largest relative L2 error over tensors of one kind (output, gradient).

    Attributes:
        model: its name.
        scope: `WHOLE` or `LAYERS`.
        kind: "output" or "gradient".
        tensors: how many tensors were compared.
        ours: largest error of the optimized model.
        eager: largest error of plain torch; 0 where plain torch is the reference.
        worst: the tensor where ours is largest.
        passed: whether every error was within its limit.
    """

    model: str
    scope: str
    kind: str
    tensors: int
    ours: float
    eager: float
    worst: str
    passed: bool


def check_model(name: str, model: nn.Module, image: Tensor) -> list[ModelCheck]:
    """Compare a plain float32 model, which is not touched, with its optimized copy on one batch."""
    return [*_check_whole(name, model, image), *_check_layers(name, model, image)]


def _check_whole(name: str, model: nn.Module, image: Tensor) -> list[ModelCheck]:
    plain = copy.deepcopy(model).double()
    optimized, _ = optimize(copy.deepcopy(plain))
    exact, ours = _tensors(plain, image.double()), _tensors(optimized, image.double())
    rows = []
    for kind in ("output", "gradient"):
        errors = {
            tensor: relative_error(ours[kind, tensor], exact[kind, tensor])
            for of_kind, tensor in exact
            if of_kind == kind
        }
        worst = max(errors, key=lambda tensor: errors[tensor])
        passed = errors[worst] <= LARGEST_ERROR_FLOAT64
        rows.append(ModelCheck(name, WHOLE, kind, len(errors), errors[worst], 0.0, worst, passed))
    return rows


def _check_layers(name: str, model: nn.Module, image: Tensor) -> list[ModelCheck]:
    optimized, _ = optimize(copy.deepcopy(model))
    layers = validate(optimized, image)
    rows = []
    for kind, quantities in (("output", ("output",)), ("gradient", ("input", "weight", "bias"))):
        errors = {
            f"{layer.name} {quantity}": (layer.errors[quantity], layer.torch_errors[quantity])
            for layer in layers
            for quantity in quantities
            if quantity in layer.errors
        }
        worst = max(errors, key=lambda tensor: errors[tensor][0])
        eager = max(error for _, error in errors.values())
        rows.append(
            ModelCheck(
                name, LAYERS, kind, len(errors), errors[worst][0], eager, worst, layers.passed
            )
        )
    return rows


def relative_error(value: Tensor, exact: Tensor) -> float:
    """L2 norm of the error over that of the exact tensor; infinity if that is not finite."""
    error = torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact)
    return error.item() if bool(torch.isfinite(error)) else float("inf")


def _tensors(model: nn.Module, image: Tensor) -> dict[tuple[str, str], Tensor]:
    """Output and gradients, for the output's product with fixed random numbers as a loss."""
    leaf = image.clone().requires_grad_()
    output = model(leaf)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    torch.autograd.backward((output * weights).sum())
    tensors = {("output", "y"): output.detach()}
    for name, tensor in {"image": leaf, **dict(model.named_parameters())}.items():
        assert tensor.grad is not None, f"{name} got no gradient"
        tensors["gradient", name] = tensor.grad
    return tensors
