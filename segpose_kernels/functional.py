# SPDX-License-Identifier: BSD-3-Clause
"""The public operators: arguments, dtype and autocast rules, and the choice of backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import auto, backends, checks, fastest
from .autograd import native_ops, transforms_active
from .checks import Pair
from .reference import conv2d_act_reference, conv_transpose2d_act_reference

__all__ = ["conv2d_act", "conv_transpose2d_act"]


# Where `groups` stands among the parameters of both operators.
_GROUPS = 3

Params = tuple[Any, ...]
Runner = Callable[[Tensor, Tensor, Tensor | None, Params], Tensor]


def _aten(op: str, reference: Callable[..., Tensor]) -> Runner:
    """The reference as a backend; the last parameter is the operator's negative_slope."""

    def run(x: Tensor, w: Tensor, b: Tensor | None, params: Params) -> Tensor:
        *geometry, slope = params
        activation = "none" if slope == 1 else "relu" if slope == 0 else "leaky_relu"
        try:
            return reference(x, w, b, *geometry, activation=activation, negative_slope=slope)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"segpose_kernels.{op}: {error}: input is {str(x.dtype).removeprefix('torch.')}, "
                f"supported dtypes are {checks.NATIVE_DTYPE_NAMES}; cast with input.float()"
            ) from error

    return run


@dataclass(frozen=True)
class _Operator:
    """A public operator: its name in messages, its checks, and what runs it on each backend."""

    label: str
    check: Callable[..., None]
    runners: dict[str, Runner]

    def runner(self, name: str) -> Runner:
        """What runs a call on the backend called `name`."""
        return auto.triton_op(self.label) if name == "triton" else self.runners[name]


def _operator(
    label: str, check: Callable[..., None], reference: Callable[..., Tensor]
) -> _Operator:
    runners: dict[str, Runner] = {"aten": _aten(label, reference)}
    if label in native_ops:
        # One operator for both: the dispatcher alone chooses between CPU and CUDA kernels.
        runners["cpu"] = runners["cuda"] = native_ops[label]
    return _Operator(label, check, runners)


_CONV2D = _operator("conv2d", checks.check_conv2d, conv2d_act_reference)
_CONV_TRANSPOSE2D = _operator(
    "conv_transpose2d", checks.check_conv_transpose2d, conv_transpose2d_act_reference
)


def conv2d_act(
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
    backend: str = "auto",
) -> Tensor:
    """Convolution, bias and activation in one kernel: `activation(conv2d(input, weight) + bias)`.

    Arguments up to `groups` mean what they mean in `torch.nn.functional.conv2d`; `padding` may be
    "valid" or "same". The result is [N, C_out, P, Q] (or [C_out, P, Q]) with
    P = (H + 2*padding - dilation*(R - 1) - 1) // stride + 1, in channels_last if input or weight
    is. float32, float64, bfloat16 and float16 have kernels (float32 accumulation for the last
    two); other dtypes that torch takes run on aten. Under autocast, tensors are cast as for torch's
    own convolution.

    activation: "none", "relu" or "leaky_relu"; `negative_slope` belongs to the last. A slope <= 0
    runs convolution and activation one after the other, because the sign of the output does not
    give the derivative then.
    backend: "auto", "cpu", "cuda", "triton" or "aten". "auto" takes the first that can run the call
    (or the one named by the environment variable SEGPOSE_BACKEND).

    Differentiable in input, weight and bias, twice in reverse mode, in forward mode, and under
    torch.func and torch.compile.

    Raises TypeError for arguments of a wrong type, ValueError for an unknown activation or backend
    and for numbers over 2**31 - 1, RuntimeError for sizes and values that torch rejects, and for an
    explicit backend that cannot run the call.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d_act,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            activation=activation,
            negative_slope=negative_slope,
            backend=backend,
        )
    checks.check_tensors("conv2d", input, weight, bias)
    stride = checks.pair("conv2d", "stride", stride)
    dilation = checks.pair("conv2d", "dilation", dilation)
    groups = checks.integer("conv2d", "groups", groups)
    if isinstance(padding, str):
        input, padding = _string_padding(input, weight, stride, padding, dilation)
    else:
        padding = checks.pair("conv2d", "padding", padding)
    params = stride, padding, dilation, groups
    return _call(_CONV2D, input, weight, bias, params, activation, negative_slope, backend)


def conv_transpose2d_act(
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
    backend: str = "auto",
) -> Tensor:
    """Transposed convolution, bias and activation in one kernel.

    Arguments up to `dilation` mean what they mean in `torch.nn.functional.conv_transpose2d`. The
    result is [N, C_out, P, Q] (or [C_out, P, Q]) with
    P = (H - 1)*stride - 2*padding + dilation*(R - 1) + output_padding + 1. The transposed
    convolution is the data gradient of a convolution with the same weight, computed per output
    phase (position modulo stride), so no product with an inserted zero is formed.

    Dtypes, autocast, memory format, `activation`, `negative_slope`, `backend`, derivatives and
    errors are those of `conv2d_act`.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv_transpose2d_act,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            activation=activation,
            negative_slope=negative_slope,
            backend=backend,
        )
    op = "conv_transpose2d"
    checks.check_tensors(op, input, weight, bias)
    params = (
        checks.pair(op, "stride", stride),
        checks.pair(op, "padding", padding),
        checks.pair(op, "output_padding", output_padding),
        checks.integer(op, "groups", groups),
        checks.pair(op, "dilation", dilation),
    )
    return _call(
        _CONV_TRANSPOSE2D, input, weight, bias, params, activation, negative_slope, backend
    )


def _is_trained(input: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)


def _call(
    operator: _Operator,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: Params,  # of the operator, in schema order, without negative_slope
    activation: str,
    negative_slope: float,
    backend: str,
) -> Tensor:
    """Cast, check, choose a backend and run."""
    slope = _fused_slope(operator.label, activation, negative_slope)
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    unbatched = input.dim() == 3
    if unbatched:
        input = input.unsqueeze(0)
    if torch.compiler.is_compiling():
        # The fake of the operator makes the same checks, without guards from this frame.
        if input.is_cuda:
            large = auto.is_large(weight, params[_GROUPS], trained=_is_trained(input, weight))
            name = auto.choose_for_compile(backend, input.device, input.dtype, large)
        else:
            name = backends.select_for_compile(backend, input.device.type, input.dtype)
        if name != "aten" and transforms_active():
            name = _backend_for_compiled_transform(backend)
    else:
        operator.check(input, weight, bias, *params)
        if input.is_cuda:
            large = auto.is_large(weight, params[_GROUPS], trained=_is_trained(input, weight))
            name = auto.choose(backend, input.device, input.dtype, large)
        else:
            name = backends.select(backend, input.device.type, input.dtype)
        known = input.is_cuda or name != "aten"  # on CPU aten is chosen where nothing else runs
        if known and slope is not None and fastest.is_wanted(backend):
            name = fastest.choose(
                operator.label, operator.runners, input, weight, bias, (*params, slope), name
            )
    if weight.numel() == 0:
        name = "aten"  # no input channels: torch's result has no channels then, whatever the bias
    run = operator.runner(name)
    if slope is None:
        y = F.leaky_relu(run(input, weight, bias, (*params, 1.0)), negative_slope)
    else:
        y = run(input, weight, bias, (*params, slope))
    return y.squeeze(0) if unbatched else y


def _backend_for_compiled_transform(backend: str) -> str:
    if backend == "auto":
        return "aten"
    raise RuntimeError(
        f"segpose_kernels: backend {backend!r} cannot run this call: it has no forward-mode AD and "
        "no torch.func transforms inside torch.compile; use backend='auto' to fall back"
    )


def _fused_slope(op: str, activation: str, negative_slope: float) -> float | None:
    """The operator's negative_slope (1 none, 0 ReLU); None where activation has to run unfused."""
    if activation == "relu":
        return 0.0
    if activation == "none":
        return 1.0
    if activation != "leaky_relu":
        raise ValueError(
            f"segpose_kernels.{op}: activation must be 'none', 'relu' or 'leaky_relu', got "
            f"{activation!r}"
        )
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (float, int)):
        raise TypeError(
            f"segpose_kernels.{op}: argument 'negative_slope' must be float, not "
            f"{type(negative_slope).__name__}"
        )
    # A slope <= 0 loses the sign of the pre-activation, and leaky_relu(-inf, 0) is NaN, not 0.
    return float(negative_slope) if 0 < negative_slope < math.inf else None


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's rule for convolutions: floating-point tensors but float64 go to autocast's dtype."""
    device_type = input.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(
        device_type
    ):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if eligible and tensor.device.type == device_type else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


def _string_padding(
    input: Tensor, weight: Tensor, stride: Pair, padding: str, dilation: Pair
) -> tuple[Tensor, Pair]:
    """Input and integer padding for "valid" and "same".

    Where "same" needs one row or column more after the input than before it, the input is padded by
    that much first, as torch does.
    """
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(
            f"segpose_kernels.conv2d: Invalid padding string: {padding!r}; use 'valid', 'same' or "
            "integers"
        )
    if stride != (1, 1):
        raise RuntimeError(
            "segpose_kernels.conv2d: padding='same' is not supported for strided convolutions, got "
            f"stride={stride}; use integers"
        )
    if weight.dim() != 4:
        return input, (0, 0)  # reported by the checks
    total_h, total_w = (
        checks.effective_kernel(weight.shape[2 + i], dilation[i]) - 1 for i in (0, 1)
    )
    if total_h < 0 or total_w < 0:
        return input, (0, 0)  # an empty kernel or a negative dilation: reported by the checks
    if total_h % 2 or total_w % 2:
        input = F.pad(input, (0, total_w % 2, 0, total_h % 2))
    return input, (total_h // 2, total_w // 2)
