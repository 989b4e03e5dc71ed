# SPDX-License-Identifier: BSD-3-Clause
"""call -> plans: the convolution problem behind an operator's call, and the passes that it takes.

Planned once for each kind of call: `forward_pass` and `backward_passes` remember.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import NATIVE_DTYPES
from ..shapes import conv_extents, conv_transpose_extents
from . import choices
from .device import device_of, float32_precision
from .plan import Direction, Epilogue, Operands
from .plan_gather import GatherPlan, plan_gather
from .plan_pointwise import MaskPlan, mask_first, plan_mask
from .plan_wgrad import WgradPlan, plan_wgrad
from .problem import ConvProblem, Pair, concrete

__all__ = [
    "BackwardPasses",
    "Call",
    "Needs",
    "backward_passes",
    "forward_pass",
]

Needs = tuple[bool, bool, bool]


# Problems -----------------------------------------------------------------------------------


def _problem(
    x_shape: Sequence[int],
    y_shape: Sequence[int],
    w_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    """The problem with plain channels and kernel; only extents of images may be symbols."""
    k, c, r, s = (int(size) for size in w_shape)
    n, _, height, width = x_shape
    shape = n, c * groups, height, width
    stride, padding, dilation = ((a[0], a[1]) for a in (stride, padding, dilation))
    return ConvProblem.of(
        shape, (n, k, *y_shape[2:]), (k, c, r, s), stride, padding, dilation, groups
    )


def conv2d_problem(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> tuple[ConvProblem, list[int]]:
    """Problem and output shape of a convolution."""
    extents = conv_extents(x_shape[2:], w_shape[2:], stride, padding, dilation)
    shape = [x_shape[0], w_shape[0], *extents]
    return _problem(x_shape, shape, w_shape, stride, padding, dilation, groups), shape


def conv_transpose2d_problem(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> tuple[ConvProblem, list[int]]:
    """Problem and output shape of a transposed convolution: its input is the problem's y."""
    extents = conv_transpose_extents(
        x_shape[2:], w_shape[2:], stride, padding, output_padding, dilation
    )
    shape = [x_shape[0], w_shape[1] * groups, *extents]
    return _problem(shape, x_shape, w_shape, stride, padding, dilation, groups), shape


class Call(NamedTuple):
    """What a call of an operator is besides the values of its tensors.

    `attributes` are the operator's in schema order: pairs, and groups. A tuple, because plans are
    looked up by it in every call.
    """

    transposed: bool
    x_shape: Sequence[int]
    w_shape: Sequence[int]
    attributes: tuple[Any, ...]
    slope: float
    operands: Operands
    generation: int  # of the choices

    @staticmethod
    def of(
        transposed: bool, x: Tensor, w: Tensor, attributes: tuple[Any, ...], slope: float
    ) -> Call:
        return Call(
            transposed, x.shape, w.shape, attributes, slope, operands_of(x), choices.generation()
        )

    @property
    def is_concrete(self) -> bool:
        return concrete(*self.x_shape, *self.w_shape)

    def problem(self) -> tuple[ConvProblem, list[int]]:
        """The convolution problem, and the shape of the output."""
        problem_of = conv_transpose2d_problem if self.transposed else conv2d_problem
        return problem_of(self.x_shape, self.w_shape, *self.attributes)


def operands_of(x: Tensor) -> Operands:
    """What plans need to know of a call with input `x`."""
    if x.dtype not in NATIVE_DTYPES:
        raise RuntimeError(f"segpose: there are no kernels for {x.dtype}")
    precision = float32_precision() if x.dtype is torch.float32 else "tf32"
    return Operands(x.dtype, precision, device_of(x.device))


def gather_plan(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> GatherPlan:
    """The plan for fprop or dgrad: what tuning has chosen, or the default."""
    choice = None
    if problem.is_concrete:
        key = choices.gather_key(problem, direction, operands, epilogue)
        choice = choices.recall(operands, key)
    return plan_gather(problem, direction, operands, epilogue, choice)


def wgrad_plan(
    problem: ConvProblem, operands: Operands, *, bias: bool, mask_x: bool, mask_slope: float
) -> WgradPlan:
    """The plan for wgrad: what tuning has chosen, or the default."""
    choice = None
    if problem.is_concrete:
        key = choices.wgrad_key(problem, operands, mask_slope != 1)
        choice = choices.recall(operands, key)
    return plan_wgrad(
        problem, operands, bias=bias, mask_x=mask_x, mask_slope=mask_slope, choice=choice
    )


@dataclass(frozen=True)
class BackwardPasses:
    """What the backward of a call launches: None for what it does not need.

    With `mask` and mask.store the gradient is masked first, else where the kernels load it.
    """

    mask: MaskPlan | None
    gather: GatherPlan | None
    wgrad: WgradPlan | None

    def own_channels(self, transposed: bool) -> int | None:
        """Channels with which our own kernels read the gradient; None if none does."""
        if self.gather is not None and self.gather.kernel != "library":
            return self.gather.channels
        if self.wgrad is not None and self.wgrad.kernel != "library":
            return self.wgrad.x_channels if transposed else self.wgrad.y_channels
        return None


def _backward_passes(
    problem: ConvProblem, transposed: bool, slope: float, operands: Operands, needs: Needs
) -> BackwardPasses:
    """Plans for the gradients in `needs` (input, weight, bias)."""
    need_input, need_weight, need_bias = needs
    masks_first = slope != 1 and mask_first(
        problem,
        transposed=transposed,
        need_input=need_input,
        need_weight=need_weight,
        need_bias=need_bias,
    )
    slope_left = 1.0 if masks_first else slope
    gather = wgrad = mask = None
    if need_input:
        direction: Direction = "fprop" if transposed else "dgrad"
        gather = gather_plan(problem, direction, operands, Epilogue(mask_slope=slope_left))
    if need_weight:
        # y is the gradient of a convolution only.
        sums = need_bias and not transposed and not masks_first
        wgrad = wgrad_plan(problem, operands, bias=sums, mask_x=transposed, mask_slope=slope_left)
    sums = need_bias and not (wgrad is not None and wgrad.bias)
    if masks_first or sums:
        if transposed:
            rows, columns = problem.n * problem.h * problem.w, problem.c
        else:
            rows, columns = problem.n * problem.p * problem.q, problem.k
        mask = plan_mask(rows, columns, operands, slope, store=masks_first, sums=sums)
    return BackwardPasses(mask, gather, wgrad)


def _plan_forward(call: Call, bias: bool) -> tuple[GatherPlan, list[int]]:
    problem, shape = call.problem()
    direction: Direction = "dgrad" if call.transposed else "fprop"
    return gather_plan(problem, direction, call.operands, Epilogue(bias, call.slope)), shape


def _plan_backward(call: Call, needs: Needs) -> tuple[BackwardPasses, list[int]]:
    problem, shape = call.problem()
    return _backward_passes(problem, call.transposed, call.slope, call.operands, needs), shape


# While tracing, extents may be symbols, by which nothing can be remembered.
_known_forward = functools.lru_cache(maxsize=4096)(_plan_forward)
_known_backward = functools.lru_cache(maxsize=4096)(_plan_backward)


def forward_pass(call: Call, bias: bool) -> tuple[GatherPlan, list[int]]:
    """The pass of a forward call, and the shape of its output."""
    return (_known_forward if call.is_concrete else _plan_forward)(call, bias)


def backward_passes(call: Call, needs: Needs) -> tuple[BackwardPasses, list[int]]:
    """The passes of a backward call, and the shape of the gradient that it starts from."""
    return (_known_backward if call.is_concrete else _plan_backward)(call, needs)


def forget() -> None:
    """Plan every call anew."""
    _known_forward.cache_clear()
    _known_backward.cache_clear()
