# SPDX-License-Identifier: BSD-3-Clause
"""Process-wide settings of the CPU kernels."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Literal, Protocol

import torch

from .backends import LIBRARY

__all__ = ["keep_workspace", "precision", "release_workspace"]

_MODES = ("default", "exact", "highest", "high", "medium")


class precision:  # noqa: N801 - used like torch.no_grad
    """Chooses how much of a product the CPU kernels keep, at once and for every thread.

    - `"default"` follows torch's own switches in float32, as a pass runs:
      `torch.backends.mkldnn.conv.fp32_precision` ("ieee", "tf32" and "bf16" are highest, high and
      medium here), or else `torch.get_float32_matmul_precision()`. torch starts with highest.
    - `"highest"` allows every algorithm whose relative L2 error in float32 stays below 1e-5: direct
      sums, sums of three bfloat16 terms a value on AMX, Winograd tiles and discrete Fourier
      transforms.
    - `"high"` may keep 16 bits of each float32 (two bfloat16 terms; error about 5e-6 directly, 5e-5
      through Winograd), `"medium"` 8 (one bfloat16 term, about 3e-3). Both matter on AMX only;
      elsewhere they compute as highest does.
    - `"exact"` leaves direct sums in float32 only, whose error is that of torch's own convolution,
      and in which a NaN or infinity reaches the outputs that see it and no other. In every other
      mode it may spread to its neighbours: over the tile of a transform, or along the row of a
      step of AMX.

    bfloat16 and float16 are summed in float32 in every mode; float64 is always direct.

    Works as a call and as a context manager::

        segpose_kernels.precision("exact")
        with segpose_kernels.precision("exact"):
            ...

    Raises ValueError for another mode, and does nothing when the C++ library is not loaded.
    """

    def __init__(
        self, mode: Literal["default", "exact", "highest", "high", "medium"] = "default"
    ) -> None:
        if mode not in _MODES:
            names = ", ".join(repr(name) for name in _MODES)
            raise ValueError(f"precision: mode must be one of {names}, got {mode!r}")
        self._previous = _set_precision(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _set_precision(self._previous)


def _set_precision(mode: str) -> str:
    return str(torch.ops.segpose.set_precision(mode)) if LIBRARY.loaded else "default"


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

    The CPU kernels keep up to 256 MiB of scratch memory, and of results of 32 MiB or larger that
    nobody holds any more, and up to 12 MiB of results of 256 KiB to 4 MiB; a model under
    `optimize(mode="inference")` keeps up to 256 MiB for its activations.
    """
    freed = sum(workspace.release() for workspace in list(_workspaces))
    return freed + (int(torch.ops.segpose.release_workspace()) if LIBRARY.loaded else 0)
