# SPDX-License-Identifier: BSD-3-Clause
"""Host-side checks of arguments, the same for every backend and for fake tensors.

The exception classes and key phrases are torch's (RuntimeError from operators, TypeError for types,
ValueError from module constructors); every message names the argument, its value, the rule and the
fix. Each rule is one comparison, and its message is only built when it fails.

Sizes may be symbolic (torch.compile, torch.export): they are compared through `_holds`, which never
asks for the value of a size that is only known at run time.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "NATIVE_DTYPES",
    "check_conv2d",
    "check_conv_transpose2d",
    "check_tensors",
    "effective_kernel",
    "integer",
    "pair",
]

Pair = tuple[int, int]

# What the package's own kernels compute; other dtypes are aten's business.
NATIVE_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
NATIVE_DTYPE_NAMES = "float32, float64, bfloat16, float16"

# Kernels count steps in 64 bits: no sum or product of two values overflows then.
_LARGEST = 2**31 - 1
# A result's bytes have to be counted in 64 bits, too.
_MOST_ELEMENTS = 2**60 - 1
# Calls within these break neither rule.
_USUAL_STEP = 255
_USUAL_EXTENT = 2**20

# Subclasses (fake tensors among them) may have symbolic sizes.
_ORDINARY = frozenset({Tensor, torch.nn.Parameter})


def _fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"segpose_kernels.{op}: {message}")


def _wrong_type(op: str, name: str, expected: str, value: object) -> NoReturn:
    raise TypeError(
        f"segpose_kernels.{op}: argument '{name}' must be {expected}, not {type(value).__name__}"
    )


def _holds(condition: Any) -> bool:
    """Truth of a comparison of sizes; False where a symbolic one cannot be decided yet."""
    if condition.__class__ is bool:
        return condition
    # Imported here because it loads sympy, which plain eager use never needs.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# Integers and pairs --------------------------------------------------------------------------


def integer(op: str, name: str, value: Any) -> int:
    """`value` as an int: Python, numpy and symbolic integers, and 0-dim integer tensors.

    Raises TypeError for anything else, bool included.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool):
        _wrong_type(op, name, "int", value)
    try:
        return operator.index(value)
    except TypeError:
        _wrong_type(op, name, "int", value)


def pair(op: str, name: str, value: Any) -> Pair:
    """`value` as (height, width): an integer, or a tuple or list of one or two of them.

    Raises TypeError for other types, RuntimeError for other lengths.
    """
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2:
        height, width = value
        if type(height) is int and type(width) is int:
            return value
    if isinstance(value, (tuple, list)):
        if len(value) not in (1, 2):
            _fail(
                op,
                f"expected {name} to be a single integer value or a list of 2 values to match the "
                f"convolution dimensions, but got {name}={list(value)}; "
                f"pass {name}=(height, width)",
            )
        return integer(op, name, value[0]), integer(op, name, value[-1])
    if isinstance(value, (str, bool)) or not hasattr(value, "__index__"):
        _wrong_type(op, name, "an int or a tuple of 2 ints", value)
    value = integer(op, name, value)
    return value, value


def effective_kernel(kernel: int, dilation: int) -> int:
    """Extent that a dilated kernel covers."""
    return dilation * (kernel - 1) + 1


# Tensors -------------------------------------------------------------------------------------


def check_tensors(op: str, input: object, weight: object, bias: object) -> None:
    """Raise TypeError unless input and weight are tensors and bias is a tensor or None."""
    if not isinstance(input, Tensor):
        _wrong_type(op, "input", "Tensor", input)
    if not isinstance(weight, Tensor):
        _wrong_type(op, "weight", "Tensor", weight)
    if not (bias is None or isinstance(bias, Tensor)):
        _wrong_type(op, "bias", "Tensor or None", bias)


def _check_placement(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """One device, one dtype, dense tensors."""
    others = (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias))
    device, dtype = input.device, input.dtype
    for name, tensor in (("input", input), *others):
        if tensor.layout is not torch.strided:
            _fail(
                op,
                f"{name} has layout {tensor.layout}, but only dense (strided) tensors are "
                f"supported; call {name}.to_dense()",
            )
    for name, tensor in others:
        if tensor.device != device:
            _fail(
                op,
                f"input is on {device}, {name} on {tensor.device}, but the devices of input and "
                f"{name} should be the same; move one of them with .to(device)",
            )
        if tensor.dtype is not dtype:
            _fail(
                op,
                f"Input type ({input.dtype}) and {name} type ({tensor.dtype}) should be the same: "
                f"input is {_dtype(input)}, {name} {_dtype(tensor)}; cast one with .to(dtype), or "
                "use torch.autocast",
            )


def _check_attributes(
    op: str, stride: Pair, padding: Pair, dilation: Pair, groups: int, output_padding: Pair | None
) -> None:
    """Range of the integer arguments, then their signs in torch's order."""
    _check_range(op, stride=stride, padding=padding, dilation=dilation, groups=(groups,))
    if output_padding is not None:
        _check_range(op, output_padding=output_padding)
    if padding[0] < 0 or padding[1] < 0:
        axis = "height" if padding[0] < 0 else "width"
        _fail(
            op,
            f"negative padding is not supported: padding must be >= 0, got {padding} "
            f"(negative on the {axis} axis); crop the input instead",
        )
    if stride[0] < 1 or stride[1] < 1:
        axis = "height" if stride[0] < 1 else "width"
        _fail(
            op,
            f"non-positive stride is not supported: stride must be >= 1, got {stride} "
            f"(on the {axis} axis); use 1 for no stride",
        )
    if dilation[0] < 1 or dilation[1] < 1:
        _fail(
            op,
            f"dilation should be greater than zero: dilation must be >= 1, got {dilation}; "
            "use 1 for no dilation",
        )
    if groups < 1:
        _fail(
            op,
            f"non-positive groups is not supported: groups must be >= 1, got {groups}; use 1 for "
            "an ungrouped convolution",
        )
    if output_padding is not None:
        _check_output_padding(op, output_padding, stride, dilation)


def _check_range(op: str, **arguments: tuple[int, ...]) -> None:
    """Symbolic numbers are checked once they have values."""
    for name, values in arguments.items():
        if any(type(value) is int and value > _LARGEST for value in values):
            got = values[0] if len(values) == 1 else values
            raise ValueError(
                f"segpose_kernels.{op}: {name} is too large: {name} must be <= {_LARGEST}, got "
                f"{got}; use a smaller {name}"
            )


def _check_output_padding(op: str, output_padding: Pair, stride: Pair, dilation: Pair) -> None:
    if output_padding[0] < 0 or output_padding[1] < 0:
        _fail(
            op,
            "negative output_padding is not supported: output_padding must be >= 0, got "
            f"{output_padding}; use padding to crop the output",
        )
    largest = max(stride[0], dilation[0]) - 1, max(stride[1], dilation[1]) - 1
    if output_padding[0] > largest[0] or output_padding[1] > largest[1]:
        _fail(
            op,
            "output padding must be smaller than either stride or dilation, but got "
            f"output_padding={output_padding} with stride={stride}, dilation={dilation}: on each "
            "axis output_padding < stride or output_padding < dilation must hold, so at most "
            f"{largest} here",
        )


def _check_channels(
    op: str, transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> None:
    """Channel counts of input, weight and bias against groups; sizes in torch's order."""
    x, w = input.shape, weight.shape
    if _holds(w[0] < groups) or _holds(w[0] < 1):
        _fail(
            op,
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, but "
            f"got weight of size {list(w)} instead; use a weight with more channels or fewer "
            "groups",
        )
    if groups != 1 and _holds(w[0] % groups != 0):
        _fail(
            op,
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size {list(w)} instead; use a divisor of {w[0]} as groups",
        )
    if transposed:
        if _holds(x[1] != w[0]):
            _fail(
                op,
                f"Given transposed=1, weight of size {list(w)}, expected input{list(x)} to have "
                f"{w[0]} channels, but got {x[1]} channels instead: input.size(1)={x[1]} but "
                f"weight.size(0)={w[0]}; the weight of a transposed convolution is "
                "(in, out/groups, kH, kW)",
            )
        if _holds(w[1] < 1):
            _fail(
                op,
                f"weight of size {list(w)} has no output channel: weight.size(1) must be >= 1; "
                "the weight of a transposed convolution is (in, out/groups, kH, kW)",
            )
    elif _holds(x[1] != w[1] * groups):
        cause = "" if groups == 1 else f" * groups={groups}"
        _fail(
            op,
            f"Given groups={groups}, weight of size {list(w)}, expected input{list(x)} to have "
            f"{w[1] * groups} channels, but got {x[1]} channels instead: input.size(1)={x[1]} but "
            f"weight.size(1)={w[1]}{cause}; the weight of a convolution is "
            "(out, in/groups, kH, kW)",
        )
    if bias is None:
        return
    channels = w[1] * groups if transposed else w[0]
    if bias.dim() != 1 or _holds(bias.shape[0] != channels):
        given = "Given transposed=1, weight" if transposed else "Given weight"
        _fail(
            op,
            f"{given} of size {list(w)}, expected bias to be 1-dimensional with {channels} "
            f"elements, but got bias of size {list(bias.shape)} instead; pass one value per output "
            "channel, or None",
        )


def _check_extents(
    op: str,
    input: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    output_padding: Pair | None,
) -> None:
    """Spatial extents: a kernel, an input and an output that are not empty."""
    n, _, h, w = input.shape
    _, _, r, s = weight.shape
    if _holds(r < 1) or _holds(s < 1):
        _fail(op, f"kernel size must be at least 1 on each axis, but weight has kernel ({r}, {s})")
    kernel_h, kernel_w = effective_kernel(r, dilation[0]), effective_kernel(s, dilation[1])
    if output_padding is None:
        padded_h, padded_w = h + 2 * padding[0], w + 2 * padding[1]
        if _holds(padded_h < kernel_h) or _holds(padded_w < kernel_w):
            _fail(
                op,
                f"Calculated padded input size per channel: ({padded_h} x {padded_w}). "
                f"Kernel size: ({kernel_h} x {kernel_w}). Kernel size can't be greater than actual "
                "input size (the kernel size here is the effective one, "
                "dilation*(kernel - 1) + 1); use more padding or a smaller kernel or dilation",
            )
    else:
        out_h = (h - 1) * stride[0] - 2 * padding[0] + kernel_h + output_padding[0]
        out_w = (w - 1) * stride[1] - 2 * padding[1] + kernel_w + output_padding[1]
        if _holds(out_h < 1) or _holds(out_w < 1):
            _fail(
                op,
                f"Given input size per channel: ({h} x {w}). Calculated output size per channel: "
                f"({out_h} x {out_w}). Output size is too small: (in - 1)*stride - 2*padding + "
                "dilation*(kernel - 1) + output_padding + 1 must be at least 1; use less padding",
            )
    if (_holds(h == 0) or _holds(w == 0)) and _holds(n != 0):
        _fail(
            op,
            "Only zero batch or zero channel inputs are supported, but got input shape: "
            f"{list(input.shape)}; the spatial extents must be at least 1",
        )
    channels = weight.shape[1]  # of one group
    if output_padding is None:
        channels = weight.shape[0]
        out_h = (padded_h - kernel_h) // stride[0] + 1
        out_w = (padded_w - kernel_w) // stride[1] + 1
    _check_size(op, [n, channels, out_h, out_w])


def _check_size(op: str, shape: list[int]) -> None:
    """Elements of the result. Symbolic sizes are checked once they have values."""
    if all(type(size) is int for size in shape) and math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(
            f"segpose_kernels.{op}: the result is too large: it must have at most "
            f"{_MOST_ELEMENTS} elements, got size {shape}; use less padding or smaller extents"
        )


def _plainly_valid(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    output_padding: Pair | None,
) -> bool:
    """Whether a call breaks no rule, for ordinary tensors of usual extents, in one expression.

    False decides nothing: the rules are then walked one by one. Module calls of a few microseconds
    pass through here, so nothing is looked up twice.
    """
    if input.__class__ not in _ORDINARY or input.dim() != 4 or weight.dim() != 4:
        return False
    _, c, h, w = input.shape
    c0, c1, r, s = weight.shape
    stride_h, stride_w = stride
    padding_h, padding_w = padding
    dilation_h, dilation_w = dilation
    kernel_h, kernel_w = dilation_h * (r - 1) + 1, dilation_w * (s - 1) + 1
    if output_padding is None:
        channels_match, channels_out = c == c1 * groups, c0
        extents = h + 2 * padding_h >= kernel_h and w + 2 * padding_w >= kernel_w
    else:
        extra_h, extra_w = output_padding
        channels_match, channels_out = c == c0, c1 * groups
        extents = (
            (h - 1) * stride_h - 2 * padding_h + kernel_h + extra_h > 0
            and (w - 1) * stride_w - 2 * padding_w + kernel_w + extra_w > 0
            and (0 <= extra_h < stride_h or 0 <= extra_h < dilation_h)
            and (0 <= extra_w < stride_w or 0 <= extra_w < dilation_w)
        )
    dtype, device = input.dtype, input.device
    return (
        channels_match
        and extents
        and 0 < h <= _USUAL_EXTENT >= w > 0
        and r > 0 < s
        and c0 > 0 < c1
        and stride_h > 0 < stride_w
        and dilation_h > 0 < dilation_w
        # Negative or large if one of them is.
        and _USUAL_STEP
        >= (stride_h | stride_w | padding_h | padding_w | dilation_h | dilation_w)
        >= 0
        and groups > 0
        and c0 % groups == 0
        and dtype is weight.dtype
        and device == weight.device
        and input.layout is torch.strided
        and weight.layout is torch.strided
        and (
            bias is None
            or (
                bias.dim() == 1
                and bias.shape[0] == channels_out
                and dtype is bias.dtype
                and device == bias.device
                and bias.layout is torch.strided
            )
        )
    )


def check_call(
    op: str,
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    output_padding: Pair | None = None,
) -> None:
    """Check one call of an operator on 4-D tensors; `output_padding` is None for a convolution.

    Raises RuntimeError with torch's key phrases for everything that torch's operator rejects,
    ValueError for numbers that no kernel can count with.
    """
    if _plainly_valid(input, weight, bias, stride, padding, dilation, groups, output_padding):
        return
    if input.dim() != 4:
        _fail(
            op,
            f"Expected 3D (unbatched) or 4D (batched) input to {op}, but got input of size: "
            f"{list(input.shape)}; use reshape or input[None] to get (N, C, H, W)",
        )
    _check_attributes(op, stride, padding, dilation, groups, output_padding)
    transposed = output_padding is not None
    if weight.dim() != 4:
        n = weight.dim()
        _fail(
            op,
            f"Expected {n}-dimensional input for {n}-dimensional weight {list(weight.shape)}: "
            f"weight must be 4-D {'(in, out/groups' if transposed else '(out, in/groups'}, kH, kW)"
            f", got {list(weight.shape)}",
        )
    _check_placement(op, input, weight, bias)
    _check_channels(op, transposed, input, weight, bias, groups)
    _check_extents(op, input, weight, stride, padding, dilation, output_padding)


def check_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> None:
    """`check_call` with the arguments of conv2d, in its order."""
    check_call("conv2d", input, weight, bias, stride, padding, dilation, groups)


def check_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> None:
    """`check_call` with the arguments of conv_transpose2d, in its order."""
    check_call(
        "conv_transpose2d", input, weight, bias, stride, padding, dilation, groups, output_padding
    )
