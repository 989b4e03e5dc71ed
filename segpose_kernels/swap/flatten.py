# SPDX-License-Identifier: BSD-3-Clause
"""An optimized model in one mode as a flat list of operations, its own forwards written out.

What a forward does may depend on more than its inputs. So each forward that is written out must
have passed the tests of `rewritable.why_not_rewritable`, and what it read while it was traced goes
into `Guards`, which are looked at before every run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .eligible import CALL_HOOKS, CONV_ATTRIBUTES, FUSED_TYPES, has_call_hooks
from .find import has_forward
from .forward import OwnForward
from .pieces import INFERENCE_TYPES, AbsorbedActivation, AbsorbedCall, FoldedBatchNorm2d
from .rewritable import why_not_rewritable
from .trace import AttributeCall, ForwardTrace, Missing, UntraceableError, trace_forward
from .unchanged import Unchanged

_IDENTITIES = (AbsorbedActivation, FoldedBatchNorm2d, nn.Identity)
# Modules whose calls steps may replace, with what decides how. Of these types, not of subclasses.
_REPLACED: dict[type, tuple[str, ...]] = {
    **dict.fromkeys((*FUSED_TYPES, *INFERENCE_TYPES), CONV_ATTRIBUTES),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.LeakyReLU: ("negative_slope",),
    nn.ReLU: (),
}
# Tables of hooks that run with every module's call.
_GLOBAL_HOOKS = tuple(
    name
    for name, table in vars(nn.modules.module).items()
    if name.startswith("_global_") and "ward" in name and isinstance(table, dict)
)


@dataclass(frozen=True)
class Value:
    """Stands for the result of an operation, by its number, among the arguments of others."""

    index: int


def values_in(template: Any) -> Iterator[Value]:
    """The values in nested arguments, in order."""
    if isinstance(template, Value):
        yield template
    elif isinstance(template, slice):
        yield from values_in((template.start, template.stop, template.step))
    elif isinstance(template, dict):
        yield from values_in(tuple(template.values()))
    elif isinstance(template, (tuple, list)):
        for item in template:
            yield from values_in(item)


@dataclass(eq=False)
class Operation:
    """One call. `target` is a module that steps may replace, a function, or the name of a method of
    the first argument.
    """

    result: Value
    target: nn.Module | Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str

    @property
    def inputs(self) -> list[Value]:
        """The values it reads, in order, repetitions included."""
        return list(values_in((self.args, self.kwargs)))


class Guards(Unchanged):
    """What must not have changed since the model was written out."""

    def __init__(self) -> None:
        super().__init__()
        for hooks in _GLOBAL_HOOKS:
            self.empty(nn.modules.module, hooks)

    def watch_call(self, module: nn.Module) -> None:
        """A call that is replaced: nobody must want to see or change it."""
        self.same(vars(module), "forward")
        self.same(vars(module), "_compiled_call_impl")
        for hooks in CALL_HOOKS:
            self.empty(module, hooks)


@dataclass
class FlatModel:
    """Operations in order. `parameters` are the forward's arguments, with their values by number;
    `output` is what it returns, with `Value`s in the places of tensors. `calls_code`: whether the
    forwards may have called functions that are neither theirs nor torch's.
    """

    parameters: list[tuple[str, Value]]
    operations: list[Operation]
    output: Any
    guards: Guards
    values: int
    calls_code: bool


def flatten(model: nn.Module, *, training: bool = False) -> FlatModel:
    """Write out `model.forward` in that mode, and those of its children where that is safe.

    Raises:
        UntraceableError: when the model's own forward cannot be written out; the message says why.
    """
    return _Flattener(model, training).result


class _Flattener:
    def __init__(self, model: nn.Module, training: bool) -> None:
        self.training = training
        self.operations: list[Operation] = []
        self.guards = Guards()
        self.values = 0
        self.calls_code = False
        trace = _trace(model, "", training)
        parameters = [(name, self.new_value()) for name in _parameters(trace)]
        output = self.inline(trace, "", [value for _, value in parameters])
        self.result = FlatModel(
            parameters, self.operations, output, self.guards, self.values, self.calls_code
        )

    def new_value(self) -> Value:
        self.values += 1
        return Value(self.values - 1)

    def add(self, target: Any, args: Any, kwargs: Any, name: str) -> Value:
        operation = Operation(self.new_value(), target, tuple(args), dict(kwargs), name)
        self.operations.append(operation)
        return operation.result

    def inline(self, trace: ForwardTrace, prefix: str, arguments: list[Any]) -> Any:
        """Append a forward's operations; gives what it returns."""
        owner = trace.owner
        self.guards.equal(owner, "training", self.training)
        # A Sequential calls whatever it holds.
        self.guards.values(owner, "_modules")
        for name, value in vars(owner).items():
            if isinstance(value, AbsorbedCall):
                self.guards.same(vars(owner), name)
        own = getattr(type(owner).forward, "__code__", None)
        self.calls_code |= trace.entered is None or any(code is not own for code in trace.entered)
        for name, value in trace.reads.items():
            if value is Missing:
                self.guards.answer(functools.partial(hasattr, owner, name), False)
            else:
                self.guards.equal(owner, name, value)
        inputs = iter(arguments)
        env: dict[fx.Node, Any] = {}
        for node in trace.graph.nodes:
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            name = f"{prefix}.{node.target}".strip(".")
            if node.op == "placeholder":
                env[node] = next(inputs)
            elif node.op == "output":
                return args[0]
            elif node.op == "get_attr":
                env[node] = self.add(_Attribute(owner, str(node.target)), (), {}, name)
            elif node.op == "call_module":
                env[node] = self.call(trace.called[node], name, args, kwargs)
                self.watch_path(owner, str(node.target))
            elif isinstance(node.target, AttributeCall):
                env[node] = self.add(node.target.function, args, kwargs, name)
                self.guards.equal(owner, node.target.attribute, node.target.function)
            else:
                env[node] = self.add(node.target, args, kwargs, prefix)
        raise UntraceableError("its graph returns nothing")

    def watch_path(self, owner: nn.Module, path: str) -> None:
        for name in path.split("."):
            child = owner._modules[name]
            assert child is not None
            self.guards.values(owner, "_modules")
            owner = child

    def call(self, module: nn.Module, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A child's call: written out, left away, or one operation."""
        does_more = has_call_hooks(module) or "forward" in vars(module)
        if type(module) in _IDENTITIES and not does_more and len(args) == 1 and not kwargs:
            self.guards.watch_call(module)
            self.guards.equal(module, "training", self.training)
            return args[0]
        if type(module) in _REPLACED and not does_more:
            self.guards.watch_call(module)
            for attribute in _REPLACED[type(module)]:
                if hasattr(module, attribute):
                    self.guards.equal(module, attribute, getattr(module, attribute))
            return self.add(module, args, kwargs, name)
        if not has_forward(module) or has_call_hooks(module):
            return self.add(module.__call__, args, kwargs, name)
        try:
            trace = _trace(module, name, self.training)
            arguments = _bind(trace, args, kwargs)
        except UntraceableError:
            return self.add(module.__call__, args, kwargs, name)
        self.guards.watch_call(module)
        return self.inline(trace, name, arguments)


@dataclass(frozen=True)
class _Attribute:
    """Reads a parameter, buffer or other attribute anew in every run."""

    owner: nn.Module
    path: str

    def __call__(self) -> Any:
        value: Any = self.owner
        for name in self.path.split("."):
            value = getattr(value, name)
        return value


def _trace(module: nn.Module, name: str, training: bool) -> ForwardTrace:
    own = vars(module).get("forward")
    if own is not None and not isinstance(own, OwnForward):
        raise UntraceableError("its forward is set on the instance")
    trace = trace_forward(module, name, training)
    reason = why_not_rewritable(trace)
    if reason:
        raise UntraceableError(reason)
    if str(trace_forward(module, name, training, seed=1).graph) != str(trace.graph):
        raise UntraceableError("two traces of it differ: it depends on something beyond its inputs")
    return trace


def _parameters(trace: ForwardTrace) -> list[str]:
    names = [str(node.target) for node in trace.graph.nodes if node.op == "placeholder"]
    if any(name.startswith("*") for name in names):
        raise UntraceableError("its forward takes a variable number of arguments")
    return names


def _bind(trace: ForwardTrace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call in the order of the graph's placeholders."""
    names = _parameters(trace)
    try:
        bound = inspect.signature(type(trace.owner).forward).bind(trace.owner, *args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UntraceableError(str(error)) from error
    bound.apply_defaults()
    return [bound.arguments[name] for name in names]
