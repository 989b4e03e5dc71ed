# SPDX-License-Identifier: BSD-3-Clause
"""Whether a model may run in channels_last inside, and the hook that hides it from the caller."""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..pooling import contiguous
from .trace import AttributeCall, ForwardTrace

# What raises or answers differently for other strides.
_STRIDE_NAMES = """
    view view_as as_strided as_strided_ stride storage untyped_storage storage_offset data_ptr
    is_contiguous numpy tolist set_ resize_ resize_as_ __array__ to_dlpack __dlpack__ is_set_to
    unfold data view_as_real view_as_complex
"""
_STRIDE_METHODS = frozenset(_STRIDE_NAMES.split())
# What draws random numbers in memory order: other strides, another result from the same seed.
_RANDOM_NAMES = """
    dropout alpha_dropout rrelu rand_like randn_like randint_like bernoulli bernoulli_ normal_
    uniform_ random_ exponential_ cauchy_ log_normal_ geometric_ poisson
"""
_RANDOM = frozenset(_RANDOM_NAMES.split())
_RANDOM_MODULES = (nn.Dropout, nn.AlphaDropout, nn.RReLU)
_LAYER_NAMES = """
    conv batchnorm pooling dropout padding upsampling pixelshuffle flatten linear normalization
    instancenorm channelshuffle container
"""
_LAYER_MODULES = frozenset(f"torch.nn.modules.{name}" for name in _LAYER_NAMES.split())
_OPERATORS = frozenset(value for value in vars(operator).values() if callable(value))


def why_not_channels_last(
    model: nn.Module,
    traces: list[ForwardTrace],
    untraceable: dict[str, str],
    *,
    training: bool,
) -> str:
    """What in the model may depend on strides; empty if nothing does.

    Without `training` only what runs in eval mode counts, where dropout does nothing.
    """
    for name, reason in untraceable.items():
        return f"the forward of {name or type(model).__name__} cannot be read: {reason}"
    traced = {id(trace.owner) for trace in traces}
    for trace in traces:
        if trace.training and not training:
            continue
        for node in trace.graph.nodes:
            reason = _why_random(trace, node) if trace.training else ""
            reason = reason or _why_stride_dependent(trace, node, traced)
            if reason:
                return f"{trace.name or type(model).__name__} uses {reason}"
    return ""


def _why_random(trace: ForwardTrace, node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    module = trace.module_of(node)
    if isinstance(module, _RANDOM_MODULES) or (module is None and name in _RANDOM):
        return f"{type(module).__name__ if module else name}, which draws in memory order"
    return ""


def _why_stride_dependent(trace: ForwardTrace, node: fx.Node, traced: set[int]) -> str:
    if node.op == "call_module":
        module = trace.module_of(node)
        known = id(module) in traced or type(module).__module__ in _LAYER_MODULES
        known = known or isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        known = known or (
            type(module).__module__ == "torch.nn.modules.activation"
            and not isinstance(module, nn.MultiheadAttention)
        )
        return "" if known else f"{type(module).__name__}, which is not known to take any strides"
    if node.op == "call_method":
        return f"Tensor.{node.target}" if node.target in _STRIDE_METHODS else ""
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, AttributeCall) or target in _OPERATORS:
        return ""
    name = getattr(target, "__name__", str(target))
    if target is builtins.getattr:
        attribute = node.args[1] if len(node.args) > 1 else ""
        return f"Tensor.{attribute}" if attribute in _STRIDE_METHODS else ""
    home = getattr(target, "__module__", None) or ""
    if (
        getattr(F, name, None) is target
        or getattr(torch, name, None) is target
        or home.startswith("torch.")
    ):
        return f"torch.{name}" if name in _STRIDE_METHODS else ""
    return (
        ""
        if home in ("builtins", "math")
        else f"{home}.{name}, which is not known to take any strides"
    )


def contiguous_outputs(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook: 4-d results are contiguous again when every 4-d input was.

    So `model(x).view(...)` works as it did before the model ran in channels_last.
    """
    plain = len(args) == 1 and not kwargs and type(args[0]) is type(output) is Tensor
    if plain and output.dim() == 4 and is_contiguous(output):
        return output
    inputs = args if plain else pytree.tree_leaves((args, kwargs))
    if any(is_image(value) and not is_contiguous(value) for value in inputs):
        return output
    return contiguous_values(output)


def contiguous_values(output: Any) -> Any:
    """What a model returns, with its 4-d tensors contiguous."""
    if type(output) is Tensor:
        return _contiguous(output)
    return pytree.tree_map(_contiguous, output)


def is_contiguous(image: Tensor) -> bool:
    """Whether a 4-d tensor is in torch's default memory format, and not in channels_last as torch
    tells the two apart where both fit: by the strides.
    """
    if not image.is_contiguous():
        return False
    _, channels, height, width = image.shape
    if channels > 1:
        if height * width > 1:
            return True
        return not image.stride(0) >= image.stride(2) >= image.stride(3) >= channels
    return image.stride(1) != 1 or height * width == 1


def _contiguous(value: Any) -> Any:
    if not is_image(value) or is_contiguous(value):
        return value
    # One channel: only the strides say channels_last, and a view has others.
    return value.flatten().view(value.shape) if value.is_contiguous() else contiguous(value)


def is_image(value: Any) -> bool:
    """Whether its memory format is kept from the caller."""
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
