# SPDX-License-Identifier: BSD-3-Clause
"""The calls that a model makes of the Triton operators, and their tuning with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..extras import import_extra
from ..swap import optimize
from .choices import store_of
from .device import device_of
from .ops import NAMESPACE
from .tuning import Pass, passes_of_call, tune

__all__ = ["Call", "calls_of_model", "tune_calls"]


@dataclass(frozen=True)
class Call:
    """One call of an operator: its name, shapes and parameters."""

    label: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    bias: bool
    params: tuple[Any, ...]

    def __str__(self) -> str:
        x, w = ("x".join(str(size) for size in shape) for shape in (self.x_shape, self.w_shape))
        return f"{self.label} of {x} by {w}"


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every different call of a forward operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[Call, None] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().removeprefix(f"{NAMESPACE}::")
        if name in ("conv2d_act", "conv_transpose2d_act"):
            x, w, b, *params = args
            frozen = tuple(tuple(p) if isinstance(p, list) else p for p in params)
            label = name.removesuffix("_act")
            self.calls[Call(label, tuple(x.shape), tuple(w.shape), b is not None, frozen)] = None
        return function(*args, **(kwargs or {}))


def calls_of_model(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> list[Call]:
    """The different calls that the optimized model makes of the Triton operators.

    Nothing is computed: the model runs on fake tensors.
    """
    optimize(model, backend="triton")
    recorder = _Recorder()
    with FakeTensorMode() as mode, torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                with mode:
                    fake = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                setattr(module, name, nn.Parameter(fake, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                setattr(module, name, torch.empty(buffer.shape, dtype=kind, device="cuda"))
        with recorder:
            model(torch.empty(tuple(shape), dtype=dtype, device="cuda"))
    return list(recorder.calls)


def _passes(call: Call, dtype: torch.dtype, training: bool) -> list[Pass]:
    """What tuning measures for a call, on fresh tensors."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, dtype=dtype, device="cuda")
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x, w = draw(call.x_shape), draw(call.w_shape)
    channels = w.shape[0] if call.label == "conv2d" else w.shape[1] * call.params[3]
    b = draw((channels,)) if call.bias else None
    needs = training, training, training and call.bias
    return passes_of_call(call.label, x, w, b, call.params, needs)


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar over `total` candidates: functions that name the pass and that count one."""
    rich = import_extra("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, transient=True) as bar:
        task = bar.add_task("tune", total=total)
        yield (
            lambda text: bar.update(task, description=text),
            lambda: bar.advance(task),
        )


def tune_calls(calls: Sequence[Call], dtype: torch.dtype, *, training: bool, force: bool) -> int:
    passes: dict[str, Pass] = {}
    for call in calls:
        for work in _passes(call, dtype, training):
            if force or not work.is_known:
                passes.setdefault(work.key, work)
    with _progress(sum(len(work.candidates) for work in passes.values())) as (name, tried):
        results = []
        for work in passes.values():
            name(work.key.partition(":")[0])
            results.append((work.key, *tune(work, tried=tried)))
    for key, choice, milliseconds in results:
        tile = f" {choice.tile}" if choice.tile is not None else ""
        print(f"{milliseconds:9.4f} ms  {choice.kernel}{tile}  {key}")
    print(
        f"{len(results)} passes measured, kept in {store_of(device_of(torch.device('cuda'))).path}"
    )
    return 0
