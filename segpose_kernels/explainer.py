# SPDX-License-Identifier: BSD-3-Clause
"""Why a transposed convolution is called transposed: the convolution as a matrix C, and C^T.

A convolution is linear in its input. Flatten the input to a vector a of C*H*W numbers and the
output to one of K*P*Q numbers, and it is a matrix: conv(a) = C a. C is sparse: each row holds the
filter's taps, at the columns of the pixels they meet. The transposed convolution with the same
weight is multiplication by C^T: it has the same taps, and takes K channels of P x Q to C channels
of H x W. It is no inverse; what it does undo is the shape, and it is what carries the gradient back
through the convolution. Hence, for all a and b,

    conv_transpose(x) == C^T x        and        <conv(a), b> == <a, conv_transpose(b)>.

This is Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016), chapter 4,
in code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = int | tuple[int, int]

LECTURE_SETTINGS: tuple[dict[str, Pair], ...] = (
    {"stride": 1, "padding": 0},
    {"stride": 2, "padding": 0},
    {"stride": 2, "padding": 1},
)
"""The lecture's three settings of a transposed convolution with kernel size 2."""

# Above this many rows or columns a picture's cells are too small to see.
_LARGEST_DRAWN = 256
_WIDEST_INCHES = 15.0
_LARGEST_CELL_INCHES = 0.25
_SMALLEST_LABELLED_CELL = 9.0  # points
_GREY = "0.35"


def _pair(value: Pair) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def convolution_matrix(
    weight: Tensor,  # [K, C/groups, R, S]
    input_size: tuple[int, int],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The matrix of `F.conv2d(., weight, None, stride, ...)` for inputs of one size.

    Args:
        weight: [K, C/groups, R, S], the convolution's filter. It is also, unchanged, the weight
            [C_in, C_out/groups, R, S] of the transposed convolution from K to C channels.
        input_size: (H, W) of the convolution's input, i.e. of the transposed convolution's output.

    Returns:
        A sparse COO tensor, [K*P*Q, C*H*W], of the weight's dtype, coalesced. Taps that fall on
        padding have no entry.

    Raises:
        ValueError: if the weight is not 4-D, the groups do not divide K, or the output would be
            empty.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight must be 4-D [K, C/groups, R, S], got {list(weight.shape)}")
    k, c_group, r, s = weight.shape
    if groups < 1 or k % groups:
        raise ValueError(f"groups must divide the filter count {k}, got groups={groups}")
    height, width = input_size
    (u, v), (pad_h, pad_w), (dil_h, dil_w) = _pair(stride), _pair(padding), _pair(dilation)
    p = (height + 2 * pad_h - dil_h * (r - 1) - 1) // u + 1
    q = (width + 2 * pad_w - dil_w * (s - 1) - 1) // v + 1
    if p < 1 or q < 1:
        raise ValueError(f"an input of {height}x{width} gives an empty output ({p}x{q})")

    # One index for each of: filter, channel in group, tap row and column, output row and column.
    extents = (k, c_group, r, s, p, q)
    index = torch.meshgrid(*(torch.arange(extent) for extent in extents), indexing="ij")
    i_k, i_c, i_r, i_s, i_p, i_q = (grid.flatten() for grid in index)
    row = i_p * u - pad_h + i_r * dil_h
    column = i_q * v - pad_w + i_s * dil_w
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    channel = i_k // (k // groups) * c_group + i_c
    outputs = (i_k * p + i_p) * q + i_q
    inputs = (channel * height + row) * width + column
    values = weight[i_k, i_c, i_r, i_s]
    return torch.sparse_coo_tensor(
        torch.stack((outputs, inputs))[:, inside],
        values[inside],
        (k * p * q, c_group * groups * height * width),
        check_invariants=True,
    ).coalesce()


def draw_matrices(
    settings: Sequence[Mapping[str, Pair]] = LECTURE_SETTINGS,
    *,
    kernel_size: Pair = 2,
    small_size: tuple[int, int] = (3, 3),
) -> Figure:
    """Draw C and below it C^T for some transposed convolutions of one channel, all in one scale.

    Args:
        settings: keyword arguments `stride` and `padding`, one column of the picture each.
        kernel_size: taps on each axis.
        small_size: (P, Q), the input of the transposed convolution and output of the convolution.

    Returns:
        A matplotlib figure, neither shown nor saved.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ValueError: if a matrix has more than 256 rows or columns.
    """
    # Through Figure and not pyplot: nothing global, no backend, no window.
    figure_module = import_extra("matplotlib.figure")
    r, s = _pair(kernel_size)
    taps = torch.arange(1.0, r * s + 1).view(1, 1, r, s)  # a cell's value says which tap it is
    columns = [_Column.of(taps, setting, small_size) for setting in settings]
    largest = max(max(column.matrix.shape) for column in columns)
    if largest > _LARGEST_DRAWN:
        raise ValueError(f"can draw {_LARGEST_DRAWN} rows and columns at most, got {largest}")

    # Everything is placed in units of one matrix cell.
    top, bottom, left, gap = 7.5, 2.5, 2.5, 4.0
    width = left + sum(column.matrix.shape[1] + gap for column in columns)
    tall = columns[0].matrix.shape[0]
    height = top + tall + gap + max(column.matrix.shape[1] for column in columns) + bottom
    cell = min(_WIDEST_INCHES / width, _LARGEST_CELL_INCHES)
    figure: Figure = figure_module.Figure(figsize=(width * cell, height * cell))
    points = 72 * cell

    def panel(x: float, y: float, cells: Tensor) -> None:
        """Draw `cells`, the top-left corner x cells from the left and y from the top."""
        rows, across = cells.shape
        box = (x / width, 1 - (y + rows) / height, across / width, rows / height)
        axis = figure.add_axes(box)
        _draw_cells(axis, cells, r * s, points)

    def text(x: float, y: float, words: str, size: float, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, words, fontsize=size * points, va="center", **style)

    text(
        left,
        1.6,
        "A convolution is a matrix $C$; the transposed convolution is $C^T$",
        1.25,
        weight="bold",
    )
    x = left
    for column in columns:
        matrix = column.matrix
        text(x, 4.0, column.title, 0.85, weight="bold")
        text(x, 5.3, f"$C$ takes {column.large} to {column.small}", 0.8, color=_GREY)
        panel(x, top - 1, matrix)
        y = top - 1 + tall + gap - 1
        text(x, y - 1, f"$C^T$ takes {column.small} to {column.large}", 0.8, color=_GREY)
        panel(x, y, matrix.T)
        x += matrix.shape[1] + gap

    # The legend goes into the room beside the first C^T.
    x, y = left + tall + 3.0, top - 1 + tall + gap - 1
    zoom = 2
    axis = figure.add_axes(
        (x / width, 1 - (y + r * zoom) / height, s * zoom / width, r * zoom / height)
    )
    _draw_cells(axis, taps[0, 0], r * s, points * zoom)
    text(x, y - 1, "filter", 0.8, color=_GREY)
    text(x, y + r * zoom + 1, "rows: output", 0.7, color=_GREY)
    text(x, y + r * zoom + 2, "columns: input", 0.7, color=_GREY)
    text(x, y + r * zoom + 3, "white: zero", 0.7, color=_GREY)
    return figure


@dataclass(frozen=True)
class _Column:
    """One setting: its matrix C [P*Q, H*W] of tap numbers, and the words over it."""

    matrix: Tensor
    title: str
    small: str
    large: str

    @classmethod
    def of(cls, taps: Tensor, setting: Mapping[str, Pair], small_size: tuple[int, int]) -> _Column:
        (u, v), (pad_h, pad_w) = _pair(setting.get("stride", 1)), _pair(setting.get("padding", 0))
        (p, q), (r, s) = small_size, taps.shape[2:]
        height, width = (p - 1) * u - 2 * pad_h + r, (q - 1) * v - 2 * pad_w + s
        matrix = convolution_matrix(taps, (height, width), stride=(u, v), padding=(pad_h, pad_w))
        names = [
            f"{name} {a}" if a == b else f"{name} {a}x{b}"
            for name, (a, b) in (("stride", (u, v)), ("padding", (pad_h, pad_w)))
        ]
        return cls(matrix.to_dense(), ", ".join(names), f"{p}x{q}", f"{height}x{width}")


def _draw_cells(axis: Any, cells: Tensor, taps: int, points: float) -> None:
    """Coloured cells with the tap's number in each; zeros stay white."""
    rows, columns = cells.shape
    colours = import_extra("matplotlib").colormaps["viridis"].resampled(taps)
    shown = cells.masked_fill(cells == 0, float("nan"))
    axis.imshow(
        shown.numpy(),
        cmap=colours,
        vmin=0.5,
        vmax=taps + 0.5,
        interpolation="nearest",
        aspect="auto",
    )
    axis.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    axis.set(xticks=[], yticks=[])
    axis.grid(which="minor", color="0.88", linewidth=0.5)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set(color="0.5", linewidth=0.8)
    if points < _SMALLEST_LABELLED_CELL:
        return
    for y, x in cells.nonzero().tolist():
        tap = int(cells[y, x])
        colour = "black" if tap > 0.6 * taps else "white"
        axis.text(
            x, y, f"$w_{{{tap}}}$", ha="center", va="center", fontsize=0.55 * points, color=colour
        )
