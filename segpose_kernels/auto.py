# SPDX-License-Identifier: BSD-3-Clause
"""Which backend runs a call on CUDA tensors: one rule for every operator.

1. A backend named by the call, or else by SEGPOSE_BACKEND, runs it, or says why it cannot.
2. With `segpose_kernels.benchmark = True` the fastest measured one runs it (fastest.py).
3. Otherwise:
   - "aten" for dtypes without kernels and devices older than compute capability 8.0;
   - "triton" on 9.x and 10.x for problems that fill tensor-core tiles (one group, at least 16
     channels in and out; float16, bfloat16, or float32 as TF32): there it reaches wgmma and newer
     tensor-core instructions, which the C++ kernels do not use. With 64 channels on one side it is
     up to twice as fast on an H200. With fewer it is faster in inference where they are whole
     vectors, and slower in a training step (docs/gpu.md);
   - "cuda" for everything else, and "triton" where the C++ library was built without CUDA; float64
     then runs on "aten", since Triton's float64 kernels are made for checks, not for speed.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from . import backends
from .autograd import NativeOp
from .backends import BACKENDS
from .triton.device import device_of, float32_precision

__all__ = ["LARGE_CHANNELS", "choose", "choose_for_compile", "is_large", "triton_op"]

OLDEST = (8, 0)
LARGE_CHANNELS = 64  # on one side at least
FEW_CHANNELS = 16  # below these on either side tensor-core tiles are mostly padding
VECTOR = 8  # channels that every dtype with tensor cores loads in whole vectors
# Architectures whose tensor-core instructions only Triton's compiler reaches.
_WARPGROUP_MAJORS = (9, 10)

# The Triton operators by name, once a call has needed them.
triton_ops: dict[str, NativeOp] = {}


def load_triton() -> None:
    """Import Triton and register torch.ops.segpose_triton.*."""
    if not triton_ops:
        triton_ops.update(importlib.import_module(".triton.ops", __package__).triton_ops)


def triton_op(label: str) -> NativeOp:
    """The Triton operator called "conv2d" or "conv_transpose2d"."""
    if not triton_ops:
        load_triton()
    return triton_ops[label]


def is_large(weight: Tensor, groups: int, *, trained: bool) -> bool:
    """Whether a problem fills tensor-core tiles. Branches: a symbolic size becomes a guard."""
    if groups != 1:
        return False
    k, c = weight.shape[0], weight.shape[1]
    if k < FEW_CHANNELS or c < FEW_CHANNELS:
        return False
    if k >= LARGE_CHANNELS or c >= LARGE_CHANNELS:
        return True
    return not (trained or k % VECTOR or c % VECTOR)


def choose(requested: str, device: torch.device, dtype: torch.dtype, large: bool) -> str:
    """Name of the backend for a call, without measuring.

    Raises ValueError for an unknown name, RuntimeError with the reason when the backend asked for
    cannot run the call.
    """
    capability = device_of(device).capability
    asked = backends.DEFAULT_BACKEND if requested == "auto" else requested
    if asked == "auto":
        name = _by_rule(capability, dtype, large)
    else:
        name = backends.select(requested, "cuda", dtype)
        if name != "aten" and capability < OLDEST:
            raise RuntimeError(
                f"segpose_kernels: backend {name!r} cannot run this call: it needs compute "
                f"capability 8.0 or newer, the device has {capability[0]}.{capability[1]}; use "
                "backend='auto' to fall back"
            )
    if name == "triton":
        load_triton()
    return name


def _by_rule(capability: tuple[int, int], dtype: torch.dtype, large: bool) -> str:
    able = usable(capability, dtype)
    if not able:
        return "aten"
    if "cuda" not in able:
        return "aten" if dtype == torch.float64 else "triton"
    tensor_cores = dtype.itemsize == 2 or (dtype == torch.float32 and float32_precision() == "tf32")
    if large and tensor_cores and "triton" in able and capability[0] in _WARPGROUP_MAJORS:
        return "triton"
    return "cuda"


def usable(capability: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """Backends with kernels of their own that can run this dtype on a CUDA device."""
    if capability < OLDEST:
        return []
    ours = (b for b in BACKENDS if b.name in ("cuda", "triton"))
    return [b.name for b in ours if b.supports("cuda", dtype) is None]


def choose_for_compile(
    requested: str, device: torch.device, dtype: torch.dtype, large: bool
) -> str:
    """`choose` as a constant of the graph."""
    return choose(requested, device, dtype, large)


choose_for_compile._dynamo_marked_constant = True  # type: ignore[attr-defined]
