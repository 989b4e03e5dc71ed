# SPDX-License-Identifier: BSD-3-Clause
"""Memory: nothing leaks, and a CPM2DPose step holds at most 0.6 of eager's activations."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from segpose_kernels.models.cpm import CPM2DPose
from segpose_kernels.settings import release_workspace
from segpose_kernels.swap import optimize
from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.memory import (
    allocation_sizes,
    peak_allocated_bytes,
    resident_bytes,
    unreturned_bytes,
)
from segpose_kernels.testing.problems import by_name

MIB = 2**20
LARGEST_RATIO = 0.6

LEAK_PROBLEMS = (
    "conv-k3s2",
    "conv-depthwise",
    "conv-groups2",
    "conv-c149-c21-k7",
    "transposed-k4s2",
    "transposed-k2s3",
    "transposed-c149-c21",
    "transposed-empty-batch",
)


def calls(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Callable[[], None]:
    """One forward and backward of each problem in each dtype."""
    problems = [by_name(name) for name in LEAK_PROBLEMS]
    prepared = [(spec, spec.make_tensors(dtype)) for spec in problems for dtype in dtypes]

    def run() -> None:
        for spec, tensors in prepared:
            run_fused(spec, tensors)

    return run


def test_resident_memory_is_flat() -> None:
    """A thousand calls, forward and backward, after a warm-up: the process does not grow.

    2 MiB over 1,000 calls is 2 KiB a call: less than the smallest workspace, and more than the
    allocator's own drift.
    """
    if not resident_bytes():
        pytest.skip("the resident set size is not readable on this system")
    run = calls()
    for _ in range(10):
        run()
    gc.collect()
    before = resident_bytes()
    for _ in range(-(-1000 // (2 * len(LEAK_PROBLEMS)))):
        run()
    gc.collect()
    assert resident_bytes() - before < 2 * MIB


@pytest.mark.mutation
def test_a_small_leak_is_found() -> None:
    """Positive control: 4 KiB lost in each of a thousand calls shows in both instruments."""
    lost: list[torch.Tensor] = []

    def leak() -> None:
        for _ in range(1000):
            lost.append(torch.zeros(1024))

    before = resident_bytes()
    assert unreturned_bytes(leak) == 4096 * 1000
    assert not before or resident_bytes() - before > 2 * MIB


def test_every_block_is_given_back() -> None:
    """By the allocator's own record nothing taken in a call outlives its results.

    But for scratch memory, which is kept for the next calls until it is asked back.
    """
    run = calls()

    def measured() -> None:
        run()
        release_workspace()

    measured()
    assert unreturned_bytes(measured) == 0


def test_failed_calls_leak_nothing() -> None:
    """A call that raises after it has allocated gives everything back."""

    def run() -> None:
        for _ in range(20):
            x = torch.randn(1, 3, 64, 64)
            with pytest.raises(RuntimeError):
                torch.ops.segpose.conv2d_act(
                    x, torch.randn(8, 3, 3, 3), torch.randn(9), [1, 1], [1, 1], [1, 1], 1, 0.0
                )

    run()
    gc.collect()

    def measured() -> None:
        run()
        gc.collect()  # exceptions hold their frames

    assert unreturned_bytes(measured) == 0


def training_step(model: torch.nn.Module, size: int, batch: int) -> Callable[[], None]:
    """Forward, loss, backward and update; gradient buffers live on, so they are not activations."""
    image = torch.randn(batch, 3, size, size)
    target = torch.randn(batch, 21, size // 8, size // 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.mse_loss(model(image), target).backward()
        optimizer.step()

    return step


def test_activations_kept_for_backward() -> None:
    """What the forward pass leaves behind, at the full width of the model.

    Eager keeps each convolution's output and each activation's; the fused layers keep one tensor.
    """
    image = torch.randn(1, 3, 64, 64)
    held = []
    for fused in (False, True):
        model = CPM2DPose()
        if fused:
            model, _ = optimize(model)

        def forward(model: torch.nn.Module = model) -> object:
            return model(image)

        def measured(forward: Callable[[], object] = forward) -> object:
            output = forward()
            release_workspace()
            return output

        measured()
        held.append(sum(allocation_sizes(measured)))
    assert held[1] <= LARGEST_RATIO * held[0], f"{held[1] / held[0]:.3f} of eager"


def step_peaks(width: float, size: int, batch: int) -> tuple[int, int]:
    """Peak bytes of a training step: eager, fused."""
    peaks = []
    for fused in (False, True):
        model = CPM2DPose(width=width)
        if fused:
            model, _ = optimize(model)
        step = training_step(model, size, batch)
        step()
        peaks.append(peak_allocated_bytes(step))
    return peaks[0], peaks[1]


def test_peak_of_a_training_step() -> None:
    """A quarter of the width at the resolution and batch that the performance targets name."""
    eager, fused = step_peaks(width=0.25, size=256, batch=4)
    assert fused <= LARGEST_RATIO * eager, f"{fused / eager:.3f} of eager's {eager / MIB:.0f} MiB"


@pytest.mark.slow
def test_peak_of_a_training_step_at_full_size() -> None:
    """Batch 4 of 256x256 images, the size that the performance targets name."""
    torch.set_num_threads(2)
    eager, fused = step_peaks(width=1.0, size=256, batch=4)
    assert fused <= LARGEST_RATIO * eager, f"{fused / eager:.3f} of eager's {eager / MIB:.0f} MiB"
