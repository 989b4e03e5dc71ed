# SPDX-License-Identifier: BSD-3-Clause
"""Runs of a model whose values have their places (blueprint.py).

A `Frame` is one arena with its views; a run has a frame to itself. What the caller or other code
sees is allocated in every run, large results from blocks that nobody holds any more.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu_float32_precision
from .blueprint import Blueprint, Seen, Segment, see
from .eligible import Fused
from .entries import entries
from .filters import FilterCache, Form
from .layout import contiguous_values
from .pieces import tensors_of
from .steps import Steps, fill
from .unchanged import Unchanged

# Results from so many bytes on come from blocks that are kept (csrc/cpu/results.cpp).
_KEPT_BYTES = 256 << 10


class Call:
    """A segment bound to the memory of a frame and to the layers' forms; frees both when it goes.

    The forms are not kept alive: without one of them, or once the kernels would prepare it in
    another way, `run` gives None.
    """

    def __init__(self, segment: Segment, handles: Sequence[int], views: dict[int, Tensor]) -> None:
        # Imported here: without a build of the native code everything else of the package works.
        from .. import _calls

        dtypes = list(dict.fromkeys(seen.dtype for _, seen, _ in segment.results))
        code, places = segment.numbers(handles, dtypes)
        fixed = [views[index] for index in segment.fixed]
        fixed += [torch.empty(0, dtype=dtype) for dtype in dtypes]
        self.handle = torch.ops.segpose.prepare_sequence(code, places, fixed)
        # Not by __del__, see filters.Form.
        released = weakref.finalize(self, entries().release_sequence, self.handle)
        released.atexit = False
        self._run = torch.ops.segpose.run_sequence.default
        self._run_directly = _calls.run
        self._entry = entries().run_sequence
        self._allocate = tuple(
            _allocator(seen, channels_last) for _, seen, channels_last in segment.results
        )

    def run(self, given: tuple[Tensor, ...]) -> list[Tensor] | None:
        """The segment's results in order."""
        # A profiler sees operators only.
        if not torch._C._autograd._profiler_enabled():
            results = self._run_directly(self._entry, self.handle, self._allocate, given)
            if results is not None:
                return results
        done, results = self._run(self.handle, [_materialized(tensor) for tensor in given])
        return results if done else None


def _materialized(tensor: Tensor) -> Tensor:
    """With its values in memory: torch does not do that for an operator that may write to them."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def _allocator(seen: Seen, channels_last: bool) -> Callable[[], Tensor]:
    """What makes a tensor for a result in every run."""
    if seen.bytes >= _KEPT_BYTES:
        like = torch.empty(0, dtype=seen.dtype)
        allocate = torch.ops.segpose.allocate_result.default
        return functools.partial(allocate, like, seen.shape, channels_last)
    _, c, h, w = seen.shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return functools.partial(
        torch.empty_strided, seen.shape, strides, dtype=seen.dtype, device="cpu"
    )


class OutdatedError(Exception):
    """The model's layers are no longer those that a blueprint was made for."""


class Frame:
    """One run's memory: the arena, its views, and the layers' forms as they were last seen.

    `always`: what must hold for any run of the program without gradients.
    """

    def __init__(self, blueprint: Blueprint, filters: FilterCache, always: Unchanged) -> None:
        self.blueprint = blueprint
        self.filters = filters
        self.always = always
        # Not as inference tensors, which could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            like = torch.empty(0, dtype=torch.uint8)
            self.arena = torch.ops.segpose.allocate_workspace(like, blueprint.arena_bytes)
            self.views = self._views()
        # One for each segment that is not a step of the model.
        self.calls: list[Call | None] = []
        # Of the inputs of the run before.
        self.layouts: bytes | None = None
        # Forms made in this run, which the cache may have no place for.
        self.forms: list[Form] = []
        # What the calls were made from, and that with what must hold for any run.
        self.unchanged = Unchanged()
        self.everything = Unchanged()
        self.precision = ""
        self.folded: list[tuple[Fused, weakref.ref[Form]]] = []

    def _views(self) -> dict[int, Tensor]:
        """The values in the arena."""
        blueprint = self.blueprint
        views: dict[int, Tensor] = {}
        for root, begin in blueprint.arena.items():
            seen = blueprint.seen_of(root)
            flat = self.arena[begin : begin + seen.bytes].view(seen.dtype)
            n, c, h, w = seen.shape
            views[root] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        for index, (root, first, channels) in blueprint.views.items():
            if root in views:
                views[index] = views[root].narrow(1, first, channels)
        return views

    def is_current(self, *, again: bool = False) -> bool:
        """Whether the calls are those of the weights as Python sees them now; `again`: and whether
        what must hold for any run does, in the same question.
        """
        facts = self.everything if again else self.unchanged
        if not self.calls or not facts.hold():
            return False
        for conv, reference in self.folded:
            form = reference()
            if form is None or not form.matches(*tensors_of(conv), self.precision):
                return False
        return True

    def prepare(self) -> None:
        """Bind the layers' forms as the weights and settings are now.

        Raises OutdatedError for layers that no longer are those of the blueprint.
        """
        self.forms = []
        self.calls = []
        self.precision = cpu_float32_precision()
        self.unchanged = Unchanged()
        self.unchanged.answer(cpu_float32_precision, self.precision)
        self.folded = []
        for layer in self.blueprint.layers:
            weight, bias = tensors_of(layer.conv)
            if not layer.takes(weight, bias):
                raise OutdatedError
            if weight is layer.conv._parameters["weight"]:
                self.unchanged.parameters(layer.conv)
            form = self.filters.form(
                layer.conv, weight, bias, layer.shape, layer.geometry, layer.slope
            )
            if form is None or form.output_shape != layer.result.shape:
                raise OutdatedError
            if weight is not layer.conv._parameters["weight"]:
                self.folded.append((layer.conv, weakref.ref(form)))
            self.forms.append(form)
        self.everything = Unchanged()
        self.everything.include(self.always)
        self.everything.include(self.unchanged)
        handles = [form.handle for form in self.forms]
        self.calls = [
            Call(segment, handles, self.views) if segment.step is None else None
            for segment in self.blueprint.segments
        ]

    def _call(self, number: int, given: tuple[Tensor, ...]) -> list[Tensor]:
        """The results of a segment."""
        while True:
            call = self.calls[number]
            assert call is not None
            results = call.run(given)
            if results is not None:
                return results
            # What Python does not see has changed: memory, or the number of threads; or another
            # thread has let go of a form.
            self.prepare()

    def run(self, inputs: Sequence[Any]) -> Any:
        """The model's output, once the frame is current."""
        blueprint = self.blueprint
        if blueprint.whole is not None:
            return self._call(0, tuple(inputs))[blueprint.whole]
        steps = blueprint.steps
        values: list[Any] = [None] * blueprint.values
        for (_, index), value in zip(steps.parameters, inputs, strict=True):
            values[index] = value
        for number, segment in enumerate(blueprint.segments):
            if segment.step is not None:
                values[segment.step.writes] = segment.step.run(values)
            else:
                for index, expected in segment.expects:
                    if see(values[index]) != expected:
                        return self._finish(segment.position, values)
                results = self._call(number, tuple(values[index] for index in segment.given))
                for (index, _, _), result in zip(segment.results, results, strict=True):
                    values[index] = result
                for index, root, first, channels in segment.slices:
                    values[index] = values[root].narrow(1, first, channels)
            for index in segment.drops:
                values[index] = None
        for index, transposed in blueprint.results:
            values[index] = values[transposed]
        output = fill(steps.output, values)
        return output if blueprint.formatted else contiguous_values(output)

    def _finish(self, position: int, values: list[Any]) -> Any:
        """The rest of a run whose shapes turned out to be other ones."""
        for place, view in self.views.items():
            if values[place] is None:
                values[place] = view
        for step in self.blueprint.steps.steps[position:]:
            values[step.writes] = step.run(values)
        for index in self.blueprint.steps.outputs & self.views.keys():
            if values[index] is self.views[index]:
                values[index] = values[index].clone()  # the next run writes there
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
