# SPDX-License-Identifier: BSD-3-Clause
"""Memory a computation takes from torch's CPU allocator, read from the profiler's events.

The profiler reports every block that the allocator of torch gives or takes back, whichever layer
asked for it, C++ operators included. What a library obtains from `malloc` itself is not in these
figures; `resident_bytes` sees that too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from ..settings import release_workspace

__all__ = ["allocation_sizes", "peak_allocated_bytes", "resident_bytes", "unreturned_bytes"]


def allocation_sizes(fn: Callable[[], object]) -> list[int]:
    """Bytes of each CPU block that `fn` takes (> 0) or gives back (< 0), in order of time.

    A block that existed before the call and is freed inside it does not appear: nothing was taken
    for it here. The result of `fn` is dropped after the last event, so what it returns counts as
    still taken.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as prof:
        result = fn()
    del result
    # `prof.events()` sums memory by operator; only the raw events keep each block and its time.
    assert prof.profiler is not None
    assert prof.profiler.kineto_results is not None
    blocks = [
        (event.start_ns(), event.nbytes())
        for event in prof.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    return [size for _, size in sorted(blocks, key=lambda block: block[0])]


def peak_allocated_bytes(fn: Callable[[], object]) -> int:
    """Most bytes that `fn` holds at one time, beyond what was allocated before the call.

    For a training step this is activations, gradients and temporaries. Call the step once before
    measuring and keep `.grad` tensors alive (`zero_grad(set_to_none=False)`) to leave parameters'
    gradients and the optimizer's state out of the figure. Scratch memory that the kernels keep from
    earlier calls is freed first, so that it counts.
    """
    release_workspace()
    held = peak = 0
    for size in allocation_sizes(fn):
        held += size
        peak = max(peak, held)
    return peak


def unreturned_bytes(fn: Callable[[], None]) -> int:
    """Bytes that `fn` took and had not given back at its end: 0 unless something leaks."""
    return sum(allocation_sizes(fn))


def resident_bytes() -> int:
    """Resident set size of this process in bytes (Linux: from /proc; 0 where that is missing).

    Pages that malloc holds free go back to the system first (glibc): a leak would hide in them.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
