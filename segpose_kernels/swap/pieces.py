# SPDX-License-Identifier: BSD-3-Clause
"""The modules that `optimize` puts into a model. All can be pickled and copied; none adds a
state_dict key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import conv2d_act, conv_transpose2d_act
from ..nn import Conv2dAct, ConvTranspose2dAct
from ..shapes import empty_output
from .activation import Activation
from .eligible import FUSED_TYPES, Conv, Fused, has_call_hooks
from .filters import (
    FilterCache,
    can_prepare,
    fingerprint,
    geometry_of,
    is_unwatched,
    needs_no_gradient,
    run_prepared,
    slope_of,
)


class AbsorbedActivation(nn.Module):
    """Stands where an activation module stood that runs inside convolutions: returns its input."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description

    def forward(self, input: Tensor) -> Tensor:
        return input

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "negative_slope":
            raise AttributeError(
                "segpose_kernels: negative_slope of an activation that runs inside convolutions "
                f"changes nothing ({self.description}); set it on the convolutions, or call "
                "segpose_kernels.restore(model) first"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return self.description


class AbsorbedCall:
    """Stands where an attribute such as `self.relu = F.leaky_relu` stood: returns its input."""

    def __init__(self, description: str) -> None:
        self.description = description

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input

    def __repr__(self) -> str:
        return f"AbsorbedCall({self.description})"


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """Stands where a BatchNorm2d stood that is folded into the convolution before it: returns its
    input.

    It keeps the BatchNorm's parameters and statistics, so a checkpoint saved now fits the plain
    model.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(
                "segpose_kernels: this BatchNorm2d is folded into its convolution for inference; "
                "call segpose_kernels.restore(model) before training"
            )
        return input


class InferenceConv2dAct(Conv2dAct):
    """Conv2dAct with its filter packed once, in the model's `filters`, while no gradient is needed.

    With a BatchNorm folded in it computes with tensors beside `weight` and `bias`, which stay the
    plain model's.
    """

    filters: FilterCache | None
    folded_norm: nn.BatchNorm2d | None

    def forward(self, input: Tensor) -> Tensor:
        return run_convolution(
            self, input, activation=self.activation, negative_slope=self.negative_slope
        )


class InferenceConvTranspose2dAct(ConvTranspose2dAct):
    """ConvTranspose2dAct with its filter packed once, as `InferenceConv2dAct`."""

    filters: FilterCache | None
    folded_norm: nn.BatchNorm2d | None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return run_convolution(
            self, input, output_size, activation=self.activation, negative_slope=self.negative_slope
        )


INFERENCE_TYPES = (InferenceConv2dAct, InferenceConvTranspose2dAct)

# What every module has: its mode, and the tables of parameters, buffers, children and hooks.
_STATE = frozenset(vars(nn.Module()))
_FOLDED = ("folded_weight", "folded_bias")


def take_place(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the tables of `old`, so that what is put into one is in both, and those of its
    attributes for which it has none.
    """
    own = vars(new)
    own.update({k: v for k, v in vars(old).items() if k in _STATE or k not in own})


def own_attributes(module: nn.Module) -> tuple[str, ...]:
    """Those that a module of this file has for itself."""
    if isinstance(module, FUSED_TYPES):
        computing = ("activation", "negative_slope", "backend")
        return *computing, "filters", "folded_norm", "folded_versions"
    return ("description",) if isinstance(module, AbsorbedActivation) else ()


def keep_folded(new: nn.Module, old: nn.Module) -> None:
    """Leave the folded tensors to `new` alone, which then has a table of buffers for itself."""
    buffers, unsaved = old._buffers, old._non_persistent_buffers_set
    if vars(new).get("folded_norm") is None:
        return
    vars(new).update(_buffers=dict(buffers), _non_persistent_buffers_set=set(unsaved))
    for name in _FOLDED:
        buffers.pop(name, None)
        unsaved.discard(name)


def fused_module(
    conv: Conv,
    activation: Activation,
    backend: str,
    *,
    inference: bool = False,
    filters: FilterCache | None = None,
) -> Fused:
    """The fused twin of a plain convolution, sharing its very parameters.

    The two share their tables, so what replaces a Parameter in one (`load_state_dict(assign=True)`,
    a conversion) replaces it in both. Raises ValueError for geometry the fused constructor rejects.
    """
    options: dict[str, Any] = {
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "device": "meta",
        "activation": activation.name,
        "negative_slope": activation.negative_slope,
        "backend": backend,
    }
    if isinstance(conv, nn.ConvTranspose2d):
        options["output_padding"] = conv.output_padding
    twin = (
        (InferenceConv2dAct if inference else Conv2dAct)
        if isinstance(conv, nn.Conv2d)
        else (InferenceConvTranspose2dAct if inference else ConvTranspose2dAct)
    )
    new: Fused = twin(conv.in_channels, conv.out_channels, groups=conv.groups, **options)
    take_place(new, conv)
    if isinstance(new, INFERENCE_TYPES):
        # Past nn.Module's own attributes: neither is a part of the model.
        vars(new).update(filters=filters, folded_norm=None)
    return new


def fold(new: Fused, norm: nn.BatchNorm2d) -> None:
    """Write BatchNorm's affine map into folded tensors beside the parameters, in float64.

    Source: Jacob et al., "Quantization and training of neural networks", CVPR 2018, section 3.2.

    The tensors are buffers outside the state_dict: they follow `.to()` and are not saved. They are
    written again when a parameter or a statistic has changed.
    """
    weight, bias = _parameters_of(new)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # Tensors of inference mode would have no version that tells when they change.
    with torch.inference_mode(False), torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = (0 if bias is None else bias.double()) - norm.running_mean.double()
        folded_bias = shift * scale
        if norm.bias is not None:
            folded_bias = folded_bias + norm.bias.double()
        if isinstance(new, nn.ConvTranspose2d):
            # [C_in, C_out/groups, R, S]: the output channels of group g are those of its rows.
            rows = scale.view(new.groups, 1, -1).expand(-1, weight.size(0) // new.groups, -1)
            folded = weight.double() * rows.reshape(weight.size(0), -1, 1, 1)
        else:
            folded = weight.double() * scale.view(-1, 1, 1, 1)
        like = torch.empty_like(weight)
        new.register_buffer("folded_weight", like.copy_(folded), persistent=False)
        new.register_buffer("folded_bias", folded_bias.to(weight.dtype), persistent=False)
    vars(new).update(folded_norm=norm, folded_versions=_fold_versions(new, norm))


def _fold_versions(conv: Fused, norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    """Differs when a tensor that was folded has changed; on CPU also past the version counter."""
    own = (*conv._parameters.values(), *norm._parameters.values(), *norm._buffers.values())
    tensors = [t for t in own if t is not None]
    versions = [(id(t), 0 if t.is_inference() else t._version) for t in tensors]
    return *versions, fingerprint(tensors)


def _parameters_of(conv: Fused) -> tuple[Tensor, Tensor | None]:
    table = conv._parameters
    if _computes_parameters(conv):
        return conv.weight, conv.bias
    return table["weight"], table["bias"]  # type: ignore[return-value]


def _computes_parameters(conv: Fused) -> bool:
    """Whether a hook or a parametrization makes weight or bias from other tensors."""
    return not ("weight" in conv._parameters and "bias" in conv._parameters)


def tensors_of(conv: Fused) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that a fused module computes with."""
    norm = vars(conv).get("folded_norm")
    if norm is None:
        return _parameters_of(conv)
    if not torch.compiler.is_compiling() and (
        # The versions would be those of other tensors.
        _computes_parameters(conv) or vars(conv)["folded_versions"] != _fold_versions(conv, norm)
    ):
        fold(conv, norm)
    return conv._buffers["folded_weight"], conv._buffers["folded_bias"]  # type: ignore[return-value]


def run_convolution(
    conv: Fused,
    input: Tensor,
    output_size: list[int] | None = None,
    *,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """A fused module's computation, with an activation of the caller's choice."""
    weight, bias = tensors_of(conv)
    filters = vars(conv).get("filters")
    if filters is not None and is_unwatched():
        output = _run_with_prepared_filter(
            filters, conv, weight, bias, input, output_size, activation, negative_slope
        )
        if output is not None:
            return output
    options: dict[str, Any] = {
        "activation": activation,
        "negative_slope": negative_slope,
        "backend": conv.backend,
    }
    if isinstance(conv, nn.ConvTranspose2d):
        options |= {
            "padding": conv.padding,
            "output_padding": output_padding(conv, input, output_size),
        }
        options |= {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
        return conv_transpose2d_act(input, weight, bias, **options)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        input = nn.functional.pad(
            input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode
        )
        padding = 0
    return conv2d_act(
        input, weight, bias, conv.stride, padding, conv.dilation, conv.groups, **options
    )


def _run_with_prepared_filter(
    filters: FilterCache,
    conv: Fused,
    weight: Tensor,
    bias: Tensor | None,
    input: Tensor,
    output_size: list[int] | None,
    activation: str,
    negative_slope: float,
) -> Tensor | None:
    """None where the call has to run as in training."""
    slope = slope_of(activation, negative_slope)
    if (
        slope is None
        or not needs_no_gradient(input, weight, bias)
        or not can_prepare(conv, weight, bias, input)
    ):
        return None
    extra = None
    if isinstance(conv, nn.ConvTranspose2d):
        extra = output_padding(conv, input, output_size)
    geometry = geometry_of(conv, extra)
    if geometry is None:
        return None
    form = filters.form(conv, weight, bias, tuple(input.shape), geometry, slope)
    if form is None:
        return None
    with torch.no_grad():
        output = empty_output(input, weight, form.output_shape)
        run_prepared(form, input, output)
    return output


def output_padding(
    conv: nn.ConvTranspose2d, input: Tensor, output_size: list[int] | None
) -> tuple[int, ...]:
    """What `output_size` asks for, or the layer's own. ValueError for a size out of range."""
    if output_size is None:
        return conv.output_padding
    geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation)
    return tuple(conv._output_padding(input, list(output_size), *geometry))


def call_convolution(
    conv: nn.Module,
    input: Tensor,
    *args: Any,
    activation: str,
    negative_slope: float,
    **kwargs: Any,
) -> Tensor:
    """What a rewritten forward puts in place of `activation(conv(input))`.

    A module that does more than its class runs as a call: hooks see what they saw before, and a
    forward of its own, a subclass or a parametrization is what the user wants.
    """
    does_more = type(conv) not in (*FUSED_TYPES, *INFERENCE_TYPES) or "forward" in vars(conv)
    if does_more or has_call_hooks(conv) or not isinstance(conv, FUSED_TYPES):
        output = conv(input, *args, **kwargs)
        if activation == "relu":
            return nn.functional.relu(output)
        return nn.functional.leaky_relu(output, negative_slope)
    return run_convolution(
        conv, input, *args, activation=activation, negative_slope=negative_slope, **kwargs
    )
