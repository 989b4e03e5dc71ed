# SPDX-License-Identifier: BSD-3-Clause
"""Training of the lecture's models, plain or optimized, with one loop."""

from __future__ import annotations

from .cpm import (
    PoseRecipe,
    heatmap_loss,
    initialise,
    predict_joints,
    train_joint_regression,
    train_pose_machine,
)
from .loop import Evaluation, History, fit
from .segnet import (
    SegNetRecipe,
    evaluate_segnet,
    lift_final_bias,
    predict_masks,
    segmentation_loss,
    train_segnet,
)

__all__ = [
    "Evaluation",
    "History",
    "PoseRecipe",
    "SegNetRecipe",
    "evaluate_segnet",
    "fit",
    "heatmap_loss",
    "initialise",
    "lift_final_bias",
    "predict_joints",
    "predict_masks",
    "segmentation_loss",
    "train_joint_regression",
    "train_pose_machine",
    "train_segnet",
]
