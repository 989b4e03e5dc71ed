# SPDX-License-Identifier: BSD-3-Clause
"""Where the values of a run lie, once their shapes are known.

A `Blueprint` belongs to one signature of inputs, whose shapes a first run has shown. Convolutions,
pools and concatenations of channels write into memory that is given to them: NHWC, with the inputs
of a concatenation inside its result. Values that only such steps see share one arena, which is kept
between runs: memory from the system would be zeroed anew each time. What the caller or other code
sees is allocated in every run, large results from blocks that nobody holds any more. A `Frame` is
one arena with its views; a run has a frame to itself.

A convolution whose result only the pool behind it reads may pool while it writes. Which algorithm
runs, and whether it can, is decided at the run: memory for what stands between is kept.
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
# What the kernels do in a step (csrc/cpu/sequence.cpp).
CONV, POOL, COPY, TRANSPOSE, POOLED_CONV = range(5)

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
        copies: inputs of a concatenation that lie elsewhere, as (value, first channel, channels).
    """

    kind: str = "step"
    layer: int = -1
    copies: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class Segment:
    """Instructions that run in one call, or a step that runs as it is.

    Attributes:
        position: of the first step.
        step: the one that runs as it is.
        expects: what values must look like that code of the model made.
        new: values to allocate first, in channels_last.
        slices: views to take of them, as (value, root, first channel, channels).
        results: values to allocate in torch's default memory format.
        used: the tensors of the call, by value.
        code: (kind, layer, number of the tensor read, of the one written) of each instruction.
        drops: values that nothing reads later.
    """

    position: int
    step: Step | None = None
    expects: list[tuple[int, Seen]] = field(default_factory=list)
    new: list[tuple[int, Seen]] = field(default_factory=list)
    slices: list[tuple[int, int, int, int]] = field(default_factory=list)
    results: list[tuple[int, Seen]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    code: list[tuple[int, int, int, int]] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)

    def add(self, kind: int, layer: int, source: int, target: int) -> None:
        """An instruction between two values."""
        for index in (source, target):
            if index not in self.used:
                self.used.append(index)
        self.code.append((kind, layer, self.used.index(source), self.used.index(target)))

    def numbers(self, handles: Sequence[int]) -> list[int]:
        """What the kernels take, for these convolutions."""
        flat: list[int] = []
        for kind, layer, source, target in self.code:
            flat += (kind, handles[layer] if kind in (CONV, POOLED_CONV) else 0, source, target)
        return flat


class Blueprint:
    """The placement of all values for one signature of inputs.

    With `contiguous` the caller gets results in torch's default memory format: they are written in
    channels_last like everything else, and transposed at the end.
    """

    def __init__(
        self, steps: Steps, seen: Sequence[Seen | None], *, contiguous: bool = False
    ) -> None:
        self.steps = steps
        self.seen = seen
        self.contiguous = contiguous
        self.layers: list[Layer] = []
        self.code: list[Instruction] = []
        for step in steps.steps:
            self.code.append(self._instruction(step))
        # A value that lies inside the result of a concatenation: that result, and the channel.
        self.parents: dict[int, tuple[int, int]] = {}
        for position in reversed(range(len(self.code))):
            if self.code[position].kind == "cat":
                self._place_inputs(position)
        # Values beyond those of the steps: where copies go, and transposed results.
        self.values = steps.values
        # Views of a root: (root, first channel, channels) by value.
        self.views: dict[int, tuple[int, int, int]] = {}
        for index in self.parents:
            self.views[index] = (*self._root(index), self._seen(index).shape[1])
        self.results = [
            (index, self._new_value()) for index in steps.outputs if self._is_transposed(index)
        ]
        self.arena: dict[int, int] = {}
        self.arena_bytes = 0
        self.segments = self._segments()
        self._allocate()
        self._drop()

    def _new_value(self) -> int:
        self.values += 1
        return self.values - 1

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
            return Instruction("conv", len(self.layers) - 1)
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

    def _is_transposed(self, index: int) -> bool:
        return self.contiguous and self._is_ours(index)

    def _is_private(self, index: int) -> bool:
        """Whether only steps of ours see it."""
        return (
            self._is_ours(index)
            and (index not in self.steps.outputs or self._is_transposed(index))
            and all(self.code[p].kind != "step" for p in self.steps.readers.get(index, ()))
        )

    def _is_pooled(self, position: int) -> bool:
        """Whether the next step pools what a convolution writes, and nothing else reads that."""
        if self.code[position].kind != "conv":
            return False
        between = self.steps.steps[position].writes
        after = position + 1
        return (
            self.steps.readers.get(between) == [after]
            and self.code[after].kind == "pool"
            and self._is_private(between)
        )

    def _start(self, index: int) -> int:
        """Position of the step that writes it; a convolution may pool by itself."""
        position = self.steps.writers[index]
        pooled = position > 0 and self._is_pooled(position - 1)
        return position - 1 if pooled else position

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
            if inside and (private or self._last_read(index) <= end):
                self.parents[index] = step.writes, channel
            else:
                self.code[position].copies.append((index, channel, channels))
            channel += channels

    def _last_read(self, index: int) -> int:
        """Position of the last step that reads it; results are transposed after all of them."""
        if index in self.steps.outputs:
            return len(self.code)
        return self.steps.last_read(index)

    def _segments(self) -> list[Segment]:
        """The instructions, as many together as steps of the model do not come between."""
        segments: list[Segment] = []
        for position, (step, instruction) in enumerate(
            zip(self.steps.steps, self.code, strict=True)
        ):
            if instruction.kind == "step":
                segments.append(Segment(position, step))
                continue
            if not segments or segments[-1].step is not None:
                segments.append(Segment(position))
            segment = segments[-1]
            if instruction.kind == "cat":
                root, offset = self._root(step.writes)
                for index, first, channels in instruction.copies:
                    inside = self._new_value()
                    self.views[inside] = root, offset + first, channels
                    segment.add(COPY, 0, index, inside)
            else:
                kind = CONV if instruction.kind == "conv" else POOL
                if self._is_pooled(position):
                    kind = POOLED_CONV
                segment.add(kind, instruction.layer, step.reads[0], step.writes)
            for index in step.reads:
                # What code of the model made may look different in another run.
                if not self._is_ours(index) and index in self.steps.writers:
                    segment.expects.append((index, self._seen(index)))
        if self.results and (not segments or segments[-1].step is not None):
            segments.append(Segment(len(self.code)))
        for index, result in self.results:
            segments[-1].add(TRANSPOSE, 0, index, result)
            segments[-1].results.append((result, self._seen(index)))
        return segments

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
            start = min(self._start(index) for index in inside)
            if self._is_private(root):
                lifetimes[root] = start, max(self._last_read(index) for index in inside)
                continue
            for segment in self.segments:
                if segment.step is None and segment.position <= start:
                    home = segment
            home.new.append((root, self._seen(root)))
            home.slices += [
                (index, *place) for index, place in self.views.items() if place[0] == root
            ]
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
        for index in range(self.steps.values):
            in_arena = self._is_ours(index) and self._root(index)[0] in self.arena
            position = self.steps.last_read(index)
            if index in self.steps.outputs or in_arena or position < 0:
                continue
            for segment in self.segments:
                if segment.position <= position:
                    home = segment
            home.drops.append(index)

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
            for segment in blueprint.segments
            for _, seen in segment.new
        }
        self.forms: list[weakref.ref[Form]] = []
        self.handles: list[int] = []
        self.codes: list[list[int]] = []

    def _views(self) -> list[Tensor | None]:
        blueprint = self.blueprint
        views: list[Tensor | None] = [None] * blueprint.values
        for root, begin in blueprint.arena.items():
            seen = blueprint._seen(root)
            flat = self.arena[begin : begin + seen.bytes].view(seen.dtype)
            n, c, h, w = seen.shape
            views[root] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        for index, (root, first, channels) in blueprint.views.items():
            whole = views[root]
            if whole is not None:
                views[index] = whole.narrow(1, first, channels)
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
        current = bool(self.codes) and len(held) == len(layers)
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
        self.codes = [segment.numbers(self.handles) for segment in self.blueprint.segments]
        return forms

    def run(self, inputs: Sequence[Any]) -> Any:
        """The model's output. The forms must be held by the caller."""
        blueprint = self.blueprint
        steps = blueprint.steps
        run_steps = torch.ops.segpose.run_steps.default
        values: list[Any] = self.fixed.copy()
        for (_, index), value in zip(steps.parameters, inputs, strict=True):
            values[index] = value
        for segment, code in zip(blueprint.segments, self.codes, strict=True):
            if segment.step is not None:
                values[segment.step.writes] = segment.step.run(values)
            else:
                for index, expected in segment.expects:
                    if see(values[index]) != expected:
                        return self._finish(segment.position, values)
                for index, seen in segment.new:
                    values[index] = self._allocate(seen)
                for index, root, first, channels in segment.slices:
                    values[index] = values[root].narrow(1, first, channels)
                for index, seen in segment.results:
                    values[index] = torch.empty(seen.shape, dtype=seen.dtype)
                run_steps(code, [values[index] for index in segment.used])
            for index in segment.drops:
                values[index] = None
        for index, result in blueprint.results:
            values[index] = values[result]
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
