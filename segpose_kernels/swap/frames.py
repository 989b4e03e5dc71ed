# SPDX-License-Identifier: BSD-3-Clause
"""Where the values of a run lie, once their shapes are known.

A `Blueprint` belongs to one signature of inputs, whose shapes a first run has shown. Convolutions,
pools and concatenations of channels write into memory that is given to them: NHWC, with the inputs
of a concatenation inside its result. Values that only such steps see share one arena, which is kept
between runs: memory from the system would be zeroed anew each time. What the caller or other code
sees is allocated in every run, large results from blocks that nobody holds any more. A `Frame` is
one arena with its views; a run has a frame to itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import NATIVE_DTYPES
from .filters import (
    FilterCache,
    Form,
    Geometry,
    Settings,
    first_stale,
    geometry_of,
    settings_key,
    slope_of,
)
from .pieces import tensors_of
from .steps import CatStep, ConvStep, PoolStep, Step, Steps, fill

_ALIGNMENT = 64
# Bytes from which results lie in memory that is kept (csrc/cpu/results.h).
_LARGE = 32 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """A tensor of the first run."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        count = self.dtype.itemsize
        for extent in self.shape:
            count *= extent
        return count


def see(value: Any) -> Seen | None:
    """None for what the kernels do not take."""
    plain = type(value) is Tensor and value.device.type == "cpu" and value.dim() == 4
    if not plain or value.dtype not in NATIVE_DTYPES or value.numel() == 0:
        return None
    return Seen(tuple(value.shape), value.dtype)


@dataclass(frozen=True)
class Layer:
    """A convolution as `FilterCache` keeps it."""

    conv: Any
    shape: Shape
    geometry: Geometry
    slope: float


@dataclass
class Instruction:
    """How one step runs.

    Attributes:
        kind: "conv", "pool", "cat", or "step" for one that runs as it is.
        layer: number of the layer of a convolution.
        expects: what its source must look like, where code of the model made it.
        new: tensors to allocate first.
        slices: views to take of them, as (value, root, first channel, channels).
        copies: inputs of a concatenation that lie elsewhere, as (value, first channel, channels).
        drops: values that nothing reads later.
    """

    kind: str = "step"
    layer: int = -1
    expects: Seen | None = None
    new: list[tuple[int, Seen]] = field(default_factory=list)
    slices: list[tuple[int, int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)


class Blueprint:
    """The placement of all values for one signature of inputs."""

    def __init__(self, steps: Steps, seen: Sequence[Seen | None]) -> None:
        self.steps = steps
        self.seen = seen
        self.layers: list[Layer] = []
        self.code: list[Instruction] = []
        for step in steps.steps:
            self.code.append(self._instruction(step))
        # A value that lies inside the result of a concatenation: that result, and the channel.
        self.parents: dict[int, tuple[int, int]] = {}
        for position in reversed(range(len(self.code))):
            if self.code[position].kind == "cat":
                self._place_inputs(position)
        self.arena: dict[int, int] = {}
        self.arena_bytes = 0
        self._allocate()
        self._drop()

    def _seen(self, index: int) -> Seen:
        seen = self.seen[index]
        assert seen is not None
        return seen

    def _instruction(self, step: Step) -> Instruction:
        sources = [self.seen[index] for index in step.reads]
        result = self.seen[step.writes]
        if result is None or any(source is None for source in sources):
            return Instruction()
        if isinstance(step, ConvStep):
            weight, bias = tensors_of(step.conv)
            geometry = geometry_of(step.conv)
            slope = slope_of(step.activation, step.negative_slope)
            if (
                geometry is None
                or slope is None
                or result.dtype != weight.dtype
                or weight.is_inference()
                or (bias is not None and bias.is_inference())
            ):
                return Instruction()
            source = self._seen(step.reads[0])
            self.layers.append(Layer(step.conv, source.shape, geometry, slope))
            made_by_us = self._is_ours(step.reads[0]) or step.reads[0] not in self.steps.writers
            return Instruction("conv", len(self.layers) - 1, None if made_by_us else source)
        if isinstance(step, PoolStep):
            return Instruction("pool") if self._is_ours(step.reads[0]) else Instruction()
        if isinstance(step, CatStep):
            same = all(source is not None and source.dtype == result.dtype for source in sources)
            ours = any(self._is_ours(index) for index in step.reads)
            return Instruction("cat") if same and ours else Instruction()
        return Instruction()

    def _is_ours(self, index: int) -> bool:
        """Whether a step writes it into memory that is given to it."""
        position = self.steps.writers.get(index)
        return (
            position is not None
            and position < len(self.code)
            and self.code[position].kind != "step"
        )

    def _is_private(self, index: int) -> bool:
        """Whether only steps of ours see it."""
        return (
            self._is_ours(index)
            and index not in self.steps.outputs
            and all(self.code[p].kind != "step" for p in self.steps.readers.get(index, ()))
        )

    def _root(self, index: int) -> tuple[int, int]:
        """The value whose memory it is part of, and its first channel there."""
        first = 0
        while index in self.parents:
            index, offset = self.parents[index]
            first += offset
        return index, first

    def _place_inputs(self, position: int) -> None:
        """Put the inputs of a concatenation inside its result, or list them as copies.

        Later concatenations have been placed before. Where code of the model sees the result, and
        may change it, no input may be read after it.
        """
        step = self.steps.steps[position]
        root, _ = self._root(step.writes)
        private = self._is_private(root)
        end = self.steps.writers[root]
        channel = 0
        for index in step.reads:
            channels = self._seen(index).shape[1]
            inside = self._is_private(index) and index not in self.parents
            if inside and (private or self.steps.last_read(index) <= end):
                self.parents[index] = step.writes, channel
            else:
                self.code[position].copies.append((index, channel, channels))
            channel += channels

    def _allocate(self) -> None:
        """Give each piece of memory a place in the arena, or an allocation in every run."""
        steps = self.steps
        members: dict[int, list[int]] = {}
        for position, instruction in enumerate(self.code):
            if instruction.kind != "step":
                written = steps.steps[position].writes
                members.setdefault(self._root(written)[0], []).append(written)
        lifetimes: dict[int, tuple[int, int]] = {}
        for root, inside in members.items():
            start = min(steps.writers[index] for index in inside)
            if self._is_private(root):
                lifetimes[root] = start, max(steps.last_read(index) for index in inside)
                continue
            self.code[start].new.append((root, self._seen(root)))
            for index in inside:
                if index != root:
                    channels = self._seen(index).shape[1]
                    self.code[start].slices.append((index, root, self._root(index)[1], channels))
        self._fill_arena(lifetimes)

    def _fill_arena(self, lifetimes: dict[int, tuple[int, int]]) -> None:
        """Largest first, each at the lowest place that is free for as long as it lives."""
        placed: list[tuple[int, int, int, int]] = []  # begin, end, first step, last step
        for root in sorted(lifetimes, key=lambda index: -self._seen(index).bytes):
            start, stop = lifetimes[root]
            size = -(-self._seen(root).bytes // _ALIGNMENT) * _ALIGNMENT
            begin = 0
            for other_begin, other_end, first, last in sorted(placed):
                alive_together = first <= stop and start <= last
                if alive_together and other_begin < begin + size and begin < other_end:
                    begin = other_end
            placed.append((begin, begin + size, start, stop))
            self.arena[root] = begin
            self.arena_bytes = max(self.arena_bytes, begin + size)

    def _drop(self) -> None:
        """Let go of what was allocated in the run once nothing reads it."""
        kept = self.steps.outputs
        for index in range(self.steps.values):
            in_arena = self._is_ours(index) and self._root(index)[0] in self.arena
            position = self.steps.last_read(index)
            if index not in kept and not in_arena and position >= 0:
                self.code[position].drops.append(index)

    def notes(self) -> dict[str, str]:
        """What was done with each convolution besides its filter, by the layer's name."""
        found: dict[str, str] = {}
        for step, instruction in zip(self.steps.steps, self.code, strict=True):
            if instruction.kind != "conv":
                continue
            notes = []
            for position in self.steps.readers.get(step.writes, ()):
                if self.code[position].kind == "pool":
                    notes.append("max-pool behind it")
            if step.writes in self.parents:
                notes.append("writes into a concatenation")
            found[step.name] = ", ".join(notes)
        return found


class Frame:
    """One run's memory: the arena, its views, and the layers' forms as they were last seen."""

    def __init__(self, blueprint: Blueprint, filters: FilterCache) -> None:
        self.blueprint = blueprint
        self.filters = filters
        # Not as inference tensors, which could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            like = torch.empty(0, dtype=torch.uint8)
            self.arena = torch.ops.segpose.allocate_workspace(like, blueprint.arena_bytes)
            self.fixed = self._views()
        self.like = {
            seen.dtype: torch.empty(0, dtype=seen.dtype)
            for code in blueprint.code
            for _, seen in code.new
        }
        self.forms: list[weakref.ref[Form]] = []
        self.handles: list[int] = []

    def _views(self) -> list[Tensor | None]:
        blueprint = self.blueprint
        views: list[Tensor | None] = [None] * blueprint.steps.values
        for root, begin in blueprint.arena.items():
            seen = blueprint._seen(root)
            flat = self.arena[begin : begin + seen.bytes].view(seen.dtype)
            n, c, h, w = seen.shape
            views[root] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        for index in blueprint.parents:
            root, first = blueprint._root(index)
            whole = views[root]
            if whole is not None:
                views[index] = whole.narrow(1, first, blueprint._seen(index).shape[1])
        return views

    def _allocate(self, seen: Seen) -> Tensor:
        if seen.bytes < _LARGE:
            return torch.empty(seen.shape, dtype=seen.dtype, memory_format=torch.channels_last)
        result: Tensor = torch.ops.segpose.allocate_result(self.like[seen.dtype], seen.shape)
        return result

    def refresh(self) -> list[Form]:
        """The layers' forms as the weights are now; what is returned keeps them alive."""
        settings: dict[torch.dtype, Settings] = {}
        held = [form() for form in self.forms]
        layers = self.blueprint.layers
        current = len(held) == len(layers)
        for form, layer in zip(held, layers, strict=False):
            weight, bias = tensors_of(layer.conv)
            key = settings.get(weight.dtype)
            if key is None:
                key = settings[weight.dtype] = settings_key(weight.dtype)
            if form is None or not form.matches(weight, bias, key):
                current = False
                break
        if current and first_stale(self.handles) < 0:
            return held  # type: ignore[return-value]
        forms = []
        for layer in layers:
            weight, bias = tensors_of(layer.conv)
            form = self.filters.form(
                layer.conv, weight, bias, layer.shape, layer.geometry, layer.slope
            )
            assert form is not None, "the first run had a result"
            forms.append(form)
        self.forms = [weakref.ref(form) for form in forms]
        self.handles = [form.handle for form in forms]
        return forms

    def run(self, inputs: Sequence[Any]) -> Any:
        """The model's output. The forms must be held by the caller."""
        blueprint = self.blueprint
        steps = blueprint.steps
        values: list[Any] = self.fixed.copy()
        for (_, index), value in zip(steps.parameters, inputs, strict=True):
            values[index] = value
        run_prepared = torch.ops.segpose.run_prepared.default
        max_pool2x2 = torch.ops.segpose.max_pool2x2.default
        for position, code in enumerate(blueprint.code):
            step = steps.steps[position]
            for index, seen in code.new:
                values[index] = self._allocate(seen)
            for index, root, first, channels in code.slices:
                values[index] = values[root].narrow(1, first, channels)
            if code.kind == "conv":
                source = values[step.reads[0]]
                if code.expects is not None and see(source) != code.expects:
                    return self._finish(position, values)
                run_prepared(self.handles[code.layer], source, values[step.writes])
            elif code.kind == "pool":
                max_pool2x2(values[step.reads[0]], values[step.writes])
            elif code.kind == "cat":
                result = values[step.writes]
                for index, first, channels in code.copies:
                    if see(values[index]) != blueprint.seen[index]:
                        return self._finish(position, values)
                    result.narrow(1, first, channels).copy_(values[index])
            else:
                values[step.writes] = step.run(values)
            for index in code.drops:
                values[index] = None
        return fill(steps.output, values)

    def _finish(self, position: int, values: list[Any]) -> Any:
        """The rest of a run whose shapes turned out to be other ones."""
        for step in self.blueprint.steps.steps[position:]:
            values[step.writes] = step.run(values)
        return fill(self.blueprint.steps.output, values)


def first_run(steps: Steps, inputs: Sequence[Any]) -> tuple[Any, list[Seen | None]]:
    """Runs every step as it is; the model's output, and what each value was."""
    values: list[Any] = [None] * steps.values
    seen: list[Seen | None] = [None] * steps.values
    for (_, index), value in zip(steps.parameters, inputs, strict=True):
        values[index], seen[index] = value, see(value)
    for position, step in enumerate(steps.steps):
        values[step.writes] = step.run(values)
        seen[step.writes] = see(values[step.writes])
        for index in step.reads:
            if steps.last_read(index) == position and index not in steps.outputs:
                values[index] = None
    return fill(steps.output, values), seen
