# SPDX-License-Identifier: BSD-3-Clause
"""Runs of a model whose values have their places (blueprint.py).

A `Frame` is one arena with its views; a run has a frame to itself. What the caller or other code
sees is allocated in every run, large results from blocks that nobody holds any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu_float32_precision
from .blueprint import Blueprint, Seen, see
from .eligible import Fused
from .filters import FilterCache, Form
from .layout import contiguous_values
from .pieces import tensors_of
from .steps import Steps, fill
from .unchanged import Unchanged

# Bytes from which results may lie in memory that is kept (csrc/cpu/results.h).
_LARGE = 256 << 10


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
            for _, seen in (*segment.new, *segment.results)
        }
        self.forms: list[weakref.ref[Form]] = []
        self.codes: list[list[int]] = []
        # What the forms were made from.
        self.precision = ""
        self.unchanged = Unchanged()
        self.folded: list[tuple[Fused, weakref.ref[Form]]] = []
        self.run_steps = torch.ops.segpose.run_steps.default

    def _views(self) -> list[Tensor | None]:
        blueprint = self.blueprint
        views: list[Tensor | None] = [None] * blueprint.values
        for root, begin in blueprint.arena.items():
            seen = blueprint.seen_of(root)
            flat = self.arena[begin : begin + seen.bytes].view(seen.dtype)
            n, c, h, w = seen.shape
            views[root] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        for index, (root, first, channels) in blueprint.views.items():
            whole = views[root]
            if whole is not None:
                views[index] = whole.narrow(1, first, channels)
        return views

    def _allocate(self, seen: Seen, *, channels_last: bool) -> Tensor:
        if seen.bytes >= _LARGE:
            result: Tensor = torch.ops.segpose.allocate_result(
                self.like[seen.dtype], seen.shape, channels_last
            )
            return result
        strides = seen.strides if channels_last else seen.contiguous_strides
        # With caches full of other things half the time of an empty.
        return torch.empty_strided(seen.shape, strides, dtype=seen.dtype)

    def _hold(self) -> list[Form]:
        """The layers' forms as Python sees the weights now; what is returned keeps them alive."""
        if not self.codes or self.precision != cpu_float32_precision() or not self.unchanged.hold():
            return self._prepare()
        held = []
        for reference in self.forms:
            form = reference()
            if form is None:
                return self._prepare()
            held.append(form)
        for conv, reference in self.folded:
            form = reference()
            if form is None or not form.matches(*tensors_of(conv), self.precision):
                return self._prepare()
        return held

    def _prepare(self) -> list[Form]:
        """The layers' forms as the weights and settings are now, and what the kernels take."""
        forms = []
        self.precision = cpu_float32_precision()
        self.unchanged = Unchanged()
        self.folded = []
        for layer in self.blueprint.layers:
            weight, bias = tensors_of(layer.conv)
            if weight is layer.conv._parameters["weight"]:
                self.unchanged.parameters(layer.conv)
            form = self.filters.form(
                layer.conv, weight, bias, layer.shape, layer.geometry, layer.slope
            )
            assert form is not None, "the first run had a result"
            if weight is not layer.conv._parameters["weight"]:
                self.folded.append((layer.conv, weakref.ref(form)))
            forms.append(form)
        self.forms = [weakref.ref(form) for form in forms]
        handles = [form.handle for form in forms]
        self.codes = [segment.numbers(handles) for segment in self.blueprint.segments]
        return forms

    def run(self, inputs: Sequence[Any]) -> Any:
        """The model's output."""
        blueprint = self.blueprint
        steps = blueprint.steps
        forms = self._hold()
        values: list[Any] = self.fixed.copy()
        for (_, index), value in zip(steps.parameters, inputs, strict=True):
            values[index] = value
        for number, segment in enumerate(blueprint.segments):
            if segment.step is not None:
                values[segment.step.writes] = segment.step.run(values)
            else:
                for index, expected in segment.expects:
                    if see(values[index]) != expected:
                        return self._finish(segment.position, values)
                for index, seen in segment.new:
                    values[index] = self._allocate(seen, channels_last=True)
                for index, root, first, channels in segment.slices:
                    values[index] = values[root].narrow(1, first, channels)
                for index, seen in segment.results:
                    values[index] = self._allocate(seen, channels_last=False)
                tensors = [values[index] for index in segment.used]
                while not self.run_steps(self.codes[number], tensors):
                    # What Python does not see has changed: memory, or the number of threads.
                    forms = self._prepare()
            for index in segment.drops:
                values[index] = None
        for index, result in blueprint.results:
            values[index] = values[result]
        del forms
        output = fill(steps.output, values)
        return output if blueprint.formatted else contiguous_values(output)

    def _finish(self, position: int, values: list[Any]) -> Any:
        """The rest of a run whose shapes turned out to be other ones."""
        for step in self.blueprint.steps.steps[position:]:
            values[step.writes] = step.run(values)
        output = fill(self.blueprint.steps.output, values)
        return contiguous_values(output) if self.blueprint.contiguous else output


def first_run(
    steps: Steps, inputs: Sequence[Any], *, contiguous: bool = False
) -> tuple[Any, list[Seen | None]]:
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
    output = fill(steps.output, values)
    return contiguous_values(output) if contiguous else output, seen
