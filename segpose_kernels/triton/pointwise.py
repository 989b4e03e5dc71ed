# SPDX-License-Identifier: BSD-3-Clause
"""Passes over whole tensors: mask and bias gradient, ordered sums, bias and activation, filters."""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import activate, mask_gradient


@triton.jit(do_not_specialize=["rows", "columns_units", "chunk", "tiles"])
def mask_kernel(
    grad_ptr,  # [rows, columns]
    saved_ptr,  # [rows, columns], the activation's output, or None
    out_ptr,  # [rows, columns]: the masked gradient, or None
    sums_out_ptr,  # [splits, columns]: its sums over each chunk of rows, or None
    rows,
    columns_units,
    chunk,
    tiles,
    ALIGN: tl.constexpr,
    MASK_SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient before the activation, and the bias gradient of a chunk of rows, in one pass."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    wide: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    columns = columns_units * ALIGN
    pid = tl.program_id(0)
    split = pid // tiles
    n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_n = n < columns
    begin = tl.cast(split, index) * chunk
    end = tl.minimum(begin + chunk, rows)

    sums = tl.zeros((BLOCK_M, BLOCK_N), wide)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        offset = m[:, None] * columns + n[None, :]
        mask = (m < end)[:, None] & in_n[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0)
        if MASK_SLOPE != 1:
            saved = tl.load(saved_ptr + offset, mask=mask, other=0.0)
            grad = mask_gradient(grad, saved, MASK_SLOPE)
        if out_ptr is not None:
            tl.store(out_ptr + offset, grad, mask=mask)
        if sums_out_ptr is not None:
            sums += grad.to(wide)
    if sums_out_ptr is not None:
        sums_out = sums_out_ptr + tl.cast(split, tl.int64) * columns + n
        tl.store(sums_out, tl.sum(sums, 0).to(sums_out_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def _ordered_sum(parts_ptr, out_ptr, tile, count, splits, BLOCK: tl.constexpr):
    i = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for split in range(splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * count + i, mask=mask, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "bias_count", "splits", "tiles"])
def reduce_kernel(
    parts_ptr,  # [splits, count]
    out_ptr,  # [count]
    bias_parts_ptr,  # [splits, bias_count] or None
    bias_out_ptr,  # [bias_count] or None
    count,
    bias_count,
    splits,
    tiles,
    BLOCK: tl.constexpr,
):
    """Sums of partial results in their order, so that no result depends on timing.

    The first `tiles` programs sum `parts`, those after them the parts of the bias gradient.
    """
    pid = tl.program_id(0)
    if pid < tiles:
        _ordered_sum(parts_ptr, out_ptr, pid, count, splits, BLOCK)
    else:
        if bias_parts_ptr is not None:
            _ordered_sum(bias_parts_ptr, bias_out_ptr, pid - tiles, bias_count, splits, BLOCK)


@triton.jit(do_not_specialize=["rows", "columns", "channels", "tiles"])
def bias_activation_kernel(
    y_ptr,  # [rows, columns], rewritten in place
    bias_ptr,  # [channels] or None
    rows,
    columns,
    channels,
    tiles,
    ROWS_ARE_CHANNELS: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = act(y + bias) in place, after the convolution of another library.

    NHWC has channels as columns; NCHW is [N*C, H*W], with the channel of a row modulo C.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    wide: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    m = tl.cast(pid // tiles, index) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offset = m[:, None] * columns + n[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(wide)
    if bias_ptr is not None:
        if ROWS_ARE_CHANNELS:
            y += tl.load(bias_ptr + m % channels, mask=m < rows, other=0.0).to(wide)[:, None]
        else:
            y += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(wide)[None, :]
    tl.store(y_ptr + offset, activate(y, SLOPE).to(y_ptr.dtype.element_ty), mask=mask)


_FILTER_INTEGERS = ("filters red row w_channels w_taps channels taps tiles_row tiles_red").split()


@triton.jit(do_not_specialize=_FILTER_INTEGERS)
def reduced_last_kernel(
    w_ptr,  # [filters, row]: the elements of a filter as they lie in memory
    out_ptr,  # [groups, channels, taps, red], zeros behind the filters
    filters,
    red,  # filters of a group, padding included
    row,
    w_channels,  # of w: folding makes channels of taps
    w_taps,
    channels,
    taps,
    tiles_row,
    tiles_red,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A filter, [K, R, S, C/groups] or [K, C/groups, R, S], in the order of a dgrad's gemm_k.

    Filters lie farthest apart in memory: a tile is read along its rows and written along columns.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    pid = tl.program_id(0)
    tile_row = pid % tiles_row
    rest = pid // tiles_row
    k = (rest % tiles_red) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], in the group
    group = tl.cast(rest // tiles_red, index)
    element = tile_row * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]

    in_red = k < red
    in_row = element < row
    filter = group * red + k
    source = w_ptr + (filter * row)[:, None] + element[None, :]
    mask = (in_red & (filter < filters))[:, None] & in_row[None, :]
    values = tl.load(source, mask=mask, other=0.0)

    krsc = element
    if not CHANNELS_LAST:
        krsc = element % w_taps * w_channels + element // w_taps
    column = (group * channels + krsc % channels) * taps + krsc // channels
    out = out_ptr + k[:, None] + (column * red)[None, :]
    tl.store(out, values, mask=in_red[:, None] & in_row[None, :])
