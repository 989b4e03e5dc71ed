# SPDX-License-Identifier: BSD-3-Clause
"""Fill memory with NaN before it is handed out: an element never written shows in a result."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

from ..settings import release_workspace

__all__ = ["poisoned_memory"]

_M_PERTURB = -6  # mallopt(3)


def _perturb_malloc(value: int) -> bool:
    """Have malloc fill blocks with the complement of the low byte of `value`; 0: do not.

    Returns whether this libc can.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_PERTURB, value))
    except (AttributeError, OSError):  # another libc
        return False


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """While inside, uninitialised memory reads as NaN.

    Two layers: torch fills what `torch.empty` and its kin give (any libc, tensors only; by
    `torch.utils.deterministic.fill_uninitialized_memory`, on by default), and glibc fills
    every block of malloc with 0xFF bytes, a NaN in each floating-point dtype, which reaches the
    scratch memory of a C++ operator as well. Scratch memory kept from earlier calls is freed first.
    """
    release_workspace()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    _perturb_malloc(0x100)  # non-zero switches it on; the complement of its low byte is 0xFF
    try:
        yield
    finally:
        _perturb_malloc(0)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
