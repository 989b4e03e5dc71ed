# SPDX-License-Identifier: BSD-3-Clause
"""Which convolutions may be replaced: those that do what torch's own classes do and no more."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..nn import Conv2dAct, ConvTranspose2dAct

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Where an optimized model keeps what `restore` needs.
JOURNAL = "_segpose_swap"
Conv = nn.Conv2d | nn.ConvTranspose2d
Fused = Conv2dAct | ConvTranspose2dAct
FUSED_TYPES = (Conv2dAct, ConvTranspose2dAct)

# What decides how a convolution computes, and who does it.
CONV_ATTRIBUTES = (
    *("__class__", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode"),
    *("activation", "negative_slope", "backend"),
)

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def is_convolution(module: nn.Module) -> TypeGuard[Conv]:
    """Whether the module is a candidate: any 2-d convolution, fused ones included."""
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))


def has_call_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return any(getattr(module, name, None) for name in CALL_HOOKS)


def why_not_plain(module: nn.Module) -> str:
    """Why a module's call is more than its class's forward; empty if it is not."""
    if has_call_hooks(module):
        return "has forward or backward hooks"
    if "forward" in vars(module):
        return "has a forward of its own set on the instance"
    if any(getattr(module, name, None) for name in _STATE_HOOKS):
        return "has state_dict hooks"
    return ""


def why_not_eligible(module: nn.Module) -> str:
    """Why a convolution cannot be replaced; empty if it can."""
    kind = type(module).__name__
    if isinstance(module, LazyModuleMixin):
        return f"{kind} has no shape yet: run the model once first"
    if parametrize.is_parametrized(module):
        return "has a parametrization"
    if type(module) not in (nn.Conv2d, nn.ConvTranspose2d):
        base = "Conv2d" if isinstance(module, nn.Conv2d) else "ConvTranspose2d"
        return f"{kind} is a subclass of {base}"
    if getattr(module, "qconfig", None) is not None:
        return "has a quantization qconfig"
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return "its weight is computed by a hook (weight_norm, spectral_norm or pruning)"
    hooks = why_not_plain(module)
    if hooks:
        return hooks
    if set(parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "carries parameters, buffers or modules beyond weight and bias"
    return _why_not_tensors(parameters["weight"], parameters["bias"])


def _why_not_tensors(weight: Any, bias: Any) -> str:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor:
            return f"its {name} is a {type(tensor).__name__}, not a plain Parameter"
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return f"its {name} has layout {tensor.layout}"
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"its {name} is {dtype}, for which there is no kernel"
    if bias is not None and (bias.dtype != weight.dtype or bias.device != weight.device):
        return "its bias differs from its weight in dtype or device"
    return ""


def modules_held_outside(model: nn.Module) -> dict[int, str]:
    """Modules that a plain attribute, list, dict or bound method also holds: id and place.

    Code that reaches a module that way would still call the old one after a replacement.
    """
    held: dict[int, str] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if (
                attribute in ("_modules", "_parameters", "_buffers", JOURNAL)
                or "_hooks" in attribute
            ):
                continue
            for item in _reachable(value, depth=3):
                held.setdefault(id(item), f"{name}.{attribute}" if name else attribute)
    return held


def _reachable(value: Any, depth: int) -> Iterator[nn.Module]:
    """Modules one can get from a plain value; what a found module holds stays live."""
    if isinstance(value, nn.Module):
        yield value
        return
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
    elif isinstance(value, functools.partial):
        items = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        items = [value.__self__]
    elif isinstance(value, FunctionType):
        items = list(inspect.getclosurevars(value).nonlocals.values())
    for item in items if depth else []:
        yield from _reachable(item, depth - 1)
