# SPDX-License-Identifier: BSD-3-Clause
"""Stick figures in random poses: small images whose 14 joints are known exactly."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..pose.skeletons import BODY_14

# Lengths as shares of the figure's height; a child of the pelvis at the bottom, a chain upward and
# four limbs.
_TORSO, _HEAD, _SHOULDER, _HIP = 0.30, 0.16, 0.11, 0.07
_UPPER_ARM, _LOWER_ARM, _UPPER_LEG, _LOWER_LEG = 0.17, 0.16, 0.24, 0.24
_LIMB_RADIUS, _HEAD_RADIUS = 0.022, 0.075


class Figures(NamedTuple):
    """Images [N, 3, S, S] in [0, 1] and joints [N, 14, 2], (x, y) in pixels (BODY_14); float32."""

    images: Tensor
    joints: Tensor


def draw_figures(count: int, *, size: int = 128, seed: int = 0) -> Figures:
    """`count` stick figures on noisy backgrounds, every joint inside the image; repeatable.

    Left limbs are drawn warm and right limbs cold, so that left and right can be told apart.

    Raises:
        ValueError: if `count` is negative or `size` below 16.
    """
    if count < 0 or size < 16:
        raise ValueError(f"count must be >= 0 and size >= 16, got count={count}, size={size}")
    generator = torch.Generator().manual_seed(seed)
    joints = _random_joints(count, size, generator)
    return Figures(_render(joints, size, generator), joints)


def _random_joints(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Joints [N, 14, 2] in pixels."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def step(start: Tensor, angle: Tensor, length: float) -> Tensor:
        # Angles are measured from straight down, towards the image's right.
        return start + length * torch.stack((angle.sin(), angle.cos()), dim=-1)

    lean = uniform(-0.3, 0.3)
    up = math.pi + lean
    pelvis = torch.zeros(count, 2)
    neck = step(pelvis, up, _TORSO)
    where = {"neck": neck, "head_top": step(neck, up + uniform(-0.3, 0.3), _HEAD)}
    # The figure faces the viewer: its left side is on the image's right.
    for side, sign in (("left", 1.0), ("right", -1.0)):
        across = up - sign * math.pi / 2
        shoulder = step(neck, across, _SHOULDER)
        arm = sign * uniform(0.1, 2.6)
        elbow = step(shoulder, arm, _UPPER_ARM)
        hip = step(pelvis, across, _HIP)
        leg = sign * uniform(-0.1, 0.8)
        knee = step(hip, leg, _UPPER_LEG)
        where |= {
            f"{side}_shoulder": shoulder,
            f"{side}_elbow": elbow,
            f"{side}_hand": step(elbow, arm + sign * uniform(-0.3, 1.2), _LOWER_ARM),
            f"{side}_hip": hip,
            f"{side}_knee": knee,
            f"{side}_foot": step(knee, leg - sign * uniform(0.0, 0.6), _LOWER_LEG),
        }
    joints = torch.stack(
        [where[name] for name in BODY_14.joints], dim=1
    )  # [N, 14, 2], height about 1

    low, high = joints.amin(dim=1, keepdim=True), joints.amax(dim=1, keepdim=True)
    extent = (high - low).amax(dim=2, keepdim=True)
    margin = 0.1 * size
    scale = (size - 2 * margin) / extent * uniform(0.7, 1.0)[:, None, None]
    room = size - 2 * margin - (high - low) * scale
    corner = margin + room * torch.rand(count, 1, 2, generator=generator)
    return (joints - low) * scale + corner


def _render(joints: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Images [N, 3, S, S]: limbs as anti-aliased capsules over a smooth random background."""
    count = joints.shape[0]
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 0.35
    images = torch.nn.functional.interpolate(
        coarse, size=(size, size), mode="bicubic", align_corners=False
    )
    images = images + 0.03 * torch.randn(count, 3, size, size, generator=generator)

    axis = torch.arange(size, dtype=torch.float32)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # [S, S, 2], (x, y)

    def paint(distance: Tensor, radius: float, colour: tuple[float, float, float]) -> None:
        cover = (radius - distance + 0.5).clamp(0, 1)[:, None]  # [N, 1, S, S]
        images.lerp_(
            torch.tensor(colour).view(1, 3, 1, 1).expand_as(images), cover.expand_as(images)
        )

    for (a, b), (start, end) in zip(BODY_14.limbs, BODY_14.edges, strict=True):
        sides = {joint.split("_")[0] for joint in (a, b)}
        if sides == {"left", "right"} or not sides & {"left", "right"}:
            colour = (0.92, 0.92, 0.92)
        else:
            colour = (0.98, 0.62, 0.20) if "left" in sides else (0.25, 0.65, 0.98)
        paint(
            _distance_to_segment(pixels, joints[:, start], joints[:, end]),
            _LIMB_RADIUS * size,
            colour,
        )
    head = (joints[:, BODY_14.index("head_top")] + joints[:, BODY_14.index("neck")]) / 2
    paint(_distance_to_segment(pixels, head, head), _HEAD_RADIUS * size, (0.96, 0.84, 0.72))
    return images.clamp(0, 1)


def _distance_to_segment(pixels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Distances [N, S, S] of pixels [S, S, 2] to the segments from start [N, 2] to end [N, 2]."""
    along = (end - start)[:, None, None]  # [N, 1, 1, 2]
    offset = pixels - start[:, None, None]  # [N, S, S, 2]
    share = (offset * along).sum(-1) / along.square().sum(-1).clamp_min(1e-12)
    distances: Tensor = torch.linalg.vector_norm(
        offset - share.clamp(0, 1)[..., None] * along, dim=-1
    )
    return distances
