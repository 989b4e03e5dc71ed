# SPDX-License-Identifier: BSD-3-Clause
"""The same passes by torch's own convolutions (cuDNN), for tuning to choose where they are faster.

They convolve only: bias and activation, or mask and bias gradient, stay one pass of our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import effective_kernel
from .plan import Direction
from .problem import ConvProblem

__all__ = ["library_gather", "library_wgrad"]


def _output_padding(problem: ConvProblem) -> list[int]:
    """What the extents of x have beyond those a transposed convolution gives by itself."""
    result = []
    for axis, (x, y, kernel) in enumerate(
        ((problem.h, problem.p, problem.r), (problem.w, problem.q, problem.s))
    ):
        reach = effective_kernel(kernel, problem.dilation[axis]) - 2 * problem.padding[axis]
        result.append(x - (y - 1) * problem.stride[axis] - reach)
    return result


def library_gather(problem: ConvProblem, direction: Direction, source: Tensor, w: Tensor) -> Tensor:
    """fprop of x [N, C, H, W], or dgrad of y [N, K, P, Q], without bias."""
    transposed = direction == "dgrad"
    result: Tensor = torch.ops.aten.convolution(
        source,
        w,
        None,
        problem.stride,
        problem.padding,
        problem.dilation,
        transposed,
        _output_padding(problem) if transposed else [0, 0],
        problem.groups,
    )
    return result


def library_wgrad(problem: ConvProblem, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Filter gradient [K, C/groups, R, S]; of w only shape and strides count."""
    _, grad_w, _ = torch.ops.aten.convolution_backward(
        y,
        x,
        w,
        None,
        problem.stride,
        problem.padding,
        problem.dilation,
        False,
        [0, 0],
        problem.groups,
        [False, True, False],
    )
    return grad_w  # type: ignore[no-any-return]
