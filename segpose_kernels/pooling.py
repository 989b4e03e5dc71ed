# SPDX-License-Identifier: BSD-3-Clause
"""Max-pooling by 2 between fused layers, and channels_last results for callers that want others.

Both have CPU kernels. torch's max-pooling keeps eight bytes of index for every output; here the
backward pass finds the largest value again in the input, which the layer before it keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .autograd import transforms_active
from .backends import LIBRARY
from .checks import NATIVE_DTYPES

__all__ = ["MaxPool2x2", "contiguous", "is_pool2x2"]


def _has_kernels(x: Tensor) -> bool:
    """Whether the kernels take it: a plain CPU tensor in channels_last, called eagerly."""
    return (
        LIBRARY.loaded
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in NATIVE_DTYPES
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class _MaxPool2x2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # Not its result, which the caller may change in place, as torch lets him.
        ctx.save_for_backward(x)
        return _pool(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated again: through torch's own operators
            again: Tensor
            (again,) = torch.autograd.grad(F.max_pool2d(x, 2), x, grad, create_graph=True)
            return again
        x, grad = _as_pixels(x), _as_pixels(grad)
        grad_input: Tensor = torch.ops.segpose.allocate_result(x, x.shape, True)
        torch.ops.segpose.max_pool2x2_backward(grad, _pool(x), x, grad_input)
        return grad_input


def _pool(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y: Tensor = torch.ops.segpose.allocate_result(x, (n, c, h // 2, w // 2), True)
    torch.ops.segpose.max_pool2x2(x, y)
    return y


def _as_pixels(x: Tensor) -> Tensor:
    """In channels_last; what hooks on saved tensors unpack may have come into another format."""
    x = x.contiguous(memory_format=torch.channels_last)
    if x.stride(1) == 1:
        return x
    # torch calls a format by both names where an extent is 1.
    y: Tensor = torch.ops.segpose.allocate_result(x, x.shape, True)
    return y.copy_(x)


_ZERO, _ONE, _TWO = (0, (0, 0)), (1, (1, 1)), (2, (2, 2))


def _halves(pool: nn.MaxPool2d) -> bool:
    """Whether it pools over 2 x 2 pixels as it is now: users may set its attributes."""
    return (
        pool.kernel_size in _TWO
        and pool.stride in _TWO
        and pool.padding in _ZERO
        and pool.dilation in _ONE
        and not pool.ceil_mode
        and not pool.return_indices
    )


def is_pool2x2(module: nn.Module) -> bool:
    """Whether it is torch's own max-pooling over 2 x 2 pixels, without anything added."""
    return type(module) is nn.MaxPool2d and _halves(module)


class MaxPool2x2(nn.MaxPool2d):
    """`nn.MaxPool2d(2)` with the CPU kernels above; other tensors take torch's way, and so do all
    once its attributes ask for another pooling.

    The input is [N, C, H, W] or [C, H, W], the output [N, C, H // 2, W // 2]. As in torch the first
    of equal values gets the gradient, and NaN is larger than any number.
    """

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, input: Tensor) -> Tensor:
        h, w = input.shape[-2:]
        if (
            not _halves(self)
            or not _has_kernels(input)
            or (input.shape[1] > 1 and input.stride(1) != 1)
            or min(h, w) < 2
        ):
            result: Tensor = super().forward(input)
            return result
        y: Tensor = _MaxPool2x2.apply(input)
        return y


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.segpose.to_contiguous(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`, by a kernel for channels_last on CPU."""
    if x.is_contiguous() or not _has_kernels(x):
        return x.contiguous()
    y: Tensor = _Contiguous.apply(x)
    return y
