# SPDX-License-Identifier: BSD-3-Clause
"""Data: real handwritten digits with class masks, and drawn stick figures with joints."""

from __future__ import annotations

from .digits import Digits, load_digits
from .figures import Figures, draw_figures

__all__ = ["Digits", "Figures", "draw_figures", "load_digits"]
