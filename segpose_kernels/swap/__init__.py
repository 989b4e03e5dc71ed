# SPDX-License-Identifier: BSD-3-Clause
"""Putting the fused kernels into a model that is already there, and looking at them in it.

`find` analyses (with `trace`, `source`, `hidden` and `links`), `optimize` changes the model,
`journal` holds what `restore` needs, `explain` and `validate` look at the result.
"""

from __future__ import annotations

from .explain import Explanation, explain
from .optimize import optimize, restore
from .report import SwapError, SwapReport, SwapRow
from .validate import Validation, validate

__all__ = [
    "Explanation",
    "SwapError",
    "SwapReport",
    "SwapRow",
    "Validation",
    "explain",
    "optimize",
    "restore",
    "validate",
]
