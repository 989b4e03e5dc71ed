# SPDX-License-Identifier: BSD-3-Clause
"""Plain functions of the C++ library, called past torch's dispatcher.

Python may collect garbage in the middle of a trace: an operator called by a finalizer there would
be shown to the tracer, which fails on it, and what the finalizer should free would stay.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

_Release = ctypes.CFUNCTYPE(None, ctypes.c_int64)


class Entries(NamedTuple):
    """`run_sequence` is an address (for `_calls.run`); the others take a handle."""

    run_sequence: int
    release_sequence: Callable[[int], None]
    release_prepared: Callable[[int], None]


@functools.cache
def entries() -> Entries:
    """Those of the library that is loaded."""
    from .. import _calls

    run, sequence, prepared, version = torch.ops.segpose.entries()
    if version != _calls.ENTRY_VERSION:
        raise RuntimeError(
            "segpose_kernels: the module _calls and the C++ library come from different sources; "
            "build both again with pip install"
        )
    return Entries(run, _Release(sequence), _Release(prepared))
