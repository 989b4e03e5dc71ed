# SPDX-License-Identifier: BSD-3-Clause
"""Where the values of a run lie, once their shapes are known.

A `Blueprint` belongs to one signature of inputs, whose shapes a first run has shown. Convolutions,
pools and concatenations of channels write into memory that is given to them: NHWC, with the inputs
of a concatenation inside its result. Values that only such steps see share one arena, which is kept
between runs: memory from the system would be zeroed anew each time. What the caller or other code
sees is allocated in every run (frames.py).

A convolution whose result only the pool behind it reads may pool while it writes. Which algorithm
runs, and whether it can, is decided at the run: memory for what stands between is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import NATIVE_DTYPES
from .filters import Geometry, geometry_of, slope_of
from .flatten import Value
from .pieces import tensors_of
from .steps import CatStep, ConvStep, PoolStep, Step, Steps

_ALIGNMENT = 64
# What the kernels do in a step, and where tensors lie (csrc/cpu/sequence.cpp).
CONV, POOL, COPY, TRANSPOSE, POOLED_CONV = range(5)
FIXED, GIVEN, RESULT, SLICE = range(4)
_PLACE_INTS = 7

Shape = tuple[int, ...]
Ints = list[int]
# Of a root: (root, first channel, channels).
View = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """A tensor of the first run."""

    shape: Shape
    dtype: torch.dtype

    @functools.cached_property
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
    result: Seen

    def takes(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether these can be its parameters. Those of inference mode have no version that tells
        when they change.
        """
        tensors = (weight,) if bias is None else (weight, bias)
        return all(t.dtype == self.result.dtype and not t.is_inference() for t in tensors)


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
        code: (kind, layer, value read, value written) of each instruction.
        results: values to allocate in every run, and whether in channels_last.
        inside: views of results for the call alone, as value: (root, first channel, channels).
        slices: those that something after the call sees, as (value, root, first channel, channels).
        fixed: values in the arena that the call uses.
        given: values that it takes from before.
        drops: values that nothing reads later.
    """

    position: int
    step: Step | None = None
    expects: list[tuple[int, Seen]] = field(default_factory=list)
    code: list[tuple[int, int, int, int]] = field(default_factory=list)
    results: list[tuple[int, Seen, bool]] = field(default_factory=list)
    inside: dict[int, View] = field(default_factory=dict)
    slices: list[tuple[int, int, int, int]] = field(default_factory=list)
    fixed: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)

    @property
    def used(self) -> list[int]:
        """The values of the instructions."""
        return list(dict.fromkeys(index for step in self.code for index in step[2:]))

    def numbers(self, handles: Sequence[int], dtypes: Sequence[torch.dtype]) -> tuple[Ints, Ints]:
        """Code and places as the kernels take them, for these convolutions; behind the tensors of
        `fixed` follows one of each dtype.
        """
        places: list[list[int]] = []
        place: dict[int, int] = {}

        def put(index: int, *numbers: int) -> None:
            place[index] = len(places)
            places.append([*numbers, *[0] * (_PLACE_INTS - len(numbers))])

        for index, seen, channels_last in self.results:
            like = len(self.fixed) + dtypes.index(seen.dtype)
            put(index, RESULT, like, *seen.shape, int(channels_last))
        for index, (root, first, channels) in self.inside.items():
            put(index, SLICE, place[root], first, channels)
        for number, index in enumerate(self.fixed):
            put(index, FIXED, number)
        for number, index in enumerate(self.given):
            put(index, GIVEN, number)
        code: Ints = []
        for kind, layer, source, target in self.code:
            handle = handles[layer] if kind in (CONV, POOLED_CONV) else 0
            code += (kind, handle, place[source], place[target])
        return code, [number for numbers in places for number in numbers]


class Blueprint:
    """The placement of all values for one signature of inputs.

    With `contiguous` the caller gets results in torch's default memory format: a convolution writes
    them so, and what other steps read or write is transposed at the end.
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
        self.views: dict[int, View] = {}
        for index in self.parents:
            self.views[index] = (*self._root(index), self.seen_of(index).shape[1])
        self.results = [
            (index, self._new_value()) for index in steps.outputs if self._is_transposed(index)
        ]
        # Whether all that the caller gets is in the memory format that is wanted.
        self.formatted = not contiguous or all(map(self._is_ours, steps.outputs))
        self.arena: dict[int, int] = {}
        self.arena_bytes = 0
        self.segments = self._segments()
        self._allocate()
        self._drop()
        # The model as one call on its inputs: which of the call's results it returns.
        self.whole = self._find_whole()

    def _new_value(self) -> int:
        self.values += 1
        return self.values - 1

    def seen_of(self, index: int) -> Seen:
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
            if geometry is None or slope is None:
                return Instruction()
            source = self.seen_of(step.reads[0])
            layer = Layer(step.conv, source.shape, geometry, slope, result)
            if (
                not layer.takes(weight, bias)
                or backends.select(step.conv.backend, "cpu", weight.dtype) != "cpu"
            ):
                return Instruction()
            self.layers.append(layer)
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
        return self.contiguous and self._is_ours(index) and not self._is_contiguous(index)

    def _is_contiguous(self, index: int) -> bool:
        """Whether a convolution writes it in the memory format that the caller wants."""
        return (
            self.contiguous
            and index in self.steps.outputs
            and index not in self.steps.readers
            and self.code[self.steps.writers[index]].kind == "conv"
        )

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
            channels = self.seen_of(index).shape[1]
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
                    segment.code.append((COPY, 0, index, inside))
            else:
                kind = CONV if instruction.kind == "conv" else POOL
                if self._is_pooled(position):
                    kind = POOLED_CONV
                segment.code.append((kind, instruction.layer, step.reads[0], step.writes))
            for index in step.reads:
                # What code of the model made may look different in another run.
                if not self._is_ours(index) and index in self.steps.writers:
                    segment.expects.append((index, self.seen_of(index)))
        if self.results and (not segments or segments[-1].step is not None):
            segments.append(Segment(len(self.code)))
        for index, result in self.results:
            segments[-1].code.append((TRANSPOSE, 0, index, result))
            segments[-1].results.append((result, self.seen_of(index), False))
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
            home.results.append((root, self.seen_of(root), not self._is_contiguous(root)))
        self._fill_arena(lifetimes)
        ends = [segment.position for segment in self.segments[1:]] + [len(self.code)]
        for segment, end in zip(self.segments, ends, strict=True):
            self._find_places(segment, end)

    def _find_places(self, segment: Segment, end: int) -> None:
        """Where the values of a call lie: in the arena, in its results, or given to it."""
        results = {index for index, _, _ in segment.results}
        for index, view in self.views.items():
            if view[0] not in results:
                continue
            if index in segment.used:
                segment.inside[index] = view
            if self._is_seen_outside(index, segment, end):
                segment.slices.append((index, *view))
        for index in segment.used:
            if index in results or index in segment.inside:
                continue
            in_arena = self.views.get(index, (index,))[0] in self.arena
            (segment.fixed if in_arena else segment.given).append(index)

    def _is_seen_outside(self, index: int, segment: Segment, end: int) -> bool:
        """Whether another segment, or the caller, uses a value."""
        positions = list(self.steps.readers.get(index, ()))
        if index in self.steps.writers:
            positions.append(self.steps.writers[index])
        return (
            index in self.steps.outputs
            or any(not segment.position <= position < end for position in positions)
            or any(index in other.used for other in self.segments if other is not segment)
        )

    def _fill_arena(self, lifetimes: dict[int, tuple[int, int]]) -> None:
        """Largest first, each at the lowest place that is free for as long as it lives."""
        placed: list[tuple[int, int, int, int]] = []  # begin, end, first step, last step
        for root in sorted(lifetimes, key=lambda index: -self.seen_of(index).bytes):
            start, stop = lifetimes[root]
            size = -(-self.seen_of(root).bytes // _ALIGNMENT) * _ALIGNMENT
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

    def _find_whole(self) -> int | None:
        segment = self.segments[0] if self.segments else None
        output = self.steps.output
        if len(self.segments) != 1 or segment is None or segment.step is not None:
            return None
        if segment.given != [index for _, index in self.steps.parameters]:
            return None
        if not isinstance(output, Value) or not self.formatted:
            return None
        written = dict(self.results).get(output.index, output.index)
        results = [index for index, _, _ in segment.results]
        return results.index(written) if written in results else None

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
