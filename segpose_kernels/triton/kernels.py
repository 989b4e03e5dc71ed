# SPDX-License-Identifier: BSD-3-Clause
"""Tensor-core kernels: implicit GEMM for fprop and dgrad, and wgrad.

All tensors are dense: activations NHWC, filters KRSC. Index names are those of the convolution
view: x [N, H, W, C], w [K, R, S, C/groups], y [N, P, Q, K]. Channel counts come as a count of
aligned units and a compile-time alignment, so that the compiler sees which vectors are legal
whatever the count; the other integers are never specialised, so one compiled kernel serves all
extents, strides, paddings and dilations.
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
    "images src_h src_w dst_h dst_w groups red_units cols_units bias_period "
    "kernel_h kernel_w stride_h stride_w pad_h pad_w dilation_h dilation_w gcd_h gcd_w "
    "phases tiles_m tiles_n phases_inside"
).split()


@triton.jit(do_not_specialize=_GATHER_INTEGERS)
def igemm_kernel(
    src_ptr,  # [images, src_h, src_w, groups * red]
    saved_ptr,  # the activation's output in the shape of src, or None
    w_ptr,  # [groups, K/groups, R, S, C/groups], or [groups, cols, R, S, red] if W_REDUCED_LAST
    bias_ptr,  # [bias_period] or None
    out_ptr,  # [images, dst_h, dst_w, groups * cols]
    images,
    src_h,
    src_w,
    dst_h,
    dst_w,
    groups,
    red_units,
    cols_units,
    bias_period,
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
    phases_inside,
    RED_ALIGN: tl.constexpr,
    COLS_ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    W_REDUCED_LAST: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    SLOPE: tl.constexpr,
    MASK_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """act(gather-convolution + bias): fprop, or dgrad as one implicit GEMM for each phase.

    gemm_m = destination pixels of a phase, gemm_n = destination channels, gemm_k = (taps of the
    phase, source channels). FLAT runs gemm_k over single (tap, channel) pairs, for few channels.
    MASK_SLOPE != 1 masks the source by the sign of `saved` where it is loaded.
    """
    red = red_units * RED_ALIGN
    cols = cols_units * COLS_ALIGN
    index: tl.constexpr = tl.int64 if WIDE else tl.int32

    # Neighbouring programs share source pixels: columns run fastest, and phases of equal weight
    # next; phases of unequal weight run slowest, the heaviest first.
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    rest = pid // tiles_n
    per_phase = tiles_m * groups
    phase = tl.where(phases_inside != 0, rest % phases, rest // per_phase)
    rest = tl.where(phases_inside != 0, rest // phases, rest % per_phase)
    tile_m = rest % tiles_m
    group = rest // tiles_m

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

    # Destination pixels of the tile, and the source pixel that their tap 0 reads.
    m = tl.cast(tile_m, index) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    line, column = divide(m, count_w, reciprocal_of(count_w), WIDE)
    image, row = divide(line, count_h, reciprocal_of(count_h), WIDE)
    in_m = m < pixels
    h = row * source_step_h + source_h
    w = column * source_step_w + source_w
    src_c = groups * red
    src_base = ((image * src_h + h) * src_w + w) * src_c + group * red
    # A row outside the tile is far outside the image, so one test serves both.
    h = tl.where(in_m, h, -(1 << 30)).to(tl.int32)
    w = w.to(tl.int32)

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_n = n < cols
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    kernel = kernel_h * kernel_w
    if W_REDUCED_LAST:  # gemm_k contiguous
        tap_size = red
        w_base = (tl.cast(group, index) * cols + n) * (kernel * red)
    else:  # gemm_n contiguous
        tap_size = cols
        w_base = tl.cast(group, index) * red * (kernel * cols) + n

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FLAT:
        depth = taps_h * taps_w * red
        row_taps = tl.maximum(taps_w, 1)
        for first in range(0, depth, BLOCK_K):
            in_k = first + k < depth
            # Plain divisions: the compiler follows alignment through them.
            tap = (first + k) // red
            c = (first + k) % red
            t_h = tap // row_taps
            t_w = tap % row_taps
            dh = t_h * offset_h
            dw = t_w * offset_w
            a_mask = is_inside(h[:, None] + dh[None, :], src_h)
            a_mask &= is_inside(w[:, None] + dw[None, :], src_w) & in_k[None, :]
            shift = (tl.cast(dh, index) * src_w + dw) * src_c + c
            a_offset = src_base[:, None] + shift[None, :]
            a = tl.load(src_ptr + a_offset, mask=a_mask, other=0.0)
            if MASK_SLOPE != 1:
                saved = tl.load(saved_ptr + a_offset, mask=a_mask, other=0.0)
                a = mask_gradient(a, saved, MASK_SLOPE)
            position = (tap_h + t_h * tap_step_h) * kernel_w + tap_w + t_w * tap_step_w
            if W_REDUCED_LAST:
                b_offset = w_base[None, :] + (position * tap_size + c)[:, None]
            else:
                b_offset = (
                    w_base[None, :]
                    + (tl.cast(c, index) * (kernel * cols) + position * tap_size)[:, None]
                )
            b = tl.load(w_ptr + b_offset, mask=in_k[:, None] & in_n[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        c = 0
        t_h = 0
        t_w = 0
        for _ in range(taps_h * taps_w * tl.cdiv(red, BLOCK_K)):
            dh = t_h * offset_h
            dw = t_w * offset_w
            a_mask = (is_inside(h + dh, src_h) & is_inside(w + dw, src_w))[:, None]
            if not EVEN_K:
                a_mask &= (c + k < red)[None, :]
            shift = (tl.cast(dh, index) * src_w + dw) * src_c + c
            a_offset = (src_base + shift)[:, None] + k[None, :]
            a = tl.load(src_ptr + a_offset, mask=a_mask, other=0.0)
            if MASK_SLOPE != 1:
                saved = tl.load(saved_ptr + a_offset, mask=a_mask, other=0.0)
                a = mask_gradient(a, saved, MASK_SLOPE)
            position = (tap_h + t_h * tap_step_h) * kernel_w + tap_w + t_w * tap_step_w
            if W_REDUCED_LAST:
                b_offset = (w_base + (position * tap_size + c))[None, :] + k[:, None]
            else:
                b_offset = (
                    w_base[None, :]
                    + ((tl.cast(c, index) + k) * (kernel * cols) + position * tap_size)[:, None]
                )
            b_mask = in_n[None, :]
            if not EVEN_K:
                b_mask &= (c + k < red)[:, None]
            b = tl.load(w_ptr + b_offset, mask=b_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            # Channels run fastest, then the taps of a filter row.
            c += BLOCK_K
            last = c >= red
            c = tl.where(last, 0, c)
            t_w = tl.where(last, t_w + 1, t_w)
            last = t_w >= taps_w
            t_w = tl.where(last, 0, t_w)
            t_h = tl.where(last, t_h + 1, t_h)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + (group * cols + n) % bias_period, mask=in_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, SLOPE)
    pixel = (image * dst_h + start_h + row * step_h) * dst_w + start_w + column * step_w
    out = out_ptr + (pixel * (groups * cols) + group * cols)[:, None] + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


_WGRAD_INTEGERS = (
    "y_p y_q x_h x_w groups k_units c_units kernel_w kernel stride_h stride_w pad_h pad_w "
    "dilation_h dilation_w pixels chunk tiles_k tiles_n"
).split()


@triton.jit(do_not_specialize=_WGRAD_INTEGERS)
def wgrad_kernel(
    y_ptr,  # [N, P, Q, groups * k]
    x_ptr,  # [N, H, W, groups * c]
    saved_ptr,  # the activation's output in the shape of y (MASK_X: of x), or None
    out_ptr,  # [splits, groups * k, R, S, c]
    bias_out_ptr,  # [splits, groups * k] or None
    y_p,
    y_q,
    x_h,
    x_w,
    groups,
    k_units,
    c_units,
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
    tiles_n,
    K_ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    MASK_X: tl.constexpr,
    MASK_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partial filter gradients over chunks of pixels, and the bias gradient beside them.

    gemm_m = filters, gemm_n = (tap, channel), gemm_k = the pixels [N, P, Q] of one chunk. A column
    tile lies within one tap, or with FLAT runs over (tap, channel) pairs. Behind the last column
    tile comes one more, which sums y over its pixels: the bias gradient of a convolution.
    """
    k_count = k_units * K_ALIGN
    c_count = c_units * C_ALIGN
    index: tl.constexpr = tl.int64 if WIDE else tl.int32

    pid = tl.program_id(0)
    all_n = tiles_n + (1 if bias_out_ptr is not None else 0)
    tile_n = pid % all_n
    rest = pid // all_n
    tile_k = rest % tiles_k
    rest = rest // tiles_k
    group = rest % groups
    split = rest // groups
    begin = tl.cast(split, index) * chunk
    end = tl.minimum(begin + chunk, pixels)

    k = tile_k * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_k = k < k_count
    y_c = groups * k_count
    y_column = group * k_count + k
    element = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    out_row = tl.cast(split, tl.int64) * y_c + y_column

    if bias_out_ptr is not None:
        if tile_n == tiles_n:
            sums = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
            for first in range(begin, end, BLOCK_K):
                y_offset = (first + element)[:, None] * y_c + y_column[None, :]
                y_mask = (first + element < end)[:, None] & in_k[None, :]
                y = tl.load(y_ptr + y_offset, mask=y_mask, other=0.0)
                if MASK_SLOPE != 1 and not MASK_X:
                    saved = tl.load(saved_ptr + y_offset, mask=y_mask, other=0.0)
                    y = mask_gradient(y, saved, MASK_SLOPE)
                sums += y.to(tl.float32)
            bias = tl.sum(sums, 0).to(bias_out_ptr.dtype.element_ty)
            tl.store(bias_out_ptr + out_row, bias, mask=in_k)
            return

    if FLAT:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        in_n = n < kernel * c_count
        tap = n // c_count
        c = n % c_count
        out_column = n
    else:
        tiles_c = tl.cdiv(c_count, BLOCK_N)
        tap = tile_n // tiles_c
        c = (tile_n % tiles_c) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        in_n = c < c_count
        out_column = tap * c_count + c
    dh = (tap // kernel_w) * dilation_h - pad_h
    dw = (tap % kernel_w) * dilation_w - pad_w
    x_c = groups * c_count
    x_column = (tl.cast(dh, index) * x_w + dw) * x_c + group * c_count + c
    # Positions of the first pixels; from step to step they move on by carries, not by divisions.
    line, q = divide(begin + element, y_q, reciprocal_of(y_q), WIDE)
    image, p = divide(line, y_p, reciprocal_of(y_p), WIDE)
    lines = BLOCK_K // y_q
    step_q = BLOCK_K % y_q
    step_p = lines % y_p
    step_image = lines // y_p

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_K):
        pixel = first + element
        in_pixels = pixel < end
        y_offset = y_column[:, None] + pixel[None, :] * y_c
        y_mask = in_pixels[None, :]
        if not EVEN_M:
            y_mask &= in_k[:, None]
        y = tl.load(y_ptr + y_offset, mask=y_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        h = (p * stride_h).to(tl.int32)
        w = (q * stride_w).to(tl.int32)
        x_row = ((image * x_h + h) * x_w + w) * x_c
        h = tl.where(in_pixels, h, -(1 << 30))
        q += step_q
        carry = q >= y_q
        q = tl.where(carry, q - y_q, q)
        p = tl.where(carry, p + 1, p) + step_p
        carry = p >= y_p
        p = tl.where(carry, p - y_p, p)
        image = tl.where(carry, image + 1, image) + step_image
        if FLAT:
            x_mask = is_inside(h[:, None] + dh[None, :], x_h)
            x_mask &= is_inside(w[:, None] + dw[None, :], x_w) & in_n[None, :]
        else:
            x_mask = (is_inside(h + dh, x_h) & is_inside(w + dw, x_w))[:, None]
            if not EVEN_N:
                x_mask &= in_n[None, :]
        x_offset = x_row[:, None] + x_column[None, :]
        x = tl.load(x_ptr + x_offset, mask=x_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        if MASK_SLOPE != 1:
            if MASK_X:
                saved = tl.load(saved_ptr + x_offset, mask=x_mask, other=0.0)
                x = mask_gradient(x, saved, MASK_SLOPE)
            else:
                saved = tl.load(saved_ptr + y_offset, mask=y_mask, other=0.0)
                y = mask_gradient(y, saved, MASK_SLOPE)
        acc = tl.dot(y, x, acc, input_precision=PRECISION)

    out = out_ptr + (out_row * (kernel * c_count))[:, None] + out_column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_k[:, None] & in_n[None, :])
