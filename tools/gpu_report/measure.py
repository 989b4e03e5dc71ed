# SPDX-License-Identifier: BSD-3-Clause
"""Times layers on a device: the package's operators beside cuDNN's and torch.compile's.

A contender that gives wrong values is an error, not a time. Rounds of all contenders are
interleaved, the L2 cache is flushed before each, and the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels.testing.fused import call_fused
from segpose_kernels.testing.numerics import Reference, max_error
from segpose_kernels.testing.problems import CPM2DPOSE, SEGNET, TRANSPOSED, ConvSpec
from segpose_kernels.testing.spec import ConvTensors

Call = Callable[[], Any]

FLUSH_BYTES = 256 << 20  # more than any L2
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def layers(quick: bool) -> list[ConvSpec]:
    """Layers of the models and of well-known networks, each geometry once."""
    distinct: dict[ConvSpec, ConvSpec] = {}
    for spec in (*SEGNET, *CPM2DPOSE, *TRANSPOSED):
        distinct.setdefault(replace(spec, name=""), spec)
    chosen = list(distinct.values())
    return chosen[::4] if quick else chosen


class Clock:
    """Seconds of a call: CUDA events after an L2 flush, or the wall on a device without them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def time(self, call: Call) -> float:
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def eager(spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    function = F.conv_transpose2d if spec.transposed else F.conv2d
    y = function(x, w, b, **spec.attributes)
    if spec.activation == "relu":
        return F.relu(y)
    return F.leaky_relu(y, spec.slope) if spec.activation == "leaky_relu" else y


def ours(spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return call_fused(spec, x, w, b, backend="cuda" if x.is_cuda else "auto")


def ours_by_triton(spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return call_fused(spec, x, w, b, backend="triton")


def fused_cudnn(spec: ConvSpec, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.cudnn_convolution_relu(
        x, w, b, spec.stride, spec.padding, spec.dilation, spec.groups
    )


def _tensors(spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: str) -> ConvTensors:
    return spec.make_tensors(
        dtype,
        generator=torch.Generator().manual_seed(11),
        input_layout=layout,
        weight_layout=layout,
        grad_layout=layout,
        device=device,
    )


def contenders(
    spec: ConvSpec, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[..., Tensor], ConvTensors, bool]]:
    """By name: what computes a layer, its operands, and whether cuDNN measures its algorithms."""
    nchw = _tensors(spec, dtype, device, "contiguous")
    nhwc = _tensors(spec, dtype, device, "channels_last")
    compiled = torch.compile(eager, dynamic=False)
    found: dict[str, tuple[Callable[..., Tensor], ConvTensors, bool]] = {
        "segpose": (ours, nhwc, False)
    }
    if device.type == "cuda":
        found["segpose triton"] = (ours_by_triton, nhwc, False)
    for name, tensors in (("NCHW", nchw), ("NHWC", nhwc)):
        found[f"torch {name}"] = (eager, tensors, False)
        found[f"torch {name} benchmark"] = (eager, tensors, True)
    found["compile NHWC"] = (compiled, nhwc, True)
    if device.type == "cuda" and not spec.transposed and spec.activation == "relu":
        found["cudnn relu NHWC"] = (fused_cudnn, nhwc, True)
    return found


def step(run: Callable[..., Tensor], spec: ConvSpec, t: ConvTensors, training: bool) -> Call:
    """The forward alone, or forward and all three gradients."""
    if not training:

        def forward() -> Tensor:
            with torch.no_grad():
                return run(spec, t.input, t.weight, t.bias)

        return forward
    leaves = [x.detach().requires_grad_() for x in (t.input, t.weight, t.bias) if x is not None]

    def both() -> tuple[Tensor, ...]:
        x, w, *b = leaves
        y = run(spec, x, w, b[0] if b else None)
        return torch.autograd.grad(y, leaves, t.grad_output)

    return both


def measure(
    spec: ConvSpec, dtype: torch.dtype, device: torch.device, training: bool, rounds: int
) -> dict[str, Any]:
    """One row of the report: median milliseconds by contender, and figures of our fastest."""
    calls: dict[str, tuple[Call, bool]] = {}
    errors: dict[str, float] = {}
    reference: Tensor | None = None
    for name, (run, tensors, tuned) in contenders(spec, dtype, device).items():
        if training and name == "cudnn relu NHWC":
            continue  # it has no gradient
        with cudnn_benchmark(tuned):
            y = step(run, spec, tensors, training=False)()
            if reference is None:
                cpu = ConvTensors(
                    tensors.input.cpu(),
                    tensors.weight.cpu(),
                    None if tensors.bias is None else tensors.bias.cpu(),
                    tensors.grad_output.cpu(),
                )
                reference = Reference(spec, cpu).output
            errors[name] = max_error(y.cpu(), reference)
            calls[name] = (step(run, spec, tensors, training), tuned)
            for _ in range(3):  # compilation, cuDNN's search, the allocator's first blocks
                calls[name][0]()
    assert reference is not None
    limit = 0.05 * float(reference.abs().max())
    wrong = [name for name, error in errors.items() if not error <= limit]
    if wrong:
        raise RuntimeError(f"{spec.name}: wrong values from {', '.join(wrong)}: {errors}")
    clock = Clock(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, tuned) in calls.items():
            with cudnn_benchmark(tuned):
                times[name].append(clock.time(call))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    own = {name: seconds for name, seconds in medians.items() if name.startswith("segpose")}
    mine = min(own.values())
    passes = 3 if training else 1
    error = max(errors[name] for name in own)
    best = min(seconds for name, seconds in medians.items() if name not in own)
    return {
        "layer": spec.name,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "step" if training else "forward",
        "ms": {name: seconds * 1e3 for name, seconds in medians.items()},
        "tflops": passes * spec.flops / mine / 1e12,
        "gbytes": passes * spec.bytes(dtype) / mine / 1e9,
        "ratio": best / mine,
        "error": error / max(errors["torch NCHW"], torch.finfo(dtype).tiny),
    }


def benchmark(device: torch.device, *, quick: bool) -> list[dict[str, Any]]:
    """Every layer, dtype and pass. Raises RuntimeError for wrong values, with the contender."""
    rows = []
    for spec in layers(quick):
        for dtype in DTYPES[:1] if quick else DTYPES:
            for training in (False, True):
                row = measure(spec, dtype, device, training, rounds=10 if quick else 50)
                rows.append(row)
                print(
                    f"{row['layer']} {row['dtype']} {row['pass']}: ratio {row['ratio']:.2f}",
                    flush=True,
                )
    return rows
