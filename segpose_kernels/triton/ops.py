# SPDX-License-Identifier: BSD-3-Clause
"""torch.ops.segpose_triton.*: the operators of torch.ops.segpose, by Triton kernels.

Same schemas, same fakes, same derivatives (segpose_kernels/autograd.py). They are registered with
`triton_op`, so torch.compile sees the kernels and can plan memory and fuse copies around them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from ..autograd import make_ops
from ..backends import SCHEMAS
from ..checks import check_conv2d, check_conv_transpose2d
from ..shapes import empty_output
from .calls import BackwardPasses, Call, backward_passes, forward_pass
from .launch import (
    launch_bias_activation,
    launch_gather,
    launch_mask,
    launch_wgrad,
    nhwc,
    with_channels,
)
from .library import library_gather, library_wgrad
from .plan_gather import GatherPlan
from .plan_pointwise import plan_bias_activation
from .plan_wgrad import WgradPlan

__all__ = ["NAMESPACE", "triton_ops"]

NAMESPACE = "segpose_triton"

Grads = tuple[Tensor, Tensor, Tensor]


# Passes -------------------------------------------------------------------------------------


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


def run_backward(
    passes: BackwardPasses,
    transposed: bool,
    slope: float,
    grad: Tensor,
    output: Tensor | None,
    x: Tensor,
    w: Tensor,
) -> Grads:
    """The gradients that `passes` are for, and empty tensors in place of the others."""
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


def _forward(transposed: bool, x: Tensor, w: Tensor, b: Tensor | None, *params: Any) -> Tensor:
    call = Call.of(transposed, x, w, params[:-1], params[-1])
    plan, shape = forward_pass(call, b is not None)
    return run_forward(plan, x, w, b, call.slope, shape)


def _backward(
    transposed: bool,
    grad: Tensor,
    output: Tensor | None,
    x: Tensor,
    w: Tensor,
    *params: Any,
) -> Grads:
    *attributes, slope, need_input, need_weight, need_bias = params
    call = Call.of(transposed, x, w, tuple(attributes), slope)
    passes, shape = backward_passes(call, (need_input, need_weight, need_bias))
    _check_backward(grad, output, shape, x, slope)
    return run_backward(passes, transposed, slope, grad, output, x, w)


# Operators ----------------------------------------------------------------------------------


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


def _plain(params: Sequence[Any]) -> Iterator[Any]:
    """Parameters in tuples and plain numbers, whatever the dispatcher made of them."""
    for param in params:
        if isinstance(param, Sequence):
            yield int(param[0]), int(param[1])
        else:
            yield param if isinstance(param, (bool, float)) else int(param)


def conv2d_act(x: Tensor, w: Tensor, b: Tensor | None, *params: Any) -> Tensor:
    check_conv2d(x, w, b, *params[:-1])
    return _forward(False, x, w, b, *_plain(params))


def conv2d_act_backward(
    grad: Tensor, output: Tensor | None, x: Tensor, w: Tensor, *params: Any
) -> Grads:
    check_conv2d(x, w, None, *params[:-4])
    return _backward(False, grad, output, x, w, *_plain(params))


def conv_transpose2d_act(x: Tensor, w: Tensor, b: Tensor | None, *params: Any) -> Tensor:
    check_conv_transpose2d(x, w, b, *params[:-1])
    return _forward(True, x, w, b, *_plain(params))


def conv_transpose2d_act_backward(
    grad: Tensor, output: Tensor | None, x: Tensor, w: Tensor, *params: Any
) -> Grads:
    check_conv_transpose2d(x, w, None, *params[:-4])
    return _backward(True, grad, output, x, w, *_plain(params))


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

# Calls with plain tensors come here without the dispatcher, checked by functional.py.
triton_ops = make_ops(
    NAMESPACE,
    {
        label: (functools.partial(_forward, transposed), functools.partial(_backward, transposed))
        for label, transposed in (("conv2d", False), ("conv_transpose2d", True))
    },
)
