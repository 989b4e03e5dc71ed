# SPDX-License-Identifier: BSD-3-Clause
"""Contenders that are torch modules: eager, compiled, and this package's own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...backends import BACKENDS
from ...swap import optimize
from ..cases import Case
from ..subjects import Subject, sizes_like
from .base import Contender, Prepared, Unavailable

__all__ = ["COMPILED", "EAGER", "OURS"]

_CPU, _CUDA = frozenset({"cpu"}), frozenset({"cuda"})
_ANY = _CPU | _CUDA


def _precision(case: Case, device: str) -> AbstractContextManager[object]:
    """Autocast for a training step in a low precision; nothing otherwise."""
    if case.training and case.dtype != torch.float32:
        return torch.autocast(device, case.dtype)
    return nullcontext()


def _operands(case: Case, device: str, *, channels_last: bool) -> Subject:
    """The subject in the case's dtype and memory format, on the device."""
    subject = case.subject.to(device)
    dtype = torch.float32 if case.training else case.dtype
    module_format = torch.channels_last if channels_last else torch.contiguous_format
    return Subject(
        subject.module.to(dtype).to(memory_format=module_format),
        # A copy in any case: it will have a gradient of its own.
        subject.input.to(dtype=dtype, memory_format=module_format, copy=True),
        subject.grad_output.to(dtype=case.dtype, memory_format=module_format),
        subject.input_grad,
    )


def _prepared(
    case: Case, device: str, subject: Subject, run: Callable[[Tensor], Tensor]
) -> Prepared:
    """A call of `run` on the subject's input, and a backward if the case is a training step."""
    x = subject.input
    if not case.training:

        def forward(x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return run(x)

        call = forward if case.sizes == 1 else _in_turn(forward, x, case.sizes)
        return Prepared(call, lambda: {"output": forward()}, forward)

    x = x.requires_grad_(subject.input_grad)
    parameters = dict(subject.module.named_parameters())

    def accumulate() -> Tensor:
        with _precision(case, device):
            output = run(x)
        torch.autograd.backward(output, subject.grad_output)
        return output.detach()

    def step() -> Tensor:
        x.grad = None
        for parameter in parameters.values():
            parameter.grad = None
        return accumulate()

    def results() -> dict[str, Tensor]:
        found = {"output": step()}
        if x.grad is not None:
            found["grad input"] = x.grad
        for name, parameter in parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} got no gradient")
            found[f"grad {name}"] = parameter.grad
        return found

    return Prepared(step, results, accumulate)


def _in_turn(run: Callable[[Tensor], Tensor], x: Tensor, count: int) -> Callable[[], Tensor]:
    """Calls with inputs of so many sizes, one after the other; all have been seen before."""
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    inputs = [
        torch.randn((*x.shape[:2], *size)).to(x, memory_format=memory_format)
        for size in sizes_like(x.size(2), x.size(3), count)
    ]
    for _ in range(2):  # the second call of a size may prepare the next ones
        for one in inputs:
            run(one)
    turns = itertools.cycle(inputs)
    return lambda: run(next(turns))


def _eager(case: Case, device: str, threads: int, *, channels_last: bool) -> Prepared:
    if device == "cpu" and not channels_last and _is_slow(case):
        dtype = str(case.dtype).removeprefix("torch.")
        raise Unavailable(f"torch computes {dtype} in this layout value by value here: too slow")
    subject = _operands(case, device, channels_last=channels_last)
    return _prepared(case, device, subject, subject.module)


# Operations that take about 10 s at the 0.4 GFLOP/s that torch reaches in bfloat16 on a Zen 3.
_SLOW_FLOPS = 4e9


def _is_slow(case: Case) -> bool:
    """Whether oneDNN leaves the case's dtype to loops of torch's own, and it is large."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    known = supported.get(case.dtype)
    return known is not None and case.flops > _SLOW_FLOPS and not known()


def _cudnn_search(case: Case, device: str, threads: int) -> Prepared:
    """Eager in channels_last with `torch.backends.cudnn.benchmark` on."""
    subject = _operands(case, device, channels_last=True)

    def run(x: Tensor) -> Tensor:
        # Not torch.backends.cudnn.flags(), which sets everything else to its own defaults.
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            y: Tensor = subject.module(x)
        finally:
            torch.backends.cudnn.benchmark = before
        return y

    return _prepared(case, device, subject, run)


def _graphed(
    case: Case, device: str, threads: int, *, prepare: Callable[[Case, str, int], Prepared]
) -> Prepared:
    """Another contender's call, captured in a CUDA graph and replayed: no launches to wait for."""
    if case.training:
        raise Unavailable("inference only")
    call = prepare(case, device, threads).call
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # a capture must not compile, search or load anything
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    assert isinstance(output, Tensor)

    def replay() -> Tensor:
        graph.replay()
        return output

    return Prepared(replay, lambda: {"output": replay().clone()})


def _compiled(case: Case, device: str, threads: int, *, mode: str | None = None) -> Prepared:
    import torch._inductor.config as inductor

    # Each case is a new function to the compiler; what it kept would only lead to its limits.
    torch._dynamo.reset()
    subject = _operands(case, device, channels_last=True)
    run = torch.compile(subject.module, fullgraph=True, dynamic=False, mode=mode)
    prepared = _prepared(case, device, subject, run)
    with inductor.patch(freezing=device == "cpu" and not case.training):
        prepared.call()
    return prepared


def _ours(
    case: Case, device: str, threads: int, *, backend: str = "auto", channels_last: bool = True
) -> Prepared:
    wanted = [b for b in BACKENDS if b.name == backend or (backend == "auto" and b.name != "aten")]
    reasons = {b.name: b.supports(device, case.dtype) for b in wanted}
    if None not in reasons.values():
        raise Unavailable("; ".join(f"backend {name}: {why}" for name, why in reasons.items()))
    subject = _operands(case, device, channels_last=channels_last)
    module, report = optimize(
        subject.module,
        mode="train" if case.training else "inference",
        backend=backend,
        memory_format=torch.channels_last,
    )
    left = [row for row in report.skipped if "conv" in row.old.lower()]
    if left:
        raise RuntimeError(f"optimize left a convolution alone: {left[0].name}: {left[0].reason}")
    return _prepared(case, device, subject, _as_function(module))


def _as_function(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module


OURS = (
    Contender("segpose", "segpose_kernels", _ANY, _ours, ours=True),
    Contender(
        "segpose-nchw",
        "segpose_kernels, NCHW",
        _CPU,
        functools.partial(_ours, channels_last=False),
        ours=True,
    ),
    Contender(
        "segpose-triton",
        "segpose_kernels, Triton",
        _CUDA,
        functools.partial(_ours, backend="triton"),
        ours=True,
    ),
    Contender(
        "segpose-graph",
        "segpose_kernels in a CUDA graph",
        _CUDA,
        functools.partial(_graphed, prepare=_ours),
        ours=True,
    ),
)
EAGER = (
    Contender("eager", "torch eager", _ANY, functools.partial(_eager, channels_last=False)),
    Contender(
        "eager-cl",
        "torch eager channels_last",
        _ANY,
        functools.partial(_eager, channels_last=True),
    ),
    Contender(
        "eager-graph",
        "torch eager channels_last in a CUDA graph",
        _CUDA,
        functools.partial(_graphed, prepare=functools.partial(_eager, channels_last=True)),
    ),
    Contender("cudnn-search", "torch eager, cudnn.benchmark", _CUDA, _cudnn_search),
)
COMPILED = (
    Contender("compile", "torch.compile", _ANY, _compiled),
    Contender(
        "max-autotune",
        "torch.compile max-autotune",
        _CUDA,
        functools.partial(_compiled, mode="max-autotune"),
    ),
)
