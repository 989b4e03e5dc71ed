# SPDX-License-Identifier: BSD-3-Clause
"""`explain`: which plan the kernels choose for each layer of a model."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._prims_common import suggest_memory_format

from .. import backends
from .eligible import FUSED_TYPES
from .inference import InferenceForward, prepared_bytes
from .record import LayerCall, record_calls, rewritten_activations, run_once
from .report import format_table
from .timed import LayerTime, Stopwatch


@dataclass(frozen=True)
class LayerPlan:
    """One call of a layer.

    Attributes:
        name: the layer's name in the model.
        problem: shapes and geometry, in one line.
        activation: none, relu or leaky_relu(slope).
        backend: what runs it: cpu, cuda, triton or aten; `torch` for a layer that is not fused.
        algorithm: the plan's own description; for aten and torch that there is none.
        flops: floating-point operations of the forward, 2 for each multiply-add.
        bytes: least traffic: input, weight, bias and output, each once.
        inference: of a model under `optimize(mode="inference")`, what was done with the layer:
            its packed filter, what runs right behind it, where it writes; empty for others.
        time: predicted and measured milliseconds, where `explain` was asked to measure.
    """

    name: str
    problem: str
    activation: str
    backend: str
    algorithm: str
    flops: int
    bytes: int
    inference: str = ""
    time: LayerTime | None = None


@dataclass
class Explanation:
    """One `LayerPlan` for each call of a convolution, in the order of the run.

    `prepared_bytes` is the memory of filters packed for inference.
    """

    layers: list[LayerPlan] = field(default_factory=list)
    prepared_bytes: int = 0

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    @property
    def flops(self) -> int:
        """Of the whole forward's convolutions."""
        return sum(layer.flops for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header: tuple[str, ...] = (
            "name",
            "problem",
            "activation",
            "backend",
            "GFLOP",
            "MB",
            "predicted ms",
            "measured ms",
            "of limit",
            "inference",
            "plan",
        )
        cells: list[tuple[str, ...]] = [
            (
                layer.name,
                layer.problem,
                layer.activation,
                layer.backend,
                f"{layer.flops / 1e9:.4f}",
                f"{layer.bytes / 1e6:.3f}",
                *_time_cells(layer.time),
                layer.inference,
                layer.algorithm,
            )
            for layer in self.layers
        ]
        # Columns that say something.
        shown = [i for i in range(len(header)) if i < 6 or any(row[i] for row in cells)]
        header = tuple(header[index] for index in shown)
        cells = [tuple(row[index] for index in shown) for row in cells]
        total = f"{self.flops / 1e9:.3f} GFLOP in {len(self)} convolutions"
        if self.prepared_bytes:
            total += f", {self.prepared_bytes / 1e6:.1f} MB of packed filters"
        return f"{format_table(header, cells)}\n{total}"


def _time_cells(time: LayerTime | None) -> tuple[str, str, str]:
    if time is None:
        return "", "", ""
    predicted = f"{time.predicted:.3f}" if time.predicted else "-"
    return predicted, f"{time.measured:.3f}", f"{100 * time.share:.0f}%"


def explain(
    model: nn.Module,
    x: Any,
    *,
    arch: str | None = None,
    measure: bool = False,
    show: bool = True,
) -> Explanation:
    """Run the model once and say, for each convolution, which backend and plan its forward uses.

    `x` is the model's input; a tuple or list is passed as positional arguments, a mapping as
    keywords. Without gradients, and the state of BatchNorm and of the random number generator is
    kept. `show` prints the table.

    `arch`, such as "sm_90", shows what the CUDA backend would choose on that architecture instead:
    kernel, blocks, split-K, predicted traffic. No GPU is needed for it.

    `measure` runs every layer on CPU by itself some more times and adds predicted and measured
    milliseconds and the share of the machine's limit: see `LayerTime`.

    Raises ValueError for an architecture that the CUDA backend has no kernels for, and for
    measuring what does not run on CPU.
    """
    if measure and (arch is not None or next(model.parameters(), torch.empty(0)).is_cuda):
        raise ValueError("segpose_kernels.explain: measure=True is for models on CPU")
    extra = rewritten_activations(model)
    calls = record_calls(model, x)
    layers = [_layer_plan(call, extra, arch) for call in calls]
    if arch is None:
        layers = _with_inference(model, x, calls, layers)
    if measure:
        stopwatch = Stopwatch()
        layers = [
            replace(
                layer, time=stopwatch.time(call, _cpu_plan(call, layer), layer.flops, layer.bytes)
            )
            for call, layer in zip(calls, layers, strict=True)
        ]
    explanation = Explanation(layers, prepared_bytes(model))
    if show:
        print(explanation)
    return explanation


def _with_inference(
    model: nn.Module, x: Any, calls: list[LayerCall], layers: list[LayerPlan]
) -> list[LayerPlan]:
    """What an inference model has prepared, which only a run without recording shows."""
    run_once(model, x)
    notes: dict[str, str] = {}
    for prefix, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, InferenceForward):
            found = forward.notes()
            notes |= {f"{prefix}.{name}".lstrip("."): text for name, text in found.items()}
    explained = []
    for call, layer in zip(calls, layers, strict=True):
        filters = vars(call.module).get("filters")
        shape = tuple(call.input.shape)
        forms = filters.forms_of(call.module) if filters is not None else []
        form = next((form for form in reversed(forms) if form.input_shape == shape), None)
        if form is None:
            explained.append(layer)
            continue
        size = f"filter packed, {form.bytes / 1e6:.3f} MB"
        if not form.bytes:
            size = "filter packed on every call"
        text = "; ".join(part for part in (size, notes.get(call.name, "")) if part)
        explained.append(replace(layer, algorithm=form.plan, inference=text))
    return explained


def _layer_plan(call: LayerCall, extra: dict[str, str], arch: str | None) -> LayerPlan:
    conv, output = call.module, call.output
    image = call.input if call.input.dim() == 4 else call.input.unsqueeze(0)
    out_shape = output.shape if output.dim() == 4 else output.unsqueeze(0).shape
    weight = conv.weight
    transposed = isinstance(conv, nn.ConvTranspose2d)
    # A transposed convolution multiplies once for each *input* position.
    positions = image.shape if transposed else out_shape
    flops = 2 * weight.numel() * positions[0] * positions[2] * positions[3]
    elements = image.numel() + weight.numel() + output.numel()
    elements += conv.bias.numel() if conv.bias is not None else 0
    backend, algorithm = "torch", "not fused: torch's own operator"
    activation = ""
    if isinstance(conv, FUSED_TYPES):
        backend = backends.select(conv.backend, output.device.type, output.dtype)
        activation = conv.activation
        if activation == "leaky_relu":
            activation = f"leaky_relu({conv.negative_slope:g})"
        if activation == "none":
            activation = extra.get(call.name, activation)
        if arch is not None:
            backend = "cuda"
        elif backend == "cuda":
            arch = "sm_{}{}".format(*torch.cuda.get_device_capability(output.device))
        if backend in ("cpu", "cuda"):
            algorithm = _plan_text(call, arch)
        elif backend == "aten":
            algorithm = "torch's operators, one after the other"
        else:
            algorithm = f"chosen by the {backend} backend"
    return LayerPlan(
        call.name,
        _problem_text(call, tuple(image.shape), tuple(out_shape)),
        activation,
        backend,
        algorithm,
        int(flops),
        elements * output.element_size(),
    )


def _problem_text(call: LayerCall, shape: tuple[int, ...], out_shape: tuple[int, ...]) -> str:
    conv = call.module
    parts = [
        "x".join(map(str, shape)),
        "->",
        "x".join(map(str, out_shape)),
        "k" + "x".join(map(str, conv.kernel_size)),
        "s" + "x".join(map(str, conv.stride)),
        f"p{conv.padding}"
        if isinstance(conv.padding, str)
        else "p" + "x".join(map(str, conv.padding)),
    ]
    if set(conv.dilation) != {1}:
        parts.append("d" + "x".join(map(str, conv.dilation)))
    if conv.groups != 1:
        parts.append(f"g{conv.groups}")
    return " ".join([*parts, str(call.output.dtype).removeprefix("torch.")])


def _cpu_plan(call: LayerCall, layer: LayerPlan) -> Any:
    """The plan of a layer that the CPU kernels run, None for others."""
    if layer.backend != "cpu":
        return None
    _plan = importlib.import_module("segpose_kernels._plan")
    problem, op = _problem_of(_plan, call)
    dtype = str(call.output.dtype).removeprefix("torch.")
    return _plan.plan(problem, op=op, dtype=dtype, prepared=bool(layer.inference))


def _plan_text(call: LayerCall, arch: str | None) -> str:
    """The plan of this forward in its own words: the CPU kernels', or CUDA's for an arch."""
    try:
        # Compiled, and optional like the kernels it describes.
        _plan = importlib.import_module("segpose_kernels._plan")
    except ImportError as error:
        return f"plan unknown: {error}"
    problem, op = _problem_of(_plan, call)
    dtype = str(call.output.dtype).removeprefix("torch.")
    if arch is None:
        return str(_plan.plan(problem, op=op, dtype=dtype))
    last = suggest_memory_format(call.output) == torch.channels_last
    # torch's switch for float32 convolutions decides here as it does on the GPU.
    tf32 = backends.tf32_allowed()
    return str(
        _plan.cuda_plan(problem, op=op, dtype=dtype, arch=arch, tf32=tf32, channels_last=last)
    )


def _problem_of(_plan: Any, call: LayerCall) -> tuple[Any, str]:
    """The convolution problem of a call, and which of its passes the forward is."""
    shape, out_shape = _batched(call.input), _batched(call.output)
    conv = call.module
    weight = tuple(conv.weight.shape)
    if isinstance(conv, nn.ConvTranspose2d):
        output_padding = tuple(
            out_shape[2 + axis]
            - (
                (shape[2 + axis] - 1) * conv.stride[axis]
                - 2 * int(conv.padding[axis])
                + conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                + 1
            )
            for axis in range(2)
        )
        problem = _plan.ConvProblem.for_conv_transpose2d(
            shape, weight, conv.stride, conv.padding, output_padding, conv.groups, conv.dilation
        )
        op = "dgrad"
    else:
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        padding = (top, left)
        if conv.padding_mode != "zeros" or (left, top) != (right, bottom):
            # Padded before the kernel runs.
            shape = (shape[0], shape[1], shape[2] + top + bottom, shape[3] + left + right)
            padding = (0, 0)
        problem = _plan.ConvProblem.for_conv2d(
            shape, weight, conv.stride, padding, conv.dilation, conv.groups
        )
        op = "fprop"
    return problem, op


def _batched(image: torch.Tensor) -> tuple[int, ...]:
    return tuple(image.shape if image.dim() == 4 else image.unsqueeze(0).shape)
