# SPDX-License-Identifier: BSD-3-Clause
"""The GPU backends on a real GPU: values, streams, graphs, devices, memory. Skipped without one."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from segpose_kernels import backends, conv2d_act
from segpose_kernels.testing.fused import call_fused, run_fused
from segpose_kernels.testing.gpu_problems import GPU_LAYERS, GPU_PROBLEMS
from segpose_kernels.testing.numerics import TF32, assert_results_match
from segpose_kernels.testing.problems import (
    AUTOENCODER,
    CPM2DPOSE,
    KERNEL_PROBLEMS,
    LAYOUTS,
    SEGNET,
    TRANSPOSED,
    ConvSpec,
    by_name,
)
from segpose_kernels.testing.spec import ConvTensors

pytestmark = pytest.mark.cuda

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPACT = tuple(
    by_name(name)
    for name in ("conv-k3s2", "conv-d2s3", "conv-groups2", "conv-depthwise", "transposed-k4s2")
)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on(device: str, tensors: ConvTensors) -> ConvTensors:
    """The same operands on a device; strides are kept."""

    def move(tensor: Tensor) -> Tensor:
        # The memory from the first to the last element: elements may lie on one another.
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        memory = tensor.as_strided((last + 1,), (1,)).to(device)
        return memory.as_strided(tensor.shape, tensor.stride())

    bias = tensors.bias
    return ConvTensors(
        move(tensors.input),
        move(tensors.weight),
        None if bias is None else move(bias),
        tensors.grad_output.to(device),
    )


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels for a GPU; skipped with the reason where one is missing."""
    (found,) = (b for b in backends.BACKENDS if b.name == request.param)
    if found.missing is not None:
        pytest.skip(f"{found.name}: {found.missing}")
    return found.name


def check(
    spec: ConvSpec, tensors: ConvTensors, backend: str, device: str = "cuda", **options: Any
) -> None:
    results = run_fused(spec, on(device, tensors), backend=backend)
    tf32 = tensors.input.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    moved = {name: tensor.cpu() for name, tensor in results.items()}
    assert_results_match(spec, tensors, moved, rule=TF32 if tf32 else None, **options)


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request: pytest.FixtureRequest) -> Any:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "spec", dict.fromkeys((*KERNEL_PROBLEMS, *GPU_PROBLEMS, *GPU_LAYERS)), ids=str
)
def test_output_and_gradients_match_float64(
    spec: ConvSpec, backend: str, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    layouts: dict[str, Any] = {
        f"{operand}_layout": layout for operand in ("input", "weight", "grad")
    }
    check(spec, spec.make_tensors(dtype, generator=generator, **layouts), backend)


@pytest.mark.parametrize("spec", COMPACT, ids=str)
def test_float32_by_torchs_switch(
    spec: ConvSpec, tf32: bool, backend: str, generator: torch.Generator
) -> None:
    check(spec, spec.make_tensors(generator=generator), backend)


@pytest.mark.parametrize("operand", ["input", "weight", "grad"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
@pytest.mark.parametrize("spec", COMPACT[::2], ids=str)
def test_any_strides(
    spec: ConvSpec, layout: str, operand: str, backend: str, generator: torch.Generator
) -> None:
    layouts: dict[str, Any] = {f"{operand}_layout": layout}
    check(spec, spec.make_tensors(torch.float16, generator=generator, **layouts), backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_name)
@pytest.mark.parametrize(
    "spec", dict.fromkeys((*AUTOENCODER, *SEGNET, *CPM2DPOSE, *TRANSPOSED)), ids=str
)
def test_full_extent(
    spec: ConvSpec, dtype: torch.dtype, backend: str, generator: torch.Generator
) -> None:
    check(
        spec, spec.make_tensors(dtype, generator=generator, input_layout="channels_last"), backend
    )


def test_auto_takes_it(generator: torch.Generator) -> None:
    tensors = on("cuda", COMPACT[0].make_tensors(generator=generator))
    assert backends.select("auto", "cuda", torch.float32) == "cuda"
    y = call_fused(COMPACT[0], tensors.input, tensors.weight, tensors.bias, backend="auto")
    assert y.is_cuda


@pytest.mark.parametrize("spec", COMPACT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_runs_repeat_bit_by_bit(
    spec: ConvSpec, backend: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    tensors = on("cuda", replace(spec, n=4).make_tensors(dtype, generator=generator))
    first = run_fused(spec, tensors, backend=backend)
    for _ in range(5):
        again = run_fused(spec, tensors, backend=backend)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


def test_graph_capture(backend: str, generator: torch.Generator) -> None:
    """Nothing waits, and memory comes from torch's allocator: a step can be captured."""
    spec = by_name("transposed-k4s2")
    tensors = on("cuda", spec.make_tensors(torch.float16, generator=generator))
    run_fused(spec, tensors, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_fused(spec, tensors, backend=backend)
    tensors.input.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in run_fused(spec, tensors, backend=backend).items():
        assert torch.equal(tensor, captured[name]), name


def test_current_stream(backend: str, generator: torch.Generator) -> None:
    """Work is ordered by the stream it was enqueued on."""
    spec = by_name("conv-k3s2")
    tensors = on("cuda", spec.make_tensors(torch.float32, generator=generator))
    expected = call_fused(spec, tensors.input, tensors.weight, tensors.bias, backend=backend)
    torch.cuda.synchronize()
    x = torch.empty_like(tensors.input)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(tensors.input)  # arrives long after a launch on another stream would have run
        y = call_fused(spec, x, tensors.weight, tensors.bias, backend=backend)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device(backend: str, generator: torch.Generator) -> None:
    spec = by_name("conv-k3s2")
    with torch.cuda.device(0):
        check(spec, spec.make_tensors(torch.float16, generator=generator), backend, device="cuda:1")
        assert torch.cuda.current_device() == 0


def test_operands_on_two_devices_are_refused(backend: str) -> None:
    x = torch.zeros(1, 8, 4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="cuda:0"):
        conv2d_act(x, torch.zeros(8, 8, 1, 1), backend=backend)


def settled_memory() -> int:
    """Bytes in use, after what other tests left and what autograd's thread is about to drop."""
    torch.cuda.synchronize()
    time.sleep(0.2)
    gc.collect()
    return torch.cuda.memory_allocated()


def test_memory_is_given_back(backend: str, generator: torch.Generator) -> None:
    spec = by_name("conv-groups2")
    tensors = on("cuda", spec.make_tensors(torch.bfloat16, generator=generator))
    run_fused(spec, tensors, backend=backend)
    before = settled_memory()
    for _ in range(200):
        run_fused(spec, tensors, backend=backend)
    assert settled_memory() == before
