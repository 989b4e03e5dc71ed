# SPDX-License-Identifier: BSD-3-Clause
"""Index arithmetic that the kernels share: exact division, phases of an axis, activations.

Every integer argument of a kernel may arrive as a constant 1: compilers that launch these kernels
(Inductor among them) fold ones into the code. So nothing here calls a tensor method on an argument.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reciprocal_of(divisor):
    """floor((2**32 - 1) / divisor) for `divide`, to be computed once, outside loops."""
    return tl.full((), 0xFFFFFFFF, tl.uint32) // tl.cast(divisor, tl.uint32)


@triton.jit
def divide(x, divisor, reciprocal, WIDE: tl.constexpr):
    """Quotient and remainder of x >= 0 by divisor > 0.

    For x < 2**31 the product with the truncated reciprocal is the quotient or one less, so one
    correction makes it exact (Granlund and Montgomery, "Division by invariant integers using
    multiplication", PLDI 1994). WIDE takes 64-bit x and divides.
    """
    if WIDE:
        quotient = x // divisor
        remainder = x - quotient * divisor
    else:
        quotient = tl.umulhi(tl.cast(x, tl.uint32), reciprocal).to(tl.int32)
        remainder = x - quotient * divisor
        short = remainder >= divisor
        quotient = tl.where(short, quotient + 1, quotient)
        remainder = tl.where(short, remainder - divisor, remainder)
    return quotient, remainder


@triton.jit
def phase_of_axis(
    index, extent, kernel, stride, pad, dilation, stride_dilation_gcd, TRANSPOSED: tl.constexpr
):
    """One axis of phase `index`: which destination positions it has and which taps reach them.

    Returns (start, count, step, source_start, source_step, tap_start, tap_step, taps, tap_offset):
        destination position  start + i*step, i < count
        filter position       tap_start + t*tap_step, t < taps
        source position       source_start + i*source_step + t*tap_offset

    A convolution is one phase. A transposed one has `stride` of them: tap r reaches position o
    exactly when o + pad - r*dilation is a multiple of stride, so the taps of a phase are one
    residue class modulo stride/gcd(stride, dilation). Phases are numbered by the class, heaviest
    first; with a gcd over 1 those after the first stride/gcd have no tap, only bias and activation.
    """
    if TRANSPOSED:
        tap_step = stride // stride_dilation_gcd
        empty_class = index // tap_step
        tap_start = index % tap_step
        start = (tap_start * dilation + empty_class - pad) % stride
        start = tl.where(start < 0, start + stride, start)
        count = tl.maximum(extent - start + stride - 1, 0) // stride
        reached = (empty_class == 0) & (tap_start < kernel)
        taps = tl.where(reached, (kernel - tap_start + tap_step - 1) // tap_step, 0)
        source_start = (start + pad - tap_start * dilation) // stride
        step = stride
        source_step = 1
        tap_offset = -(dilation // stride_dilation_gcd)
    else:
        tap_step = 1
        tap_start = 0
        start = 0
        count = extent
        taps = kernel
        source_start = -pad
        step = 1
        source_step = stride
        tap_offset = dilation
    return start, count, step, source_start, source_step, tap_start, tap_step, taps, tap_offset


@triton.jit
def is_inside(position, extent):
    """0 <= position < extent in one comparison."""
    return tl.cast(position, tl.uint32) < tl.cast(extent, tl.uint32)


@triton.jit
def activate(x, SLOPE: tl.constexpr):
    """SLOPE 1: none, 0: ReLU with relu(NaN) = NaN and relu(-inf) = 0, else leaky ReLU."""
    if SLOPE == 0:
        x = tl.where(x <= 0, tl.zeros_like(x), x)
    elif SLOPE != 1:
        x = tl.where(x > 0, x, x * SLOPE)
    return x


@triton.jit
def mask_gradient(grad, output, SLOPE: tl.constexpr):
    """Gradient before the activation, by the sign of its output; a NaN output passes a ReLU."""
    if SLOPE == 0:
        grad = tl.where(output <= 0, tl.zeros_like(grad), grad)
    elif SLOPE != 1:
        wide: tl.constexpr = tl.float64 if grad.dtype == tl.float64 else tl.float32
        scaled = (grad.to(wide) * SLOPE).to(grad.dtype)
        grad = tl.where(output > 0, grad, scaled)
    return grad
