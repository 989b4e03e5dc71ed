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
from .activation import Activation
from .eligible import FUSED_TYPES, Conv, Fused, has_call_hooks


class AbsorbedActivation(nn.Module):
    """Stands where an activation module stood that runs inside convolutions: returns its input."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description

    def forward(self, input: Tensor) -> Tensor:
        return input

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


class FoldedConv2dAct(Conv2dAct):
    """Conv2dAct that computes with folded tensors; `weight` and `bias` are the plain model's."""

    folded_weight: Tensor
    folded_bias: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return run_convolution(
            self, input, activation=self.activation, negative_slope=self.negative_slope
        )


class FoldedConvTranspose2dAct(ConvTranspose2dAct):
    """ConvTranspose2dAct that computes with the folded tensors."""

    folded_weight: Tensor
    folded_bias: Tensor

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return run_convolution(
            self, input, output_size, activation=self.activation, negative_slope=self.negative_slope
        )


def fused_module(conv: Conv, activation: Activation, backend: str, *, folded: bool) -> Fused:
    """The fused twin of a plain convolution, sharing its very parameters.

    The two share one table of parameters, so what replaces a Parameter in one
    (`load_state_dict(assign=True)`, a conversion) replaces it in both. Raises ValueError for
    geometry the fused constructor rejects.
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
        (FoldedConv2dAct if folded else Conv2dAct)
        if isinstance(conv, nn.Conv2d)
        else (FoldedConvTranspose2dAct if folded else ConvTranspose2dAct)
    )
    new: Fused = twin(conv.in_channels, conv.out_channels, groups=conv.groups, **options)
    new._parameters = conv._parameters
    for name, value in vars(conv).items():
        if name not in vars(new):
            vars(new)[name] = value
    new.training = conv.training
    return new


def fold(new: Fused, norm: nn.BatchNorm2d) -> None:
    """Write BatchNorm's affine map into the folded tensors of `new`, in float64.

    Source: Jacob et al., "Quantization and training of neural networks", CVPR 2018, section 3.2.

    The tensors are buffers outside the state_dict: they follow `.to()` and are not saved.
    """
    weight, bias = new._parameters["weight"], new._parameters["bias"]
    assert weight is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
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


def run_convolution(
    conv: Fused,
    input: Tensor,
    output_size: list[int] | None = None,
    *,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """A fused module's computation, with an activation of the caller's choice."""
    weight: Tensor = conv.weight
    bias = conv.bias
    if isinstance(conv, (FoldedConv2dAct, FoldedConvTranspose2dAct)):
        weight, bias = conv.folded_weight, conv.folded_bias
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

    With hooks on the module the convolution runs as a call of it, so that they see what they saw
    before.
    """
    if has_call_hooks(conv) or not isinstance(conv, FUSED_TYPES):
        output = conv(input, *args, **kwargs)
        if activation == "relu":
            return nn.functional.relu(output)
        return nn.functional.leaky_relu(output, negative_slope)
    return run_convolution(
        conv, input, *args, activation=activation, negative_slope=negative_slope, **kwargs
    )
