# SPDX-License-Identifier: BSD-3-Clause
"""Joints to heatmaps and back.

Coordinates are (x, y) in pixels of the image, the centre of the top-left pixel being (0, 0). A
heatmap cell covers `stride` x `stride` pixels, so the centre of cell (row i, column j) lies at x =
(j + 0.5) * stride - 0.5, and likewise y with i. Both directions use this one convention, and a
round trip is exact up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.cpm import STRIDE

# Heatmap values below this share of the peak are noise; they are raised to it before a logarithm is
# taken.
_FLOOR = 1e-2


def joints_to_heatmaps(
    joints: Tensor,  # [N, J, 2]
    image_size: tuple[int, int],
    *,
    stride: int = STRIDE,
    sigma: float = 1.0,
    visible: Tensor | None = None,  # [N, J]
) -> Tensor:
    """Gaussian target heatmaps, [N, J, H // stride, W // stride], peak 1 at each joint.

    Args:
        joints: [N, J, 2], floating point, (x, y) in image pixels.
        image_size: (H, W) of the image in pixels.
        stride: pixels a heatmap cell, 8 for `CPM2DPose`.
        sigma: standard deviation of the Gaussian, in heatmap cells.
        visible: [N, J], bool; the heatmap of a joint that is not visible is all zeros.

    Raises:
        ValueError: for a shape that is not [N, J, 2], or `sigma` or `stride` not above 0.
    """
    if joints.dim() != 3 or joints.shape[-1] != 2:
        raise ValueError(f"joints must have shape [N, J, 2], got {list(joints.shape)}")
    if sigma <= 0 or stride <= 0:
        raise ValueError(f"sigma and stride must be above 0, got sigma={sigma}, stride={stride}")
    height, width = image_size[0] // stride, image_size[1] // stride
    cells = (joints + 0.5) / stride - 0.5  # [N, J, 2], in units of cells
    columns = torch.arange(width, dtype=joints.dtype, device=joints.device)
    rows = torch.arange(height, dtype=joints.dtype, device=joints.device)
    # A Gaussian of a distance is the product of one in x and one in y.
    along_x = torch.exp(-((columns - cells[..., 0, None]) ** 2) / (2 * sigma**2))  # [N, J, W/s]
    along_y = torch.exp(-((rows - cells[..., 1, None]) ** 2) / (2 * sigma**2))  # [N, J, H/s]
    heatmaps = along_y[..., :, None] * along_x[..., None, :]
    if visible is not None:
        heatmaps = heatmaps * visible[..., None, None].to(heatmaps.dtype)
    return heatmaps


def heatmaps_to_joints(
    heatmaps: Tensor,  # [N, J, H/s, W/s]
    *,
    stride: int = STRIDE,
    refine: bool = True,
) -> tuple[Tensor, Tensor]:
    """Joints [N, J, 2], (x, y) in image pixels, and scores [N, J], the heatmaps' peak values.

    The peak is the argmax; with `refine` it moves, by at most half a cell on each axis, to the
    vertex of the parabola through the logarithms of the peak and its two neighbours. For a
    Gaussian, whose logarithm is a parabola, that is exact. (The idea is that of Zhang et al.,
    "Distribution-Aware Coordinate Representation for Human Pose Estimation", CVPR 2020, one axis at
    a time.) A peak on the border is not refined along that axis, nor is one that is not positive.

    Raises:
        ValueError: for a shape that is not [N, J, H, W], or with no cell.
    """
    if heatmaps.dim() != 4 or heatmaps.shape[2] == 0 or heatmaps.shape[3] == 0:
        raise ValueError(f"heatmaps must have shape [N, J, H, W], got {list(heatmaps.shape)}")
    height, width = heatmaps.shape[2:]
    scores, peak = heatmaps.flatten(2).max(dim=2)  # [N, J]
    row, column = peak // width, peak % width
    x, y = column.to(heatmaps.dtype), row.to(heatmaps.dtype)
    if refine:
        floored = torch.maximum(heatmaps, (scores * _FLOOR)[..., None, None])
        log = floored.clamp_min(torch.finfo(heatmaps.dtype).tiny).log().flatten(2)  # [N, J, H*W]
        x = x + _vertex(log, peak, 1, (column > 0) & (column < width - 1) & (scores > 0))
        y = y + _vertex(log, peak, width, (row > 0) & (row < height - 1) & (scores > 0))
    joints = (torch.stack((x, y), dim=-1) + 0.5) * stride - 0.5
    return joints, scores


def _vertex(log: Tensor, peak: Tensor, step: int, inside: Tensor) -> Tensor:
    """Offset, at most half a cell, of the vertex of the parabola through peak and neighbours."""

    def at(index: Tensor) -> Tensor:
        return log.gather(2, torch.where(inside, index, peak)[..., None])[..., 0]

    before, centre, after = at(peak - step), at(peak), at(peak + step)
    curvature = before - 2 * centre + after
    offset = torch.where(
        curvature < 0, 0.5 * (before - after) / curvature, torch.zeros_like(curvature)
    )
    return torch.where(inside, offset.clamp(-0.5, 0.5), torch.zeros_like(offset))
