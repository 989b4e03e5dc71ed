# SPDX-License-Identifier: BSD-3-Clause
"""Which activations the kernels fuse, in each of the ways a model can write one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

RELU_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {F.relu, F.relu_, torch.relu, torch.relu_}
)
LEAKY_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {F.leaky_relu, F.leaky_relu_, torch._C._nn.leaky_relu, torch._C._nn.leaky_relu_}
)
RELU_METHODS = frozenset({"relu", "relu_"})
INPLACE_FUNCTIONS = frozenset({F.relu_, torch.relu_, F.leaky_relu_, torch._C._nn.leaky_relu_})
# Rectifiers a reader would expect to see in the report although the kernels have no such epilogue.
OTHER_RECTIFIERS = (nn.PReLU, nn.RReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU)


@dataclass(frozen=True)
class Activation:
    """What runs in a kernel's epilogue: `name` is none, relu or leaky_relu."""

    name: str = "none"
    negative_slope: float = 0.01

    def __str__(self) -> str:
        return f"leaky_relu({self.negative_slope:g})" if self.name == "leaky_relu" else self.name


NONE = Activation()
RELU = Activation("relu")


@dataclass(frozen=True)
class ActivationCall:
    """One activation as the model writes it.

    `spec` is None when the kernels cannot take it over, and `reason` says why. `inplace` matters to
    autograd: an in-place leaky ReLU saves its output, like the fused op, the other kind its input.
    """

    label: str
    spec: Activation | None
    reason: str = ""
    inplace: bool = False


def of_module(module: nn.Module) -> ActivationCall | None:
    """The activation a module computes, None if it is no rectifier."""
    kind = type(module)
    if kind is nn.ReLU:
        return ActivationCall("ReLU", RELU, inplace=bool(module.inplace))
    if kind is nn.LeakyReLU:
        return _leaky("LeakyReLU", module.negative_slope, bool(module.inplace))
    if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
        return ActivationCall(
            kind.__name__, None, f"{kind.__name__} is a subclass with a forward of its own"
        )
    if isinstance(module, OTHER_RECTIFIERS):
        return ActivationCall(
            kind.__name__, None, f"{kind.__name__} is not one of none, relu and leaky_relu"
        )
    return None


def of_function(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ActivationCall | None:
    """The activation a call computes; `args` come after the input. None if it is no rectifier."""
    if isinstance(function, functools.partial):
        if function.args:
            return None
        return of_function(function.func, args, {**function.keywords, **kwargs})
    if not callable(function) or not _hashable(function):
        return None
    inplace = function in INPLACE_FUNCTIONS
    if function in RELU_FUNCTIONS:
        flag = kwargs.get("inplace", args[0] if args else False)
        return ActivationCall("relu", RELU, inplace=inplace or bool(flag))
    if function in LEAKY_FUNCTIONS:
        slope = kwargs.get("negative_slope", args[0] if args else 0.01)
        flag = kwargs.get("inplace", args[1] if len(args) > 1 else False)
        return _leaky("leaky_relu", slope, inplace or bool(flag))
    if function in (F.prelu, torch.prelu, F.rrelu, F.relu6, F.elu, F.celu, F.selu):
        label = getattr(function, "__name__", "activation")
        return ActivationCall(label, None, f"{label} is not one of none, relu and leaky_relu")
    return None


def is_activation_function(value: Any) -> bool:
    """Whether a value is an activation function the kernels know, or a `partial` of one."""
    while isinstance(value, functools.partial):
        value = value.func
    return callable(value) and _hashable(value) and value in (RELU_FUNCTIONS | LEAKY_FUNCTIONS)


def _leaky(label: str, slope: Any, inplace: bool) -> ActivationCall:
    if isinstance(slope, (fx.Node, torch.Tensor)) or not isinstance(slope, (int, float)):
        return ActivationCall(label, None, "negative_slope is computed in the forward")
    slope = float(slope)
    if not math.isfinite(slope):
        return ActivationCall(label, None, f"negative_slope={slope} is not finite")
    if slope < 0:
        return ActivationCall(
            label,
            None,
            f"negative_slope={slope:g} is negative: the sign of the output would not give the mask",
        )
    if slope == 0:
        return ActivationCall(
            label,
            None,
            "negative_slope=0: leaky_relu(-inf) is NaN there, which a fused ReLU would not give",
        )
    return ActivationCall(label, Activation("leaky_relu", slope), inplace=inplace)


def _hashable(value: Any) -> bool:
    return getattr(value, "__hash__", None) is not None
