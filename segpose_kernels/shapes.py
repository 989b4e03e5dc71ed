# SPDX-License-Identifier: BSD-3-Clause
"""Extents and memory formats of results, the same for kernels and for their fakes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false, suggest_memory_format

from .checks import effective_kernel

__all__ = ["conv_extents", "conv_transpose_extents", "empty_gradient", "empty_output"]


def conv_extents(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """(P, Q) of a convolution: (size + 2*padding - effective kernel) // stride + 1."""
    return [
        (size[i] + 2 * padding[i] - effective_kernel(kernel[i], dilation[i])) // stride[i] + 1
        for i in (0, 1)
    ]


def conv_transpose_extents(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """(P, Q) of a transposed convolution."""
    full = [(size[i] - 1) * stride[i] + effective_kernel(kernel[i], dilation[i]) for i in (0, 1)]
    return [full[i] - 2 * padding[i] + output_padding[i] for i in (0, 1)]


def _memory_format(x: Tensor, w: Tensor) -> torch.memory_format:
    """torch's rule: channels_last if input or weight is."""
    last = torch.channels_last
    # Where there is no doubt, without the slow look at every stride: those of extents of one count.
    if 1 not in x.shape and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    if suggest_memory_format(x) == last or suggest_memory_format(w) == last:
        return last
    return torch.contiguous_format


def empty_output(x: Tensor, w: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised result of a call with input x and weight w, in torch's memory format."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x, w))


def empty_gradient(w: Tensor) -> Tensor:
    """Uninitialised gradient of a weight, with the strides that the kernels give it.

    Those of the weight where it has no gaps. torch's empty_like is alike for tensors with data, but
    for fakes it makes up the strides of extents of one.
    """
    if is_non_overlapping_and_dense_or_false(w):
        return w.new_empty_strided(w.shape, w.stride())
    return torch.empty_like(w)
