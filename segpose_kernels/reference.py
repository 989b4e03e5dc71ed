# SPDX-License-Identifier: BSD-3-Clause
"""What the two fused operators compute, in plain torch: the kernels are held to this definition.

Both functions also serve as the last backend, "aten": correct for everything torch accepts, fused
nowhere.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["activate", "conv2d_act_reference", "conv_transpose2d_act_reference"]


def activate(x: Tensor, activation: str = "leaky_relu", negative_slope: float = 0.01) -> Tensor:
    """`x`, relu(x) or leaky_relu(x, negative_slope) for activation "none", "relu", "leaky_relu"."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    raise ValueError(f"activation must be 'none', 'relu' or 'leaky_relu', got {activation!r}")


def conv2d_act_reference(
    input: Tensor,  # [N, C_in, H, W] or [C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, R, S]
    bias: Tensor | None = None,  # [C_out]
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """activation(conv2d(input, weight) + bias), as torch computes it.

    Output [N, C_out, P, Q] with P = (H + 2*padding - dilation*(R - 1) - 1) // stride + 1, Q alike.
    """
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return activate(y, activation, negative_slope)


def conv_transpose2d_act_reference(
    input: Tensor,  # [N, C_in, H, W] or [C_in, H, W]
    weight: Tensor,  # [C_in, C_out/groups, R, S]
    bias: Tensor | None = None,  # [C_out]
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """activation(conv_transpose2d(input, weight) + bias), as torch computes it.

    Output [N, C_out, P, Q] with
    P = (H - 1)*stride - 2*padding + dilation*(R - 1) + output_padding + 1, Q alike.
    """
    y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return activate(y, activation, negative_slope)
