# SPDX-License-Identifier: BSD-3-Clause
"""What a plan must know about a GPU, and which float32 arithmetic torch's settings allow."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Device", "device_of", "float32_precision", "is_capturing"]

# Largest shared memory of a thread block by compute capability (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability"), where no device says it.
_SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_SMALL_SHARED_BYTES = 99 << 10


@dataclass(frozen=True)
class Device:
    """A GPU in the numbers that plans depend on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # of one thread block

    def __hash__(self) -> int:
        return hash(self.name)  # plans are looked up by it in every call

    @staticmethod
    def generic(capability: tuple[int, int]) -> Device:
        """A device known by its architecture alone, with as many multiprocessors as an A100."""
        shared = _SHARED_BYTES.get(capability, _SMALL_SHARED_BYTES)
        return Device(f"sm_{capability[0]}{capability[1]}", capability, 108, shared)


@functools.cache
def _device(index: int | None) -> Device:
    if index is None or not torch.cuda.is_available():
        return Device.generic((8, 0))
    properties: Any = torch.cuda.get_device_properties(index)
    return Device(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def device_of(device: torch.device) -> Device:
    """The GPU that a tensor lies on.

    Fake tensors may be on a CUDA device where none is: their plans are those of the oldest
    supported architecture.
    """
    index = device.index
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return _device(index)


def float32_precision() -> str:
    """ "tf32" or "ieee" for float32 operands, by torch.backends.cudnn.conv.fp32_precision.

    That is the setting which torch's own convolutions obey; torch.backends.cudnn.allow_tf32 is its
    older name.
    """
    settings: Any = torch.backends.cudnn
    return "tf32" if settings.conv.fp32_precision == "tf32" else "ieee"


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph: nothing may be measured then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
