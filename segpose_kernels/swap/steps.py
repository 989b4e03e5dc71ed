# SPDX-License-Identifier: BSD-3-Clause
"""A flat model's operations as the steps that run: what the CPU kernels do together is one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .activation import Activation, ActivationCall, of_function, of_module
from .eligible import FUSED_TYPES, Fused
from .flatten import FlatModel, Operation, Value, values_in
from .pieces import run_convolution

_CATS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(eq=False)
class Step(ABC):
    """What runs at once: `name` is the layer or forward it belongs to, `reads` and `writes` are
    numbers of values.
    """

    name: str
    reads: tuple[int, ...]
    writes: int

    @abstractmethod
    def run(self, values: list[Any]) -> Any:
        """The result, computed without knowing any shape in advance."""


@dataclass(eq=False)
class ConvStep(Step):
    """A convolution with its activation."""

    conv: Fused
    activation: str
    negative_slope: float

    def run(self, values: list[Any]) -> Any:
        return run_convolution(
            self.conv,
            values[self.reads[0]],
            activation=self.activation,
            negative_slope=self.negative_slope,
        )


@dataclass(eq=False)
class PoolStep(Step):
    """Max-pooling over 2x2 pixels with stride 2."""

    def run(self, values: list[Any]) -> Any:
        return F.max_pool2d(values[self.reads[0]], 2)


@dataclass(eq=False)
class CatStep(Step):
    """Concatenation of channels."""

    def run(self, values: list[Any]) -> Any:
        return torch.cat([values[index] for index in self.reads], dim=1)


@dataclass(eq=False)
class CallStep(Step):
    """Anything else, called as the model calls it."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, values: list[Any]) -> Any:
        args, kwargs = fill((self.args, self.kwargs), values)
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


@dataclass
class Steps:
    """A model's steps in order, and who reads what."""

    parameters: list[tuple[str, int]]
    steps: list[Step]
    output: Any
    values: int
    outputs: set[int] = field(default_factory=set)
    readers: dict[int, list[int]] = field(default_factory=dict)  # positions of steps
    writers: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs = {value.index for value in values_in(self.output)}
        for position, step in enumerate(self.steps):
            self.writers[step.writes] = position
            for index in dict.fromkeys(step.reads):
                self.readers.setdefault(index, []).append(position)

    def last_read(self, index: int) -> int:
        """Position of the last step that reads a value; that of its writer if there is none."""
        readers = self.readers.get(index)
        return readers[-1] if readers else self.writers.get(index, -1)


def fill(template: Any, values: Sequence[Any]) -> Any:
    """The template with every `Value` replaced by what it stands for."""
    if isinstance(template, Value):
        return values[template.index]
    if isinstance(template, (tuple, list)):
        items = [fill(item, values) for item in template]
        if hasattr(template, "_fields"):  # a named tuple
            return type(template)(*items)
        return items if isinstance(template, list) else tuple(items)
    if isinstance(template, dict):
        return {key: fill(item, values) for key, item in template.items()}
    if isinstance(template, slice):
        return slice(*(fill(x, values) for x in (template.start, template.stop, template.step)))
    return template


def make_steps(flat: FlatModel) -> Steps:
    """Group the operations: activations go into the convolutions that they alone follow."""
    readers: dict[int, int] = {}
    for operation in flat.operations:
        for value in operation.inputs:
            readers[value.index] = readers.get(value.index, 0) + 1
    for value in values_in(flat.output):
        readers[value.index] = readers.get(value.index, 0) + 1
    steps: list[Step] = []
    producers: dict[int, Step] = {}
    for operation in flat.operations:
        step = _absorbed(operation, producers, readers)
        if step is None:
            step = _step(operation)
            steps.append(step)
        producers[step.writes] = step
    parameters = [(name, value.index) for name, value in flat.parameters]
    return Steps(parameters, steps, flat.output, flat.values)


def _step(operation: Operation) -> Step:
    target, args = operation.target, operation.args
    common = (operation.name, tuple(v.index for v in operation.inputs), operation.result.index)
    source = args[0] if args else None
    if isinstance(target, FUSED_TYPES) and _is_only(operation, source):
        return ConvStep(*common, target, str(target.activation), float(target.negative_slope))
    if _is_pool(operation) and isinstance(source, Value):
        return PoolStep(*common)
    if _is_channel_cat(operation):
        return CatStep(*common)
    return CallStep(*common, target, args, operation.kwargs)


def _is_only(operation: Operation, source: Any) -> bool:
    """One tensor and nothing else."""
    return isinstance(source, Value) and len(operation.args) == 1 and not operation.kwargs


def _is_pool(operation: Operation) -> bool:
    target = operation.target
    if isinstance(target, nn.MaxPool2d):
        options = (
            target.kernel_size,
            target.stride,
            target.padding,
            target.dilation,
            target.ceil_mode,
            target.return_indices,
        )
        plain = type(target) is nn.MaxPool2d and len(operation.args) == 1
        return plain and not operation.kwargs and _halves(*options)
    if target is not F.max_pool2d and target is not torch.max_pool2d:
        return False
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    options_given = dict(zip(names, operation.args[1:], strict=False)) | operation.kwargs
    if not set(options_given) <= set(names):
        return False
    defaults = {
        "stride": None,
        "padding": 0,
        "dilation": 1,
        "ceil_mode": False,
        "return_indices": False,
    }
    return _halves(**{**defaults, **options_given})


def _halves(
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, return_indices: Any
) -> bool:
    """Whether a max-pool is over 2x2 pixels with stride 2 and nothing more."""

    def is_all(value: Any, number: int) -> bool:
        pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
        return all(isinstance(v, int) and v == number for v in pair)

    strided = stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)
    return (
        is_all(kernel_size, 2)
        and (strided or is_all(stride, 2))
        and is_all(padding, 0)
        and is_all(dilation, 1)
        and ceil_mode is False
        and return_indices is False
    )


def _is_channel_cat(operation: Operation) -> bool:
    if operation.target not in _CATS or not operation.args:
        return False
    tensors = operation.args[0]
    rest = dict(zip(("dim",), operation.args[1:], strict=False)) | operation.kwargs
    return (
        isinstance(tensors, (tuple, list))
        and len(tensors) > 1
        and all(isinstance(tensor, Value) for tensor in tensors)
        and rest == {"dim": 1}
    )


def _activation(operation: Operation) -> ActivationCall | None:
    target = operation.target
    if isinstance(target, nn.Module):
        return of_module(target)
    if isinstance(target, str):
        return ActivationCall("relu", Activation("relu")) if target in ("relu", "relu_") else None
    return of_function(target, operation.args[1:], operation.kwargs)


def _absorbed(
    operation: Operation, producers: dict[int, Step], readers: dict[int, int]
) -> Step | None:
    """The convolution's step with this activation in it, if nothing else reads between the two."""
    source = operation.args[0] if operation.args else None
    if not isinstance(source, Value) or readers.get(source.index) != 1:
        return None
    step = producers.get(source.index)
    call = _activation(operation)
    if not isinstance(step, ConvStep) or step.activation != "none" or call is None:
        return None
    if call.spec is None:
        return None
    step.activation, step.negative_slope = call.spec.name, call.spec.negative_slope
    step.writes = operation.result.index
    return step
