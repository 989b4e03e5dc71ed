# SPDX-License-Identifier: BSD-3-Clause
"""`segpose_kernels.benchmark = True`: time the backends on first use, keep the fastest.

Candidates are every backend that can run the call: our kernels, tuned first (tiles on CUDA, with
cuDNN and one fused pointwise pass as a candidate for each pass; algorithms on CPU), and torch's own
operators. So a call is never slower than torch's by more than the error of the measurement.

Nothing is measured while a CUDA graph is captured, under deterministic algorithms or inside
torch.compile: such calls take what is known by then, else the rule of auto.py. That rule alone
holds for tensors that have no data of their own (fakes, functorch wrappers), under dispatch modes
and in traces. The program's random numbers and hooks do not notice a measurement (unnoticed.py).
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import auto, backends
from .autograd import transforms_active
from .backends import LIBRARY
from .triton.device import device_of, float32_precision, is_capturing
from .unnoticed import draw_like, hidden_from_hooks, is_watched

__all__ = ["choose", "enabled", "forget", "is_wanted", "measure_ms"]

Runner = Callable[[Tensor, Tensor, Tensor | None, tuple[Any, ...]], Tensor]

enabled = False

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_winners: dict[tuple[Any, ...], str] = {}
_lock = threading.RLock()


def is_wanted(requested: str) -> bool:
    """Whether a call leaves the choice of the backend to measurements."""
    return enabled and requested == "auto" and backends.DEFAULT_BACKEND == "auto"


def measure_ms(work: Callable[[], object]) -> float:
    """Median wall-clock time of a call in milliseconds, host overhead included."""
    timer = importlib.import_module("torch.utils.benchmark").Timer("work()", globals={"work": work})
    return 1e3 * float(timer.blocked_autorange(min_run_time=0.05).median)


def _is_ordinary(operands: tuple[Tensor, ...]) -> bool:
    """Whether the tensors have data of their own, and nothing looks at the call."""
    plain = all(operand.__class__ in _PLAIN for operand in operands)
    return plain and not transforms_active() and not is_watched()


def _layout(tensor: Tensor) -> str:
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "contiguous" if tensor.is_contiguous() else "strided"


def choose(
    label: str,  # "conv2d" or "conv_transpose2d"
    runners: Mapping[str, Runner],
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    params: tuple[Any, ...],  # of the operator, in schema order, with negative_slope
    default: str,
) -> str:
    """The fastest backend for a call; `default` where it is unknown and cannot be measured now."""
    operands = (x, w) if b is None else (x, w, b)
    if not _is_ordinary(operands):
        return default
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in operands)
    key = (
        label,
        x.device,
        x.dtype,
        _settings(x),
        tuple(x.shape),
        tuple(w.shape),
        _layout(x),
        _layout(w),
        needs,
        params,
    )
    winner = _winners.get(key)
    if winner is not None:
        return winner
    if torch.are_deterministic_algorithms_enabled() or is_capturing():
        return default
    with _lock:
        if key not in _winners:
            with hidden_from_hooks():
                _winners[key] = _measure(label, runners, operands, needs, params)
        return _winners[key]


def _settings(x: Tensor) -> object:
    """What else decides how fast a call is."""
    if x.is_cuda or not LIBRARY.loaded:
        return float32_precision()
    return torch.get_num_threads(), torch.ops.segpose.precision_of(x, math.inf)


def forget() -> None:
    """Measure backends anew."""
    with _lock:
        _winners.clear()


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _measure(
    label: str,
    runners: Mapping[str, Runner],
    operands: tuple[Tensor, ...],
    needs: tuple[bool, ...],
    params: tuple[Any, ...],
) -> str:
    x = operands[0]
    if _on_cpu(x):
        names = ["cpu"]
        tuning = importlib.import_module(".cpu_tuning", __package__)
        tuning.tune_call(label, *(*operands, None)[:3], params, (*needs, False)[:3])
    else:
        names = auto.usable(device_of(x.device).capability, x.dtype)
    candidates = {name: runners[name] for name in names if name in runners}
    if "triton" in names:
        candidates["triton"] = auto.triton_op(label)
        _tune_triton(label, operands, needs, params)
    candidates["aten"] = runners["aten"]
    times = {
        name: measure_ms(_work(run, operands, needs, params)) for name, run in candidates.items()
    }
    return min(times, key=lambda name: times[name])


def _tune_triton(
    label: str,
    operands: tuple[Tensor, ...],
    needs: tuple[bool, ...],
    params: tuple[Any, ...],
) -> None:
    tuning = importlib.import_module(".triton.tuning", __package__)
    x, w, *bias = (operand.detach() for operand in operands)
    b = bias[0] if bias else None
    for work in tuning.passes_of_call(label, x, w, b, params, (*needs, False)[:3]):
        if not work.is_known:
            tuning.tune(work)


def _work(
    run: Runner, operands: tuple[Tensor, ...], needs: tuple[bool, ...], params: tuple[Any, ...]
) -> Callable[[], object]:
    """A call, with its backward if one will come."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(operands, needs, strict=True)]
    x, w, *bias = leaves
    b = bias[0] if bias else None

    def forward() -> Tensor:
        return run(x, w, b, params)

    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not wanted:
        return forward
    grad = draw_like(forward().detach())

    def both() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(run(x, w, b, params), wanted, grad)

    return both
