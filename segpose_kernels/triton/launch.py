# SPDX-License-Identifier: BSD-3-Clause
"""plan -> launch: brings tensors into the kernels' layouts, allocates, and starts kernels.

Everything here is traceable: torch.compile records the tensor operations and one node for each
launch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .direct import direct_kernel, direct_wgrad_kernel
from .kernels import igemm_kernel, wgrad_kernel
from .plan import Arguments
from .plan_gather import GatherPlan
from .plan_pointwise import MaskPlan, PointwisePlan, plan_reduced_last
from .plan_wgrad import WgradPlan
from .pointwise import (
    bias_activation_kernel,
    mask_kernel,
    reduce_kernel,
    reduced_last_kernel,
)
from .problem import ConvProblem
from .start import start, wrap_triton
from .tiles import ceil_div

__all__ = [
    "launch_bias_activation",
    "launch_gather",
    "launch_mask",
    "launch_wgrad",
    "nhwc",
]

_REDUCE_BLOCK = 256


def nhwc(tensor: Tensor) -> Tensor:
    """The same values, dense in channels_last: NHWC for activations, KRSC for filters."""
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty_nhwc(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def with_channels(tensor: Tensor, channels: int) -> Tensor:
    """`nhwc` of a tensor with zeros behind its channels, up to `channels`."""
    n, c, h, w = tensor.shape
    if c == channels:
        return nhwc(tensor)
    padded = _empty_nhwc(tensor, (n, channels, h, w))
    padded[:, :c].copy_(tensor)
    padded[:, c:].zero_()
    return padded


def _dense(target: Tensor) -> Tensor:
    """Where a kernel writes what belongs into `target`: itself, if its memory is NHWC."""
    if target.is_contiguous(memory_format=torch.channels_last):
        return target
    return _empty_nhwc(target, target.shape)


def _deliver(out: Tensor, target: Tensor) -> Tensor:
    return target if out is target else target.copy_(out)


# fprop and dgrad ----------------------------------------------------------------------------


def _filter(plan: GatherPlan, w: Tensor) -> Tensor:
    """The filter [K, C/groups, R, S] as KRSC, padded as the plan's kernel reads it."""
    if plan.direction == "fprop":
        return with_channels(w, plan.channels // plan.problem.groups)
    if w.shape[0] != plan.channels:
        more = w.new_zeros((plan.channels - w.shape[0], *w.shape[1:]))
        w = torch.cat((w, more))
    return nhwc(w)


def _reduced_last(problem: ConvProblem, w: Tensor) -> Tensor:
    """The filter [K, C/groups, R, S] as [groups, C/groups, R, S, K/groups] of a dgrad's problem."""
    channels_last = w.is_contiguous(memory_format=torch.channels_last)
    w = w if channels_last else w.contiguous()
    shape = problem.groups, problem.c_per_group, problem.r, problem.s, problem.k_per_group
    out = w.new_empty(shape)
    plan = plan_reduced_last(tuple(w.shape), shape, channels_last)
    tensors = {"w_ptr": w, "out_ptr": out}
    start(wrap_triton(reduced_last_kernel), plan.grid, tensors, plan.arguments)
    return out


def launch_gather(
    plan: GatherPlan,
    source: Tensor,  # x for fprop, y for dgrad
    saved: Tensor | None,  # the activation's output in the shape of source
    w: Tensor,  # [K, C/groups, R, S]
    bias: Tensor | None,
    target: Tensor,
) -> Tensor:
    """act(fprop or dgrad + bias) into `target`, which is returned."""
    out = _dense(target)
    transposes = plan.direction == "dgrad" and plan.reduced_last
    tensors = {
        "src_ptr": with_channels(source, plan.channels),
        "saved_ptr": None if saved is None else with_channels(saved, plan.channels),
        "w_ptr": _reduced_last(plan.problem, w) if transposes else _filter(plan, w),
        "bias_ptr": bias,
        "out_ptr": out,
    }
    if plan.kernel == "direct":
        start(wrap_triton(direct_kernel), plan.grid, tensors, plan.arguments)
    else:
        start(wrap_triton(igemm_kernel), plan.grid, tensors, plan.arguments)
    return _deliver(out, target)


# wgrad and bias gradient --------------------------------------------------------------------


def _parts(splits: int, out: Tensor) -> Tensor:
    """Where a kernel writes its sums: the result itself, or parts of it [splits, ...]."""
    if splits == 1:
        return out
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    return torch.empty((splits, out.numel()), dtype=dtype, device=out.device)


def _reduce(
    splits: int,
    parts: Tensor,
    out: Tensor,
    bias_parts: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> None:
    if splits == 1:
        return
    bias_count = 0 if bias_out is None else bias_out.numel()
    tensors = {
        "parts_ptr": parts,
        "out_ptr": out,
        "bias_parts_ptr": bias_parts,
        "bias_out_ptr": bias_out,
    }
    arguments = _reduce_arguments(out.numel(), bias_count, splits)
    grid = arguments["tiles"] + ceil_div(bias_count, _REDUCE_BLOCK)
    start(wrap_triton(reduce_kernel), grid, tensors, arguments)


@functools.lru_cache(maxsize=4096)
def _reduce_arguments(count: int, bias_count: int, splits: int) -> Arguments:
    return Arguments(
        count=count,
        bias_count=bias_count,
        splits=splits,
        tiles=ceil_div(count, _REDUCE_BLOCK),
        BLOCK=_REDUCE_BLOCK,
        num_warps=4,
        num_stages=2,
    )


def launch_wgrad(
    plan: WgradPlan,
    y: Tensor,  # [N, K, P, Q]
    x: Tensor,  # [N, C, H, W]
    saved: Tensor | None,  # the activation's output in the shape of y, or of x if MASK_X
    target: Tensor,  # [K, C/groups, R, S]
) -> tuple[Tensor, Tensor | None]:
    """Filter gradient into `target`, and the sums of y over its pixels if the plan has them."""
    k, c, r, s = target.shape
    k_out, c_out = plan.y_channels, plan.x_channels // plan.problem.groups
    padded = (k_out, c_out) != (k, c)
    out = _empty_nhwc(target, (k_out, c_out, r, s)) if padded else _dense(target)
    bias_out = target.new_empty(k_out) if plan.bias else None
    parts = _parts(plan.splits, out)
    bias_parts = None if bias_out is None else _parts(plan.splits, bias_out)
    if saved is not None:
        saved = with_channels(saved, plan.x_channels if plan.constants["MASK_X"] else k_out)
    tensors = {
        "y_ptr": with_channels(y, k_out),
        "x_ptr": with_channels(x, plan.x_channels),
        "saved_ptr": saved,
        "out_ptr": parts,
    }
    if plan.kernel == "direct":
        start(wrap_triton(direct_wgrad_kernel), plan.grid, tensors, plan.arguments)
    else:
        tensors["bias_out_ptr"] = bias_parts
        start(wrap_triton(wgrad_kernel), plan.grid, tensors, plan.arguments)
    _reduce(plan.splits, parts, out, bias_parts, bias_out)
    if padded:
        out = out[:k, :c]
        bias_out = None if bias_out is None else bias_out[:k].clone()
    return _deliver(out, target), bias_out


def launch_mask(
    plan: MaskPlan,
    grad: Tensor,  # [N, C, P, Q], dense in channels_last
    saved: Tensor | None,  # the activation's output, alike
) -> tuple[Tensor, Tensor | None]:
    """The gradient before the activation if the plan stores it, else `grad`; and its sums over
    pixels if the plan has them.
    """
    masked = torch.empty_like(grad) if plan.store else None
    total = grad.new_empty(grad.shape[1]) if plan.sums else None
    parts = None if total is None else _parts(plan.splits, total)
    tensors = {"grad_ptr": grad, "saved_ptr": saved, "out_ptr": masked, "sums_out_ptr": parts}
    start(wrap_triton(mask_kernel), plan.grid, tensors, plan.arguments)
    if parts is not None and total is not None:
        _reduce(plan.splits, parts, total)
    return grad if masked is None else masked, total


def launch_bias_activation(plan: PointwisePlan, y: Tensor, bias: Tensor | None) -> None:
    """y = act(y + bias) in place, for y dense in channels_last or contiguous, as planned."""
    tensors = {"y_ptr": y, "bias_ptr": bias}
    start(wrap_triton(bias_activation_kernel), plan.grid, tensors, plan.arguments)
