# SPDX-License-Identifier: BSD-3-Clause
"""Fused convolution and transposed convolution + bias + activation for PyTorch.

`conv2d_act` and `conv_transpose2d_act` are the operators, `Conv2dAct` and `ConvTranspose2dAct` the
modules, and `optimize(model)` puts them into a model that is already there. What they compute is
defined in `segpose_kernels.reference`.
"""

from __future__ import annotations

import sys
import types

from . import cpu_choices, fastest, nn
from .functional import conv2d_act, conv_transpose2d_act
from .nn import Conv2dAct, ConvTranspose2dAct
from .settings import precision, release_workspace
from .swap import SwapReport, explain, optimize, prepared_bytes, restore, validate

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
    "prepared_bytes",
    "release_workspace",
    "restore",
    "validate",
]

__version__ = "0.1.0"

# Whether calls with backend="auto" time kernels and backends on a problem's first call and keep the
# fastest, like torch.backends.cudnn.benchmark. Described in fastest.py.
benchmark: bool


class _Package(types.ModuleType):
    """The package as a module, with settings that are not plain attributes."""

    @property
    def benchmark(self) -> bool:
        return fastest.enabled

    @benchmark.setter
    def benchmark(self, value: bool) -> None:
        fastest.enabled = bool(value)


sys.modules[__name__].__class__ = _Package
cpu_choices.apply_stored()
