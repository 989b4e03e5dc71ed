# SPDX-License-Identifier: BSD-3-Clause
"""torch.ops.segpose_triton.*: the operators of torch.ops.segpose, by Triton kernels.

Same schemas, same fakes, same derivatives (segpose_kernels/autograd.py). They are registered with
`triton_op`, so torch.compile sees the kernels and can plan memory and fuse copies around them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from ..autograd import make_ops
from ..backends import SCHEMAS
from ..checks import NATIVE_DTYPES, check_conv2d, check_conv_transpose2d
from ..shapes import conv_extents, conv_transpose_extents, empty_output
from . import choices
from .device import device_of, float32_precision
from .launch import (
    launch_bias_activation,
    launch_gather,
    launch_mask,
    launch_wgrad,
    nhwc,
    with_channels,
)
from .library import library_gather, library_wgrad
from .plan import Direction, Epilogue, Operands
from .plan_gather import GatherPlan, plan_gather
from .plan_pointwise import MaskPlan, mask_first, plan_bias_activation, plan_mask
from .plan_wgrad import WgradPlan, plan_wgrad
from .problem import ConvProblem

__all__ = ["NAMESPACE", "triton_ops"]

NAMESPACE = "segpose_triton"

Grads = tuple[Tensor, Tensor, Tensor]
Needs = tuple[bool, bool, bool]


# Plans, remembered --------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _known_gather_plan(
    problem: ConvProblem,
    direction: Direction,
    operands: Operands,
    epilogue: Epilogue,
    generation: int,
) -> GatherPlan:
    choice = choices.recall(operands, choices.gather_key(problem, direction, operands, epilogue))
    return plan_gather(problem, direction, operands, epilogue, choice)


def gather_plan(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> GatherPlan:
    """The plan for fprop or dgrad: what tuning has chosen, or the default."""
    if not problem.is_concrete:
        return plan_gather(problem, direction, operands, epilogue)
    return _known_gather_plan(problem, direction, operands, epilogue, choices.generation())


@functools.lru_cache(maxsize=4096)
def _known_wgrad_plan(
    problem: ConvProblem,
    operands: Operands,
    bias: bool,
    mask_x: bool,
    mask_slope: float,
    generation: int,
) -> WgradPlan:
    choice = choices.recall(operands, choices.wgrad_key(problem, operands, mask_slope != 1))
    return plan_wgrad(
        problem, operands, bias=bias, mask_x=mask_x, mask_slope=mask_slope, choice=choice
    )


def wgrad_plan(
    problem: ConvProblem, operands: Operands, *, bias: bool, mask_x: bool, mask_slope: float
) -> WgradPlan:
    """The plan for wgrad: what tuning has chosen, or the default."""
    if not problem.is_concrete:
        return plan_wgrad(problem, operands, bias=bias, mask_x=mask_x, mask_slope=mask_slope)
    generation = choices.generation()
    return _known_wgrad_plan(problem, operands, bias, mask_x, mask_slope, generation)


# Passes -------------------------------------------------------------------------------------


def operands_of(x: Tensor) -> Operands:
    """What plans need to know of a call with input `x`."""
    return Operands(x.dtype, float32_precision(), device_of(x.device))


def _forward(
    problem: ConvProblem,
    direction: Direction,
    source: Tensor,
    w: Tensor,
    bias: Tensor | None,
    slope: float,
    shape: Sequence[int],
) -> Tensor:
    epilogue = Epilogue(bias is not None, slope)
    plan = gather_plan(problem, direction, operands_of(source), epilogue)
    return run_forward(plan, source, w, bias, slope, shape)


def run_forward(
    plan: GatherPlan,
    source: Tensor,
    w: Tensor,
    bias: Tensor | None,
    slope: float,
    shape: Sequence[int],
) -> Tensor:
    """act(fprop or dgrad + bias) by a given plan, in torch's memory format."""
    bias = None if bias is None else bias.contiguous()
    if plan.kernel == "library":
        out = library_gather(plan.problem, plan.direction, source, w)
        if bias is not None or slope != 1:
            last = out.is_contiguous(memory_format=torch.channels_last)
            out = out if last else out.contiguous()
            launch_bias_activation(plan_bias_activation(out.shape, last, slope), out, bias)
        return out
    target = empty_output(source, w, shape)
    return launch_gather(plan, source, None, w, bias, target)


def run_grad_input(
    plan: GatherPlan, grad: Tensor, saved: Tensor | None, w: Tensor, target: Tensor
) -> Tensor:
    """Input gradient by a given plan."""
    if plan.kernel == "library":
        return target.copy_(library_gather(plan.problem, plan.direction, grad, w))
    return launch_gather(plan, grad, saved, w, None, target)


def run_grad_weight(
    plan: WgradPlan, y: Tensor, x: Tensor, saved: Tensor | None, w: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Filter gradient by a given plan."""
    target = torch.empty_like(w)
    if plan.kernel == "library":
        return target.copy_(library_wgrad(plan.problem, y, x, w)), None
    return launch_wgrad(plan, y, x, saved, target)


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


def backward_passes(
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


def _backward(
    problem: ConvProblem,
    transposed: bool,
    slope: float,
    grad: Tensor,
    output: Tensor | None,
    x: Tensor,
    w: Tensor,
    needs: Needs,
) -> Grads:
    passes = backward_passes(problem, transposed, slope, operands_of(x), needs)
    grad = nhwc(grad)
    saved = None if slope == 1 or output is None else nhwc(output)
    grad_x, grad_w, grad_b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if passes.mask is not None:
        grad, sums = launch_mask(passes.mask, grad, saved)
        grad_b = grad_b if sums is None else sums
        saved = None if passes.mask.store else saved
    # Both kernels read the gradient with the same zeros behind its channels: once is enough.
    own = passes.own_channels(transposed)
    wide = grad if own is None else with_channels(grad, own)
    saved = saved if own is None or saved is None else with_channels(saved, own)
    if passes.gather is not None:
        source = grad if passes.gather.kernel == "library" else wide
        grad_x = run_grad_input(passes.gather, source, saved, w, empty_output(x, w, x.shape))
    if passes.wgrad is not None:
        source = grad if passes.wgrad.kernel == "library" else wide
        y, x = (x, source) if transposed else (source, x)
        grad_w, sums = run_grad_weight(passes.wgrad, y, x, saved, w)
        grad_b = grad_b if sums is None else sums
    return grad_x, grad_w, grad_b


# Operators ----------------------------------------------------------------------------------


def _problem(
    x_shape: Sequence[int],
    y_shape: Sequence[int],
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    """The problem with plain channels, kernel and attributes; only extents of images may be
    symbols.
    """
    if w.dtype not in NATIVE_DTYPES:
        raise RuntimeError(f"segpose: there are no kernels for {w.dtype}")
    k, c, r, s = (int(size) for size in w.shape)
    groups = int(groups)
    n, _, height, width = x_shape
    shape = n, c * groups, height, width
    stride, padding, dilation = ((int(a[0]), int(a[1])) for a in (stride, padding, dilation))
    return ConvProblem.of(
        shape, (n, k, *y_shape[2:]), (k, c, r, s), stride, padding, dilation, groups
    )


def conv2d_problem(
    x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[ConvProblem, list[int]]:
    """Problem and output shape of a convolution."""
    extents = conv_extents(x.shape[2:], w.shape[2:], stride, padding, dilation)
    shape = [x.shape[0], w.shape[0], *extents]
    return _problem(x.shape, shape, w, stride, padding, dilation, groups), shape


def conv_transpose2d_problem(
    x: Tensor,
    w: Tensor,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> tuple[ConvProblem, list[int]]:
    """Problem and output shape of a transposed convolution: its input is the problem's y."""
    extents = conv_transpose_extents(
        x.shape[2:], w.shape[2:], stride, padding, output_padding, dilation
    )
    shape = [x.shape[0], w.shape[1] * groups, *extents]
    return _problem(shape, x.shape, w, stride, padding, dilation, groups), shape


def _check_backward(
    grad: Tensor, output: Tensor | None, shape: Sequence[int], x: Tensor, slope: float
) -> None:
    """The last line of defence of the raw operators; the friendly messages are checks.py's."""
    tensors = {"grad_output": grad} | ({} if slope == 1 else {"output": output})
    for name, tensor in tensors.items():
        if tensor is None:
            raise RuntimeError(f"segpose: the backward of an activation needs its {name}, got None")
        if list(tensor.shape) != list(shape):
            raise RuntimeError(
                f"segpose: {name} must be {list(shape)} like the operator's output, got "
                f"{list(tensor.shape)}"
            )
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise RuntimeError(
                f"segpose: {name} must be {x.dtype} on {x.device} like input, got {tensor.dtype} "
                f"on {tensor.device}"
            )


def conv2d_act(x: Tensor, w: Tensor, b: Tensor | None, *params: Any) -> Tensor:
    *attributes, slope = params
    check_conv2d(x, w, b, *attributes)
    problem, shape = conv2d_problem(x, w, *attributes)
    return _forward(problem, "fprop", x, w, b, slope, shape)


def conv2d_act_backward(
    grad: Tensor, output: Tensor | None, x: Tensor, w: Tensor, *params: Any
) -> Grads:
    *attributes, slope, need_input, need_weight, need_bias = params
    check_conv2d(x, w, None, *attributes)
    problem, shape = conv2d_problem(x, w, *attributes)
    _check_backward(grad, output, shape, x, slope)
    needs = need_input, need_weight, need_bias
    return _backward(problem, False, slope, grad, output, x, w, needs)


def conv_transpose2d_act(x: Tensor, w: Tensor, b: Tensor | None, *params: Any) -> Tensor:
    *attributes, slope = params
    check_conv_transpose2d(x, w, b, *attributes)
    problem, shape = conv_transpose2d_problem(x, w, *attributes)
    return _forward(problem, "dgrad", x, w, b, slope, shape)


def conv_transpose2d_act_backward(
    grad: Tensor, output: Tensor | None, x: Tensor, w: Tensor, *params: Any
) -> Grads:
    *attributes, slope, need_input, need_weight, need_bias = params
    check_conv_transpose2d(x, w, None, *attributes)
    problem, shape = conv_transpose2d_problem(x, w, *attributes)
    _check_backward(grad, output, shape, x, slope)
    needs = need_input, need_weight, need_bias
    return _backward(problem, True, slope, grad, output, x, w, needs)


for _function in (
    conv2d_act,
    conv2d_act_backward,
    conv_transpose2d_act,
    conv_transpose2d_act_backward,
):
    triton_op(
        f"{NAMESPACE}::{_function.__name__}",
        _function,
        mutates_args=(),
        schema=SCHEMAS[_function.__name__],
    )

triton_ops = make_ops(NAMESPACE)
