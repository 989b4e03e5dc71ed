# SPDX-License-Identifier: BSD-3-Clause
"""Process-wide settings of the CPU kernels."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Literal, Protocol

import torch

from .backends import LIBRARY

__all__ = ["keep_workspace", "precision", "release_workspace"]

_EXACT = {"default": False, "exact": True}


class precision:  # noqa: N801 - used like torch.no_grad
    """Chooses which algorithms float32 and lower may use on CPU, at once and for every thread.

    `"default"` allows every algorithm whose relative L2 error stays below 1e-5 in float32: direct
    sums and Winograd F(4x4, 3x3) and F(4x4, 2x2), which measured 0.5e-6 to 5e-6 on layers of 64 to
    512 channels. Winograd spreads a NaN or infinity over the 4x4 tile it lies in. `"exact"` leaves
    only direct sums, whose error is that of torch's own convolution. float64 is always direct.

    Works as a call and as a context manager::

        segpose_kernels.precision("exact")
        with segpose_kernels.precision("exact"):
            ...

    Raises ValueError for another mode, and does nothing when the C++ library is not loaded.
    """

    def __init__(self, mode: Literal["default", "exact"]) -> None:
        if mode not in _EXACT:
            raise ValueError(f"precision: mode must be 'default' or 'exact', got {mode!r}")
        self._previous = _set_exact(_EXACT[mode])

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _set_exact(self._previous)


def _set_exact(exact: bool) -> bool:
    return bool(torch.ops.segpose.set_exact(exact)) if LIBRARY.loaded else False


class Workspace(Protocol):
    """Memory that is kept between calls."""

    def release(self) -> int:
        """Free it; gives its bytes."""


_workspaces: weakref.WeakSet[Workspace] = weakref.WeakSet()


def keep_workspace(workspace: Workspace) -> None:
    """From now on `release_workspace` frees this too; it is not kept alive for that."""
    _workspaces.add(workspace)


def release_workspace() -> int:
    """Frees the scratch memory that is kept between calls; returns its bytes.

    The CPU kernels keep at most one buffer of up to 256 MiB for every call that ran at the same
    time; a model under `optimize(mode="inference")` keeps up to 256 MiB for its activations.
    """
    freed = sum(workspace.release() for workspace in list(_workspaces))
    return freed + (int(torch.ops.segpose.release_workspace()) if LIBRARY.loaded else 0)
