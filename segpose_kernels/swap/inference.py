# SPDX-License-Identifier: BSD-3-Clause
"""The forward that `optimize(mode="inference")` sets on a model whose graph can be written out."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import keep_workspace
from .blueprint import Blueprint
from .eligible import FUSED_TYPES
from .filters import FilterCache, is_unwatched, watchers
from .find import has_forward
from .flatten import Guards, flatten
from .forward import OwnForward
from .frames import Frame, OutdatedError, first_run
from .journal import Journal, journal_of
from .layout import contiguous_outputs, is_contiguous, is_image
from .steps import CatStep, ConvStep, PoolStep, Steps, make_steps
from .trace import PLAIN, UntraceableError
from .unchanged import Unchanged

# Kinds of input whose placement is remembered, and bytes of arenas that wait for the next run.
SIGNATURES = 64
IDLE_BYTES = 256 << 20

Signature = tuple[Any, ...]


class Program:
    """A model's steps, with a blueprint and idle frames for each signature of inputs."""

    def __init__(self, model: nn.Module, filters: FilterCache) -> None:
        # Imported here: without a build of the native code everything else of the package works.
        from .. import _calls

        self._layouts = _calls.layouts
        flat = flatten(model)
        self.filters = filters
        self.guards: Guards = flat.guards
        # What must hold for a run without gradients.
        self.always = Unchanged()
        self.always.include(watchers())
        self.always.include(self.guards)
        self.always.equal(model, "training", False)
        self.always.answer(torch.is_grad_enabled, False)
        self.steps: Steps = make_steps(flat)
        self._lock = threading.Lock()
        # The signature used last comes first. Replaced as a whole: others read it without the lock.
        self._blueprints: list[tuple[Signature, Blueprint]] = []
        self._idle: list[Frame] = []
        keep_workspace(self)

    def run(self, inputs: Sequence[Any], signature: Signature) -> Any:
        """The model's output; the inputs are those of the signature."""
        blueprint = self._blueprint_of(signature)
        if blueprint is not None:
            frame = self._take(blueprint)
            try:
                if not frame.is_current():
                    frame.prepare()
                frame.layouts = self._layouts(tuple(inputs))
                return self._run(frame, inputs)
            except OutdatedError:
                pass  # written anew below
        contiguous = signature[0]
        output, seen = first_run(self.steps, inputs, contiguous=contiguous)
        self._put_first(signature, Blueprint(self.steps, seen, contiguous=contiguous))
        return output

    def run_again(self, inputs: tuple[Any, ...]) -> tuple[Any] | None:
        """The output in a tuple, if everything is as in the run before, these inputs alike."""
        # The frame used last, mostly. A lock would take longer than all of this.
        try:
            frame = self._idle.pop()
        except IndexError:
            return None
        known = frame.layouts
        if known is not None and known == self._layouts(inputs) and frame.is_current(again=True):
            try:
                return (self._run(frame, inputs),)
            except OutdatedError:
                return None
        self._idle.append(frame)
        return None

    def _run(self, frame: Frame, inputs: Sequence[Any]) -> Any:
        try:
            return frame.run(inputs)
        finally:
            if frame.calls:  # there are none for layers that are outdated
                self._give_back(frame)

    def _blueprint_of(self, signature: Signature) -> Blueprint | None:
        for position, (known, blueprint) in enumerate(self._blueprints):
            if known == signature:
                if position > 0:
                    self._put_first(signature, blueprint)
                return blueprint
        return None

    def _put_first(self, signature: Signature, blueprint: Blueprint) -> None:
        with self._lock:
            others = [entry for entry in self._blueprints if entry[0] != signature]
            self._blueprints = [(signature, blueprint), *others[: SIGNATURES - 1]]

    def _take(self, blueprint: Blueprint) -> Frame:
        for frame in reversed(self._idle.copy()):
            if frame.blueprint is blueprint and self._remove(frame):
                return frame
        return Frame(blueprint, self.filters, self.always)

    def _remove(self, frame: Frame) -> bool:
        """Whether it was idle and nobody else got it: lists do one thing at a time."""
        try:
            self._idle.remove(frame)
        except ValueError:
            return False
        return True

    def _give_back(self, frame: Frame) -> None:
        """Keep the frames used last, within the bound."""
        frame.forms.clear()
        self._idle.append(frame)
        if len(self._idle) == 1 and frame.blueprint.arena_bytes <= IDLE_BYTES:
            return
        kept = 0
        for frame in reversed(self._idle.copy()):
            kept += frame.blueprint.arena_bytes
            if kept > IDLE_BYTES:
                self._remove(frame)

    def release(self) -> int:
        """Free the arenas that wait for the next run; gives their bytes."""
        idle, self._idle = self._idle, []
        return sum(frame.blueprint.arena_bytes for frame in idle)

    def notes(self) -> dict[str, str]:
        """Of the signature used last: what was done with each convolution, by name."""
        blueprints = self._blueprints
        return blueprints[0][1].notes() if blueprints else {}

    def __str__(self) -> str:
        counts = [
            (sum(isinstance(step, kind) for step in self.steps.steps), name)
            for kind, name in (
                (ConvStep, "convolution"),
                (PoolStep, "max-pool"),
                (CatStep, "concatenation"),
            )
        ]
        rest = len(self.steps.steps) - sum(count for count, _ in counts)
        counts.append((rest, "other operation"))
        return ", ".join(f"{n} {name}{'s' if n != 1 else ''}" for n, name in counts if n)


class InferenceForward(OwnForward):
    """Set as `forward` on an instance: runs the model's program while no gradient is needed.

    Everything else runs as before: training mode, autograd, autocast, torch.compile, torch.func,
    other devices, and a model that has changed since. Copies and pickles hold no program; they
    write theirs out at their first call.
    """

    def __init__(
        self,
        owner: nn.Module,
        inner: Callable[..., Any] | None,
        filters: FilterCache,
        *,
        outermost: bool,
    ) -> None:
        self.owner = owner
        self.inner = inner
        self.filters = filters
        # The caller of the model gets contiguous results for contiguous inputs.
        self.outermost = outermost
        self.program: Program | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "program": None}

    def build(self) -> Program:
        """Write the model out. Raises UntraceableError with the reason where that is unsafe."""
        program = self.program
        if program is None:
            program = self.program = Program(self.owner, self.filters)
        return program

    def notes(self) -> dict[str, str]:
        """What the last run without gradients did with each convolution, by name."""
        return self.program.notes() if self.program is not None else {}

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The forward without a program, module by module."""
        if self.inner is not None:
            output = self.inner(*args, **kwargs)
        else:
            output = type(self.owner).forward(self.owner, *args, **kwargs)
        return contiguous_outputs(self.owner, args, kwargs, output) if self.outermost else output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        program = self.program
        if program is not None and not kwargs:
            output = program.run_again(args)
            if output is not None:
                return output[0]
        if self.owner.training or not is_unwatched():
            return self.plain(*args, **kwargs)
        try:
            program = self.build()
        except UntraceableError:  # a copy that was changed: its modules are right
            return self.plain(*args, **kwargs)
        inputs = self._bind(program, args, kwargs)
        signature = _signature(inputs, self.outermost) if inputs is not None else None
        if inputs is None or signature is None or not program.guards.hold():
            return self.plain(*args, **kwargs)
        if torch.is_grad_enabled() and self._needs_gradient(inputs):
            return self.plain(*args, **kwargs)
        return program.run(inputs, signature)

    def _bind(
        self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sequence[Any] | None:
        """The arguments in the program's order; None for a call that the forward would reject."""
        parameters = program.steps.parameters
        if not kwargs and len(args) == len(parameters):
            return args
        try:
            bound = inspect.signature(type(self.owner).forward).bind(self.owner, *args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return [bound.arguments[name] for name, _ in parameters]

    def _needs_gradient(self, inputs: Sequence[Any]) -> bool:
        return any(isinstance(x, Tensor) and x.requires_grad for x in inputs) or any(
            parameter.requires_grad for parameter in self.owner.parameters()
        )


def _signature(inputs: Sequence[Any], outermost: bool) -> Signature | None:
    """What the placement of values may depend on, first whether results have to be contiguous;
    None for inputs that it is not made for.
    """
    contiguous = outermost
    parts: list[Any] = []
    for x in inputs:
        if type(x) is Tensor:
            if x.layout is not torch.strided or not x.is_cpu:
                return None
            parts += (x.shape, x.dtype)
            contiguous = contiguous and (not is_image(x) or is_contiguous(x))
        elif isinstance(x, PLAIN):
            parts += (type(x), x)
        else:
            return None
    return contiguous, *parts


def install(journal: Journal, filters: FilterCache, *, wrapped: bool) -> None:
    """Set an `InferenceForward` on the model, or on the largest parts of it that have a graph."""
    report = journal.report
    if report.memory_format != "channels_last":
        report.graphs[""] = "module by module: it does not run in channels_last"
    elif wrapped:
        report.graphs[""] = "module by module: DataParallel copies modules without their forwards"
    else:
        _install(journal, journal.owner, "", filters)


def _install(journal: Journal, module: nn.Module, name: str, filters: FilterCache) -> None:
    if isinstance(module, FUSED_TYPES) or not any(
        isinstance(part, FUSED_TYPES) for part in module.modules()
    ):
        return
    if has_forward(module):
        inner = vars(module).get("forward")
        forward = InferenceForward(module, inner, filters, outermost=module is journal.owner)
        try:
            program = forward.build()
        except UntraceableError as error:
            journal.report.graphs[name] = f"module by module: {error}"
        else:
            journal.set_forward(module, forward)
            if forward.outermost:
                journal.unhook()  # its results are contiguous already
            journal.report.graphs[name] = f"one graph: {program}"
            return
    for attribute, child in module.named_children():
        _install(journal, child, f"{name}.{attribute}".strip("."), filters)


def prepared_bytes(model: nn.Module) -> int:
    """Bytes of the filters that a model holds packed for inference, see `optimize`; 0 for others.

    They come on top of the parameters, and go with the model or with `restore`.
    """
    caches = {
        id(journal.report.filters): journal.report
        for journal in map(journal_of, model.modules())
        if journal is not None
    }
    return sum(report.prepared_bytes for report in caches.values())
