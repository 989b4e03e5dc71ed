# SPDX-License-Identifier: BSD-3-Clause
"""Measures the algorithms for each pass of a call on the CPU and remembers the fastest.

Candidates are all that support the pass and whose predicted time is not hopeless. They run in turns
on the call's own tensors, and the predicted one stays unless another is clearly faster: choices
should not depend on a neighbour's load. On the machine that the predictions were fitted to, no
model changed by more than noise (5%); it is for others.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import cpu_choices
from .cpu_choices import PassKey
from .unnoticed import draw_like

__all__ = ["Watcher", "measuring_again", "tune_call", "tune_prepared", "watchers"]

Watcher = Callable[[PassKey, str, float], None]
"""Called with a measured pass, the chosen algorithm, and the seconds of the call it was measured
in: for dgrad and wgrad the backward with all gradients that were asked for."""

watchers: list[Watcher] = []

# Passes measured since `measuring_again`; None outside of it.
_again: set[PassKey] | None = None

_ALGORITHMS = ("depthwise", "split", "winograd", "fourier", "rows", "gathered", "igemm")
_HOPELESS = 2.5  # times the shortest prediction
_ROUNDS = 5
_SAMPLE_SECONDS = 0.005
_CLEARLY_FASTER = 0.9


def _candidates(problem: Any, key: PassKey) -> list[str]:
    """Names of the algorithms to measure, the predicted one first."""
    from . import _plan

    def plan(algorithm: str) -> Any:
        return _plan.plan(
            problem,
            op=key.op,
            dtype=key.dtype,
            precision=key.precision,
            algorithm=algorithm,
            prepared=key.prepared,
            threads=torch.get_num_threads(),
        )

    predicted = plan("")
    most = _HOPELESS * predicted.cycles
    plans = {name: plan(name) for name in _ALGORITHMS if name != predicted.algorithm}
    # Where an algorithm does not support the pass, its plan is another's.
    able = [name for name, p in plans.items() if p.algorithm == name and p.cycles <= most]
    return [predicted.algorithm, *able]


@contextlib.contextmanager
def measuring_again() -> Iterator[None]:
    """What is known is measured once more; choices that do not come up are kept."""
    global _again
    before, _again = _again, set()
    try:
        yield
    finally:
        _again = before


def _is_known(key: PassKey) -> bool:
    return cpu_choices.recall(key) is not None and (_again is None or key in _again)


def _tune(problem: Any, key: PassKey, work: Callable[[], Callable[[], object]]) -> None:
    """Measure a pass; `work` gives the call to time, under the algorithm chosen just before."""
    if _is_known(key):
        return
    names = _candidates(problem, key)
    calls: dict[str, Callable[[], object]] = {}
    repeats: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:
            cpu_choices.choose(key, name)
            calls[name] = work()
            calls[name]()
            repeats[name] = max(1, round(_SAMPLE_SECONDS / max(_time(calls[name], 1), 1e-7)))
        for _ in range(_ROUNDS if len(names) > 1 else 1):
            for name in names:
                cpu_choices.choose(key, name)
                calls[name]()
                seconds[name].append(_time(calls[name], repeats[name]))
    except BaseException:
        cpu_choices.choose(key, "")
        raise
    fastest = {name: min(times) for name, times in seconds.items()}  # least disturbed
    best = min(fastest, key=lambda name: fastest[name])
    if fastest[best] > _CLEARLY_FASTER * fastest[names[0]]:
        best = names[0]
    cpu_choices.remember(key, best)
    if _again is not None:
        _again.add(key)
    for watcher in watchers:
        watcher(key, best, fastest[best])


def _time(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _key(problem: Any, op: str, weight: Tensor, *, prepared: bool) -> PassKey:
    precision = torch.ops.segpose.precision_of(weight, problem.flops)
    dtype = str(weight.dtype).removeprefix("torch.")
    return PassKey(tuple(problem.numbers), op, dtype, precision, prepared)


def _problem(label: str, x: Any, w: Any, params: tuple[Any, ...]) -> Any:
    """The convolution problem of shapes and of an operator's parameters in schema order."""
    from . import _plan

    if label == "conv2d":
        stride, padding, dilation, groups = params
        return _plan.ConvProblem.for_conv2d(x, w, stride, padding, dilation, groups)
    stride, padding, output_padding, groups, dilation = params
    return _plan.ConvProblem.for_conv_transpose2d(
        x, w, stride, padding, output_padding, groups, dilation
    )


def tune_call(
    label: str,  # "conv2d" or "conv_transpose2d"
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    params: tuple[Any, ...],  # of the operator, in schema order, with negative_slope
    needs: tuple[bool, bool, bool],
) -> None:
    """Measure the passes that a call and its gradients take, where they are not known."""
    x, w = x.detach(), w.detach()
    b = None if b is None else b.detach()
    if x.numel() == 0 or w.numel() == 0:
        return
    problem = _problem(label, tuple(x.shape), tuple(w.shape), params[:-1])
    passes = ("fprop", "dgrad") if label == "conv2d" else ("dgrad", "fprop")
    forward = getattr(torch.ops.segpose, f"{label}_act").default
    backward = getattr(torch.ops.segpose, f"{label}_act_backward").default
    with torch.no_grad():
        _tune(
            problem,
            _key(problem, passes[0], w, prepared=False),
            lambda: functools.partial(forward, x, w, b, *params),
        )
        if not (needs[0] or needs[1]):
            return
        y = forward(x, w, b, *params)
        grad = draw_like(y)
        # The whole backward each time: its passes share the masked gradient where both pack it.
        work = functools.partial(backward, grad, y, x, w, *params, *needs)
        for wanted, op in ((needs[0], passes[1]), (needs[1], "wgrad")):
            if wanted:
                _tune(problem, _key(problem, op, w, prepared=False), lambda: work)


def tune_prepared(
    label: str,  # "conv2d" or "conv_transpose2d"
    shape: tuple[int, ...],  # of the input
    output_shape: tuple[int, ...],
    weight: Tensor,
    params: tuple[Any, ...],  # of the operator, in schema order, without negative_slope
    prepare: Callable[[], int],
) -> None:
    """Measure a convolution whose filter is packed once, where it is not known.

    `prepare` gives the number of a prepared convolution. While this runs, each candidate holds a
    packed filter of its own.
    """
    problem = _problem(label, shape, tuple(weight.shape), params)
    key = _key(problem, "fprop" if label == "conv2d" else "dgrad", weight, prepared=True)
    handles: list[int] = []

    def work() -> Callable[[], object]:
        handle = prepare()
        handles.append(handle)
        return functools.partial(torch.ops.segpose.run_prepared, handle, x, y)

    with torch.no_grad():
        last = torch.channels_last
        x = draw_like(torch.empty(shape, dtype=weight.dtype, memory_format=last))
        y = torch.empty(output_shape, dtype=weight.dtype, memory_format=last)
        try:
            _tune(problem, key, work)
        finally:
            for handle in handles:
                torch.ops.segpose.release_prepared(handle)
