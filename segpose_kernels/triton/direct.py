# SPDX-License-Identifier: BSD-3-Clause
"""Direct kernels: depthwise and narrow groups, where a tensor-core tile would be mostly padding,
and float64. Layouts and phases are those of kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import (
    activate,
    divide,
    is_inside,
    mask_gradient,
    phase_of_axis,
    reciprocal_of,
)

_GATHER_INTEGERS = (
    "images src_h src_w dst_h dst_w groups red cols kernel_h kernel_w stride_h stride_w "
    "pad_h pad_w dilation_h dilation_w gcd_h gcd_w phases tiles_m tiles_n"
).split()


@triton.jit(do_not_specialize=_GATHER_INTEGERS)
def direct_kernel(
    src_ptr,  # [images, src_h, src_w, groups * red]
    saved_ptr,  # the activation's output in the shape of src, or None
    w_ptr,  # [groups, K/groups, R, S, C/groups]
    bias_ptr,  # [groups * cols] or None
    out_ptr,  # [images, dst_h, dst_w, groups * cols]
    images,
    src_h,
    src_w,
    dst_h,
    dst_w,
    groups,
    red,
    cols,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    gcd_h,
    gcd_w,
    phases,
    tiles_m,
    tiles_n,
    TRANSPOSED: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    SLOPE: tl.constexpr,
    MASK_SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """act(gather-convolution + bias), one multiply-add for each tap and channel of the own group.

    A tile is BLOCK_M destination pixels of a phase by BLOCK_N channels of any groups; DEPTHWISE
    (one source and one destination channel a group) keeps the channels of a tile contiguous.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    wide: tl.constexpr = tl.float64 if src_ptr.dtype.element_ty == tl.float64 else tl.float32

    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    rest = pid // tiles_n
    phase = rest % phases
    tile_m = rest // phases
    (start_h, count_h, step_h, source_h, source_step_h, tap_h, tap_step_h, taps_h, offset_h) = (
        phase_of_axis(
            phase // stride_w, dst_h, kernel_h, stride_h, pad_h, dilation_h, gcd_h, TRANSPOSED
        )
    )
    (start_w, count_w, step_w, source_w, source_step_w, tap_w, tap_step_w, taps_w, offset_w) = (
        phase_of_axis(
            phase % stride_w, dst_w, kernel_w, stride_w, pad_w, dilation_w, gcd_w, TRANSPOSED
        )
    )
    pixels = tl.cast(images, index) * count_h * count_w
    if tl.cast(tile_m, index) * BLOCK_M >= pixels:
        return

    m = tl.cast(tile_m, index) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    line, column = divide(m, count_w, reciprocal_of(count_w), WIDE)
    image, row = divide(line, count_h, reciprocal_of(count_h), WIDE)
    in_m = m < pixels
    h = row * source_step_h + source_h
    w = column * source_step_w + source_w
    src_c = groups * red
    src_base = ((image * src_h + h) * src_w + w) * src_c
    h = tl.where(in_m, h, -(1 << 30)).to(tl.int32)
    w = w.to(tl.int32)

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_n = n < groups * cols
    kernel = kernel_h * kernel_w
    if DEPTHWISE:
        first_channel = n
        w_base = n * kernel
    else:
        group = n // cols
        first_channel = group * red
        if TRANSPOSED:
            w_base = group * red * kernel * cols + n % cols
        else:
            w_base = n * kernel * red

    acc = tl.zeros((BLOCK_M, BLOCK_N), wide)
    for tap in range(taps_h * taps_w):
        t_h = tap // taps_w
        t_w = tap % taps_w
        dh = t_h * offset_h
        dw = t_w * offset_w
        inside = is_inside(h + dh, src_h) & is_inside(w + dw, src_w)
        mask = inside[:, None] & in_n[None, :]
        src_tap = src_base + (tl.cast(dh, index) * src_w + dw) * src_c
        src_offset = src_tap[:, None] + first_channel[None, :]
        position = (tap_h + t_h * tap_step_h) * kernel_w + tap_w + t_w * tap_step_w
        if DEPTHWISE:
            x = tl.load(src_ptr + src_offset, mask=mask, other=0.0)
            if MASK_SLOPE != 1:
                saved = tl.load(saved_ptr + src_offset, mask=mask, other=0.0)
                x = mask_gradient(x, saved, MASK_SLOPE)
            weight = tl.load(w_ptr + w_base + position, mask=in_n, other=0.0)
            acc += x.to(wide) * weight.to(wide)[None, :]
        else:
            for c in range(red):
                x = tl.load(src_ptr + src_offset + c, mask=mask, other=0.0)
                if MASK_SLOPE != 1:
                    saved = tl.load(saved_ptr + src_offset + c, mask=mask, other=0.0)
                    x = mask_gradient(x, saved, MASK_SLOPE)
                if TRANSPOSED:
                    w_offset = w_base + (c * kernel + position) * cols
                else:
                    w_offset = w_base + position * red + c
                weight = tl.load(w_ptr + w_offset, mask=in_n, other=0.0)
                acc += x.to(wide) * weight.to(wide)[None, :]

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(wide)[None, :]
    acc = activate(acc, SLOPE)
    pixel = (image * dst_h + start_h + row * step_h) * dst_w + start_w + column * step_w
    out = out_ptr + (pixel * (groups * cols))[:, None] + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


_WGRAD_INTEGERS = (
    "y_p y_q x_h x_w groups k_count c_count kernel_w kernel stride_h stride_w pad_h pad_w "
    "dilation_h dilation_w pixels chunk tiles_k tiles_t"
).split()


@triton.jit(do_not_specialize=_WGRAD_INTEGERS)
def direct_wgrad_kernel(
    y_ptr,  # [N, P, Q, groups * k]
    x_ptr,  # [N, H, W, groups * c]
    saved_ptr,  # the activation's output in the shape of y (MASK_X: of x), or None
    out_ptr,  # [splits, groups * k, R, S, c]
    y_p,
    y_q,
    x_h,
    x_w,
    groups,
    k_count,
    c_count,
    kernel_w,
    kernel,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    pixels,
    chunk,
    tiles_k,
    tiles_t,
    DEPTHWISE: tl.constexpr,
    MASK_X: tl.constexpr,
    MASK_SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial filter gradients over chunks of pixels: BLOCK_N filters by BLOCK_T (tap, channel)."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    wide: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32

    pid = tl.program_id(0)
    tile_t = pid % tiles_t
    rest = pid // tiles_t
    tile_k = rest % tiles_k
    split = rest // tiles_k
    begin = tl.cast(split, index) * chunk
    end = tl.minimum(begin + chunk, pixels)

    k = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    y_c = groups * k_count
    in_k = k < y_c
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    in_t = t < kernel * c_count
    tap = t // c_count
    dh = (tap // kernel_w) * dilation_h - pad_h
    dw = (tap % kernel_w) * dilation_w - pad_w
    x_c = groups * c_count
    first_channel = k if DEPTHWISE else (k // k_count) * c_count
    x_tap = (dh.to(index) * x_w + dw) * x_c + t % c_count  # [BLOCK_T]
    element = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    reciprocal_q = reciprocal_of(y_q)
    reciprocal_p = reciprocal_of(y_p)

    acc = tl.zeros((BLOCK_P, BLOCK_T, BLOCK_N), wide)
    for first in range(begin, end, BLOCK_P):
        pixel = first + element
        in_pixels = pixel < end
        line, q = divide(pixel, y_q, reciprocal_q, WIDE)
        image, p = divide(line, y_p, reciprocal_p, WIDE)
        h = (p * stride_h).to(tl.int32)
        w = (q * stride_w).to(tl.int32)
        x_row = ((image * x_h + h) * x_w + w) * x_c
        h = tl.where(in_pixels, h, -(1 << 30))

        y_offset = pixel[:, None] * y_c + k[None, :]
        y_mask = in_pixels[:, None] & in_k[None, :]
        y = tl.load(y_ptr + y_offset, mask=y_mask, other=0.0)  # [BLOCK_P, BLOCK_N]
        if MASK_SLOPE != 1 and not MASK_X:
            saved = tl.load(saved_ptr + y_offset, mask=y_mask, other=0.0)
            y = mask_gradient(y, saved, MASK_SLOPE)
        inside = is_inside(h[:, None] + dh[None, :], x_h) & is_inside(w[:, None] + dw[None, :], x_w)
        x_mask = (inside & in_t[None, :])[:, :, None] & in_k[None, None, :]
        x_offset = (x_row[:, None] + x_tap[None, :])[:, :, None] + first_channel[None, None, :]
        x = tl.load(x_ptr + x_offset, mask=x_mask, other=0.0)  # [BLOCK_P, BLOCK_T, BLOCK_N]
        if MASK_SLOPE != 1 and MASK_X:
            saved = tl.load(saved_ptr + x_offset, mask=x_mask, other=0.0)
            x = mask_gradient(x, saved, MASK_SLOPE)
        acc += x.to(wide) * y.to(wide)[:, None, :]

    total = tl.sum(acc, 0)  # [BLOCK_T, BLOCK_N]
    out_row = (tl.cast(split, tl.int64) * y_c + k) * (kernel * c_count)
    out = out_ptr + out_row[None, :] + t[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_t[:, None] & in_k[None, :])
