# SPDX-License-Identifier: BSD-3-Clause
"""Fused convolution and transposed convolution + bias + activation for PyTorch.

`conv2d_act` and `conv_transpose2d_act` are the operators, `Conv2dAct` and `ConvTranspose2dAct` the
modules, and `optimize(model)` puts them into a model that is already there. What they compute is
defined in `segpose_kernels.reference`.
"""

from __future__ import annotations

from . import nn
from .functional import conv2d_act, conv_transpose2d_act
from .nn import Conv2dAct, ConvTranspose2dAct
from .settings import precision, release_workspace
from .swap import SwapReport, explain, optimize, restore, validate

__all__ = [
    "Conv2dAct",
    "ConvTranspose2dAct",
    "SwapReport",
    "__version__",
    "conv2d_act",
    "conv_transpose2d_act",
    "explain",
    "nn",
    "optimize",
    "precision",
    "release_workspace",
    "restore",
    "validate",
]

__version__ = "0.1.0"
