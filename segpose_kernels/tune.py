# SPDX-License-Identifier: BSD-3-Clause
"""`segpose tune MODEL`: measure the kernels for a model's layers ahead of its first use."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from . import backends, cpu_choices, cpu_tuning, fastest, models
from .cli import LineParser, UsageError
from .swap import optimize

__all__ = ["main"]

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


def _parser() -> LineParser:
    parser = LineParser(prog="segpose tune", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(MODELS)} or MODULE:CALLABLE")
    parser.add_argument("--input", type=_shape, metavar="N,C,H,W", help="shape of the input")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="tiles of the Triton kernels, or algorithms on the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="default float16 on cuda, float32 on cpu"
    )
    parser.add_argument("--inference", action="store_true", help="leave the gradients out")
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    parser.add_argument(
        "--list", action="store_true", help="only list the layers of cuda; needs no GPU"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `segpose tune`."""
    arguments = _parser().parse_args(argv)
    model, usual = _load(arguments.model)
    shape = arguments.input or usual
    if shape is None:
        raise UsageError(f"--input N,C,H,W is needed for {arguments.model}")
    on_cpu = arguments.device == "cpu" and not arguments.list
    dtype = DTYPES[arguments.dtype or ("float32" if on_cpu else "float16")]
    if on_cpu:
        return _tune_on_cpu(
            model, shape, dtype, training=not arguments.inference, force=arguments.force
        )
    triton = importlib.import_module(".triton.tune", __package__)
    calls = triton.calls_of_model(model, shape, dtype)
    if arguments.list:
        print("\n".join(str(call) for call in calls))
        return 0
    if not torch.cuda.is_available():
        print("segpose tune: no CUDA device to measure on; --list needs none", file=sys.stderr)
        return 1
    tuned: int = triton.tune_calls(
        calls, dtype, training=not arguments.inference, force=arguments.force
    )
    return tuned


def _tune_on_cpu(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype, *, training: bool, force: bool
) -> int:
    """Run the model once as it will be used, with everything measured that is not known."""
    missing = next(b for b in backends.BACKENDS if b.name == "cpu").supports("cpu", dtype)
    if missing is not None:
        print(f"segpose tune: {missing}", file=sys.stderr)
        return 1
    measured = 0

    def show(key: cpu_choices.PassKey, algorithm: str, seconds: float) -> None:
        nonlocal measured
        measured += 1
        print(f"{seconds * 1e3:9.4f} ms  {algorithm:9}  {key}", flush=True)

    fastest.forget()  # what this process knows of backends would hide passes
    before, fastest.enabled = fastest.enabled, True
    cpu_tuning.watchers.append(show)
    try:
        last = torch.channels_last
        # Training in a low precision keeps its weights in float32.
        held = torch.float32 if training and dtype.itemsize == 2 else dtype
        model = model.train(training).to(dtype=held).to(memory_format=last)
        model, _ = optimize(model, mode="train" if training else "inference")
        x = torch.randn(tuple(shape), dtype=held).contiguous(memory_format=last)
        with (
            cpu_tuning.measuring_again() if force else contextlib.nullcontext(),
            torch.set_grad_enabled(training),
            torch.autocast("cpu", dtype=dtype, enabled=held != dtype),
        ):
            results = tree_leaves(model(x))
        if training:
            torch.autograd.backward([y.sum() for y in results if y.requires_grad])
    finally:
        cpu_tuning.watchers.remove(show)
        fastest.enabled = before
    print(f"{measured} passes measured, kept in {cpu_choices.store().path}")
    return 0
