# SPDX-License-Identifier: BSD-3-Clause
"""Putting the fused kernels into a model that is already there, and looking at them in it.

`find` analyses a model, with `trace` (graphs), `source`, `hidden` and `links` (what graphs do not
show) and `mutation`; `apply` changes it, with the modules of `pieces` and the code of `forward`;
`journal` holds what `restore` needs; `plans` and `checks` look at the result.

For inference `filters` keeps packed filters, `flatten` writes a model out as a list of operations,
`steps` groups them, `frames` places their values, and `inference` is the forward that runs them.
"""

from __future__ import annotations

from .apply import optimize, restore
from .checks import Validation, validate
from .inference import prepared_bytes
from .plans import Explanation, explain
from .report import SwapError, SwapReport, SwapRow

__all__ = [
    "Explanation",
    "SwapError",
    "SwapReport",
    "SwapRow",
    "Validation",
    "explain",
    "optimize",
    "prepared_bytes",
    "restore",
    "validate",
]
