# SPDX-License-Identifier: BSD-3-Clause
"""`validate`: each fused layer of a model against plain torch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .eligible import FUSED_TYPES, Fused
from .pieces import output_padding, run_convolution, tensors_of
from .record import LayerCall, record_calls, rewritten_activations
from .report import format_table

# Largest relative L2 error against float64. float32: the promise for any algorithm; the others: a
# few units in the last place, for results rounded once after an accumulation in float32.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
# A result no worse than this many times torch's own error in the same dtype passes too.
TORCH_FACTOR = 2.0


@dataclass(frozen=True)
class LayerCheck:
    """Relative L2 errors of one layer: of its output and the gradients of input, weight and bias.

    `torch_errors` are those of torch's own operators in the layer's dtype. `passed` holds if each
    error is within `tolerance`, or within `TORCH_FACTOR` times torch's.
    """

    name: str
    dtype: str
    activation: str
    errors: dict[str, float]
    torch_errors: dict[str, float]
    tolerance: float
    passed: bool


@dataclass
class Validation:
    """One `LayerCheck` for each call of a fused layer; true if all passed."""

    layers: list[LayerCheck] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerCheck]:
        return iter(self.layers)

    @property
    def passed(self) -> bool:
        return all(layer.passed for layer in self.layers)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        quantities = ("output", "input", "weight", "bias")
        header = ("name", "dtype", "activation", *quantities, "tolerance", "passed")
        cells = [
            (
                layer.name,
                layer.dtype,
                layer.activation,
                *(f"{layer.errors[q]:.1e}" if q in layer.errors else "-" for q in quantities),
                f"{layer.tolerance:.1e}",
                "yes" if layer.passed else "NO",
            )
            for layer in self.layers
        ]
        failed = sum(not layer.passed for layer in self.layers)
        return f"{format_table(header, cells)}\n{len(self) - failed} layers passed, {failed} failed"


def validate(model: nn.Module, x: Any, *, seed: int = 0) -> Validation:
    """Compare each fused layer, on the input it gets in `model(x)`, with plain torch in float64.

    Output and the gradients of input, weight and bias for a random output gradient. The reference's
    gradients use the sign of the layer's own output as the activation's mask: where a
    pre-activation is zero but for rounding, either sign is right, and counting it would hide errors
    of the kernels. Gradients of parameters are not touched.

    `x` as in `explain`; shapes are the model's. `seed` draws the output gradients.
    """
    activations = rewritten_activations(model)
    checks = []
    for call in record_calls(model, x):
        if call.fused:
            checks.append(_check(call, activations.get(call.name, ""), seed))
    return Validation(checks)


def _check(call: LayerCall, rewritten: str, seed: int) -> LayerCheck:
    conv = call.module
    assert isinstance(conv, FUSED_TYPES)
    activation, slope = conv.activation, float(conv.negative_slope)
    label = f"leaky_relu({slope:g})" if activation == "leaky_relu" else activation
    if (
        activation == "none"
        and rewritten.startswith(("relu", "leaky_relu"))
        and "," not in rewritten
    ):
        label = rewritten
        activation, _, number = rewritten.rstrip(")").partition("(")
        slope = float(number) if number else slope
    generator = torch.Generator().manual_seed(seed)
    dtype, device = call.output.dtype, call.output.device
    grad = torch.randn(call.output.shape, generator=generator, dtype=torch.float64)
    grad = grad.to(dtype).to(device)
    leaves = [
        None
        if tensor is None
        else tensor.detach().to(dtype).clone(memory_format=torch.preserve_format)
        for tensor in (call.input, *tensors_of(conv))
    ]
    with torch.enable_grad():
        ours = _ours(conv, leaves, call.output_size, activation, slope, grad)
        positive = ours["output"] > 0
        theirs = _torch(conv, leaves, call.output_size, activation, slope, grad, positive)
        exact = _torch(
            conv,
            [None if leaf is None else leaf.double() for leaf in leaves],
            call.output_size,
            activation,
            slope,
            grad.double(),
            positive,
        )
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    torch_errors = {name: relative_error(theirs[name], exact[name]) for name in exact}
    tolerance = TOLERANCES[dtype]
    passed = all(
        error <= max(tolerance, TORCH_FACTOR * torch_errors[name]) for name, error in errors.items()
    )
    return LayerCheck(
        call.name,
        str(dtype).removeprefix("torch."),
        label,
        errors,
        torch_errors,
        tolerance,
        passed,
    )


def relative_error(value: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference over that of `exact`; infinite for NaN and for other shapes."""
    if value.shape != exact.shape:
        return float("inf")
    difference = (value.double() - exact).norm().item()
    if difference == 0:
        return 0.0
    norm = exact.norm().item()
    return difference / norm if norm > 0 and difference == difference else float("inf")


Leaves = list[Tensor | None]


def _ours(
    conv: Fused,
    leaves: Leaves,
    output_size: list[int] | None,
    activation: str,
    slope: float,
    grad: Tensor,
) -> dict[str, Tensor]:
    fresh = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    # A bare copy of the layer that computes with the fresh leaves, without hooks.
    layer: Fused = object.__new__(type(conv))
    vars(layer).update(vars(conv))
    layer._parameters = {"weight": fresh[1], "bias": fresh[2]}  # type: ignore[dict-item]
    layer._buffers = {}
    layer._forward_hooks = type(conv._forward_hooks)()
    vars(layer).update(folded_norm=None, filters=None)
    x = fresh[0]
    assert x is not None
    if activation != conv.activation:
        # The activation is one that a rewritten forward adds.
        output = run_convolution(layer, x, output_size, activation=activation, negative_slope=slope)
    elif isinstance(layer, nn.ConvTranspose2d):
        output = layer.forward(x, output_size)
    else:
        output = layer.forward(x)
    return _with_gradients(output, fresh, grad)


def _torch(
    conv: Fused,
    leaves: Leaves,
    output_size: list[int] | None,
    activation: str,
    slope: float,
    grad: Tensor,
    positive: Tensor,
) -> dict[str, Tensor]:
    fresh = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, weight, bias = fresh
    assert x is not None
    assert weight is not None
    if isinstance(conv, nn.ConvTranspose2d):
        linear = nn.functional.conv_transpose2d(
            x,
            weight,
            bias,
            conv.stride,
            tuple(int(size) for size in conv.padding),
            output_padding(conv, x, output_size),
            conv.groups,
            conv.dilation,
        )
    else:
        linear = nn.Conv2d._conv_forward(conv, x, weight, bias)
    result = _with_gradients(linear, fresh, _masked(grad, positive, activation, slope))
    if activation == "relu":
        result["output"] = torch.relu(result["output"])
    elif activation == "leaky_relu":
        result["output"] = nn.functional.leaky_relu(result["output"], slope)
    return result


def _masked(grad: Tensor, positive: Tensor, activation: str, slope: float) -> Tensor:
    """The gradient before the activation; `positive` is where its result is above zero."""
    if activation == "none":
        return grad
    return torch.where(positive, grad, grad * (0.0 if activation == "relu" else slope))


def _with_gradients(output: Tensor, leaves: Leaves, grad: Tensor) -> dict[str, Tensor]:
    present = {
        name: leaf
        for name, leaf in zip(("input", "weight", "bias"), leaves, strict=True)
        if leaf is not None
    }
    gradients = torch.autograd.grad(output, list(present.values()), grad)
    return {"output": output.detach(), **dict(zip(present, gradients, strict=True))}
