# SPDX-License-Identifier: BSD-3-Clause
"""Pose: skeletons, joints to heatmaps and back, and the metrics poses are judged by."""

from __future__ import annotations

from .heatmaps import heatmaps_to_joints, joints_to_heatmaps
from .metrics import mean_joint_error, percentage_correct, percentage_correct_per_joint
from .skeletons import BODY_14, HAND_21, Skeleton

__all__ = [
    "BODY_14",
    "HAND_21",
    "Skeleton",
    "heatmaps_to_joints",
    "joints_to_heatmaps",
    "mean_joint_error",
    "percentage_correct",
    "percentage_correct_per_joint",
]
