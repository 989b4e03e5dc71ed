# SPDX-License-Identifier: BSD-3-Clause
"""One algorithm of the CPU kernels wherever it can run, whatever plans would choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forced"]


@contextmanager
def forced(algorithm: str) -> Iterator[None]:
    previous = torch.ops.segpose.set_algorithm(algorithm)
    try:
        yield
    finally:
        torch.ops.segpose.set_algorithm(previous)
