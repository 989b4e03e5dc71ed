# SPDX-License-Identifier: BSD-3-Clause
"""Who takes part: this package, and everything that a user would take instead."""

from __future__ import annotations

from .base import Contender, Prepared, Unavailable
from .cudnn import CUDNN
from .jax_xla import JAX
from .mkldnn import MKLDNN
from .runtimes import RUNTIMES
from .torch_modules import COMPILED, EAGER, OURS

__all__ = ["CONTENDERS", "Contender", "Prepared", "Unavailable", "contenders_for"]

CONTENDERS: tuple[Contender, ...] = (*OURS, *EAGER, *COMPILED, *CUDNN, *MKLDNN, *RUNTIMES, *JAX)
"""In the order of columns."""


def contenders_for(device: str) -> tuple[Contender, ...]:
    """Those that run on "cpu" or "cuda"."""
    return tuple(c for c in CONTENDERS if device in c.devices)
