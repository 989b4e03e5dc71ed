# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of a training step, as torch's allocator sees it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..testing.memory import peak_allocated_bytes
from .workloads import EAGER, EAGER_CHANNELS_LAST, OURS, Workload, variants


@dataclass(frozen=True)
class MemoryRow:
    """Peak bytes of a training step from torch's allocator, by implementation.

    Counted is what is held beyond the model, its gradients and the batch: activations and
        temporaries. What a library
    takes from the system by itself is not seen, on either side.
    """

    workload: str
    bytes: dict[str, int]

    @property
    def ratio(self) -> float:
        """Ours over the smaller of the two eager ones."""
        return self.bytes[OURS] / min(self.bytes[EAGER], self.bytes[EAGER_CHANNELS_LAST])


def measure_memory(workload: Workload) -> MemoryRow:
    """Peak memory of a training step of each implementation."""
    # The profiler's library reports its start and stop, and a missing GPU, on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    peaks = {}
    for name, (model, image) in variants(workload).items():

        def step(model: nn.Module = model, image: Tensor = image) -> None:
            torch.autograd.backward(workload.loss(model(image)))

        # The first step allocates the parameters' gradients, which then stay.
        step()
        peaks[name] = peak_allocated_bytes(step)
    return MemoryRow(workload.name, peaks)
