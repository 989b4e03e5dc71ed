# SPDX-License-Identifier: BSD-3-Clause
"""`segpose tune MODEL`: measure the kernels for a model's layers ahead of its first use."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import models
from ..cli import LineParser, UsageError
from ..extras import import_extra
from ..swap import optimize
from .choices import store_of
from .device import device_of
from .ops import NAMESPACE
from .tuning import Pass, passes_of_call, tune

__all__ = ["Call", "calls_of_model", "main"]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# Models of the package by name, with the input they are usually run on.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "autoencoder": (models.Autoencoder, (64, 1, 28, 28)),
    "segnet": (lambda: models.SegNet(10), (64, 1, 28, 28)),
    "cpm2dpose": (models.CPM2DPose, (1, 3, 256, 256)),
}


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


def _load(name: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """A model of the package, or what `module:callable` returns."""
    if name in MODELS:
        make, shape = MODELS[name]
        return make(), shape
    module_name, _, attribute = name.partition(":")
    if not attribute:
        known = ", ".join(MODELS)
        raise UsageError(f"MODEL must be one of {known}, or MODULE:CALLABLE, got {name!r}")
    try:
        model = getattr(importlib.import_module(module_name), attribute)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot make {name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gave {type(model).__name__}, not a torch.nn.Module")
    return model, None


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be N,C,H,W, got {text!r}")
    return sizes


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


def _parser() -> LineParser:
    parser = LineParser(prog="segpose tune", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(MODELS)} or MODULE:CALLABLE")
    parser.add_argument("--input", type=_shape, metavar="N,C,H,W", help="shape of the input")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--inference", action="store_true", help="leave the gradients out")
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    parser.add_argument("--list", action="store_true", help="only list the layers; needs no GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `segpose tune`."""
    arguments = _parser().parse_args(argv)
    model, usual = _load(arguments.model)
    shape = arguments.input or usual
    if shape is None:
        raise UsageError(f"--input N,C,H,W is needed for {arguments.model}")
    dtype = DTYPES[arguments.dtype]
    calls = calls_of_model(model, shape, dtype)
    if arguments.list:
        print("\n".join(str(call) for call in calls))
        return 0
    if not torch.cuda.is_available():
        print("segpose tune: no CUDA device to measure on; --list needs none", file=sys.stderr)
        return 1
    return _tune_calls(calls, dtype, training=not arguments.inference, force=arguments.force)


def _tune_calls(calls: Sequence[Call], dtype: torch.dtype, *, training: bool, force: bool) -> int:
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
