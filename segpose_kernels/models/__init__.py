# SPDX-License-Identifier: BSD-3-Clause
"""The models of the lecture "Segmentation, Pose estimation", in plain `torch.nn`.

None of them knows about this package's kernels: `segpose_kernels.optimize(model)` swaps those in,
and checkpoints pass between the plain and the optimized model unchanged.
"""

from __future__ import annotations

from .autoencoder import Autoencoder
from .cpm import CPM2DPose
from .joint_regression import JointRegression
from .segnet import SegNet

__all__ = ["Autoencoder", "CPM2DPose", "JointRegression", "SegNet"]
