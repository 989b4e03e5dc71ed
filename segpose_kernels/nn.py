# SPDX-License-Identifier: BSD-3-Clause
"""Modules with the constructor arguments and state_dict of torch.nn.Conv2d and ConvTranspose2d."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import conv2d_act, conv_transpose2d_act

__all__ = ["Conv2dAct", "ConvTranspose2dAct"]

ACTIVATIONS = ("none", "relu", "leaky_relu")


def _as_pair(module: str, name: str, value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not all(hasattr(v, "__index__") for v in values):
        raise ValueError(f"{module}: {name} must be an int or a tuple of 2 ints, got {value!r}")
    return values[0], values[1]


def _check_constructor(
    module: str,
    in_channels: int,
    out_channels: int,
    groups: int,
    activation: str,
    at_least: dict[str, tuple[Any, int]],  # name: (value, smallest allowed)
) -> None:
    """Raise ValueError for what torch's constructors accept or report without its numbers."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{module}: activation must be 'none', 'relu' or 'leaky_relu', got {activation!r}"
        )
    if groups < 1:
        raise ValueError(f"{module}: groups must be a positive integer, got {groups}")
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels < 1:
            raise ValueError(f"{module}: {name} must be at least 1, got {channels}")
        if channels % groups:
            raise ValueError(
                f"{module}: {name} must be divisible by groups, got {name}={channels}, "
                f"groups={groups}"
            )
    for name, (value, smallest) in at_least.items():
        if min(_as_pair(module, name, value)) < smallest:
            rule = {
                "padding": "negative padding is not supported: padding",
                "stride": "non-positive stride is not supported: stride",
                "output_padding": "negative output_padding is not supported: output_padding",
                "dilation": "dilation should be greater than zero: dilation",
            }.get(name, name)
            raise ValueError(f"{module}: {rule} must be >= {smallest}, got {value}")


class Conv2dAct(torch.nn.Conv2d):
    """Convolution, bias and activation: torch.nn.Conv2d followed by an activation, fused.

    Arguments up to `dtype` are those of torch.nn.Conv2d, every `padding_mode` included; parameters
    and state_dict are the same, so checkpoints load both ways. `activation`, `negative_slope` and
    `backend` are those of `segpose_kernels.conv2d_act`.

    Input [N, C_in, H, W] or [C_in, H, W], output [N, C_out, P, Q] or [C_out, P, Q].
    Raises ValueError for constructor arguments out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        backend: str = "auto",
    ) -> None:
        at_least: dict[str, tuple[Any, int]] = {
            "kernel_size": (kernel_size, 1),
            "stride": (stride, 1),
            "dilation": (dilation, 1),
        }
        if not isinstance(padding, str):
            at_least["padding"] = (padding, 0)
        _check_constructor(
            type(self).__name__, in_channels, out_channels, groups, activation, at_least
        )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """activation(conv2d(input)), see `segpose_kernels.conv2d_act`."""
        padding: int | str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d_act(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            negative_slope=self.negative_slope,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{_activation_repr(self)}"  # type: ignore[no-untyped-call]


class ConvTranspose2dAct(torch.nn.ConvTranspose2d):
    """Transposed convolution, bias and activation: torch.nn.ConvTranspose2d and an activation.

    Arguments up to `dtype` are those of torch.nn.ConvTranspose2d; parameters and state_dict are the
    same, so checkpoints load both ways. `activation`, `negative_slope` and `backend` are those of
    `segpose_kernels.conv_transpose2d_act`.

    Input [N, C_in, H, W] or [C_in, H, W], output [N, C_out, P, Q] or [C_out, P, Q].
    Raises ValueError for constructor arguments out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        backend: str = "auto",
    ) -> None:
        name = type(self).__name__
        if isinstance(padding, str):
            raise ValueError(
                f"{name}: padding={padding!r} is not supported by a transposed convolution; "
                "padding must be an int or a tuple of 2 ints"
            )
        _check_constructor(
            name,
            in_channels,
            out_channels,
            groups,
            activation,
            {
                "kernel_size": (kernel_size, 1),
                "stride": (stride, 1),
                "padding": (padding, 0),
                "output_padding": (output_padding, 0),
                "dilation": (dilation, 1),
            },
        )
        largest = tuple(
            max(s, d) - 1
            for s, d in zip(
                _as_pair(name, "stride", stride), _as_pair(name, "dilation", dilation), strict=True
            )
        )
        given = _as_pair(name, "output_padding", output_padding)
        if given[0] > largest[0] or given[1] > largest[1]:
            raise ValueError(
                f"{name}: output padding must be smaller than either stride or dilation: "
                f"output_padding={output_padding} with stride={stride}, dilation={dilation}; on "
                "each axis output_padding < stride or output_padding < dilation must hold, so at "
                f"most {largest} here"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """activation(conv_transpose2d(input)), see `segpose_kernels.conv_transpose2d_act`.

        `output_size` (height, width), or the full shape, picks among the sizes that differ by
        `output_padding` only. Raises ValueError for a size out of range.
        """
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = tuple(
                self._output_padding(
                    input,
                    list(output_size),
                    self.stride,  # type: ignore[arg-type]
                    self.padding,  # type: ignore[arg-type]
                    self.kernel_size,  # type: ignore[arg-type]
                    2,
                    self.dilation,  # type: ignore[arg-type]
                )
            )
        return conv_transpose2d_act(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
            activation=self.activation,
            negative_slope=self.negative_slope,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{_activation_repr(self)}"  # type: ignore[no-untyped-call]


def _activation_repr(module: Conv2dAct | ConvTranspose2dAct) -> str:
    text = f", activation={module.activation}"
    if module.activation == "leaky_relu":
        text += f", negative_slope={module.negative_slope}"
    return text if module.backend == "auto" else f"{text}, backend={module.backend}"
