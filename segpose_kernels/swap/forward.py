# SPDX-License-Identifier: BSD-3-Clause
"""Forwards rewritten on the instance, for activations that are called as functions or shared.

There is a graph for training and one for evaluation, chosen by `self.training` at each call. What
else the forward read while it was traced is compared at each call; when something differs, the
class's own forward runs, which is right too, because its convolutions have kept their meaning.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import fx, nn

from . import activation as act
from .activation import Activation
from .eligible import why_not_plain
from .find import Pair
from .pieces import call_convolution
from .rewritable import why_not_rewritable
from .trace import AttributeCall, ForwardTrace, Missing, UntraceableError, trace_forward


class OwnForward:
    """A forward that `optimize` sets on an instance, over the class's own."""

    owner: nn.Module

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The class's own forward, for what reads a signature."""
        bound: Callable[..., Any] = type(self.owner).forward.__get__(self.owner)
        return bound

    @property
    def __code__(self) -> CodeType:
        """The class's own, for torch.export, which reads the argument names there."""
        return type(self.owner).forward.__code__


@dataclass(frozen=True)
class Fused:
    """An activation of the owner's, as a part or an attribute, that runs inside convolutions.

    `args` and `kwargs` are what the calls of an attribute pass beside the input.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    spec: Activation

    def holds(self, owner: nn.Module) -> bool:
        """Whether it is still that activation and nothing more."""
        value: Any = owner
        for name in self.path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, nn.Module):
            call = act.of_module(value) if not why_not_plain(value) else None
        else:
            call = act.of_function(value, self.args, dict(self.kwargs))
        return call is not None and call.spec == self.spec


class RewrittenForward(OwnForward):
    """Set as `forward` on an instance. Holds source text, so that it can be pickled."""

    def __init__(
        self,
        owner: nn.Module,
        sources: dict[bool, str],
        names: dict[str, str],
        reads: dict[str, Any],
        fused: Iterable[Fused],
    ) -> None:
        self.owner = owner
        self.sources = sources
        self.names = names
        self.reads = reads
        self.fused = list(dict.fromkeys(fused))
        # A forward may ask whether it has a part.
        self.parts = {name: module is None for name, module in owner._modules.items()}
        self.compiled: dict[bool, Callable[..., Any]] = {}
        self._compile()

    def _compile(self) -> None:
        for training, source in self.sources.items():
            scope = {name: _imported(path) for name, path in self.names.items()}
            exec(
                compile(source, f"<segpose_kernels {type(self.owner).__name__}.forward>", "exec"),
                scope,
            )
            self.compiled[training] = scope["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        forward = self.compiled[owner.training] if self._holds() else type(owner).forward
        return forward(owner, *args, **kwargs)

    def _holds(self) -> bool:
        owner = self.owner
        return (
            all(_same(getattr(owner, name, Missing), value) for name, value in self.reads.items())
            and all(
                (owner._modules.get(name) is None) == missing
                for name, missing in self.parts.items()
            )
            and all(fused.holds(owner) for fused in self.fused)
        )


def _same(value: Any, known: Any) -> bool:
    """Whether they are equal and of the same type."""
    if type(value) is not type(known):
        return False
    try:
        return bool(value == known)
    except (RuntimeError, ValueError):  # tensors in a list
        return False


def rewrite(pairs: list[Pair]) -> RewrittenForward:
    """A forward for the owner of `pairs` (all of its pairs to fuse, of both traces).

    Raises:
        UntraceableError: when the trace may not stand for every run; the message says why.
    """
    owner = pairs[0].trace.owner
    traces = {pair.trace.training: pair.trace for pair in pairs}
    for training in (True, False):
        if training not in traces:
            traces[training] = trace_forward(owner, pairs[0].trace.name, training)
    names: dict[str, str] = {}
    sources: dict[bool, str] = {}
    reads: dict[str, Any] = {}
    for training, trace in traces.items():
        reason = why_not_rewritable(trace)
        if reason:
            raise UntraceableError(reason)
        again = trace_forward(owner, trace.name, training, seed=1)
        if str(again.graph) != str(trace.graph):
            raise UntraceableError(
                "two traces of it differ: it depends on something beyond its inputs"
            )
        reads.update(trace.reads)
        sources[training] = _source(trace, [p for p in pairs if p.trace is trace], names)
    fused = (_fused(pair) for pair in pairs if pair.key is not None)
    return RewrittenForward(owner, sources, names, reads, fused)


def _fused(pair: Pair) -> Fused:
    assert pair.call.spec is not None
    node = pair.act_node
    if isinstance(node.target, AttributeCall):
        others = node.args[1:], tuple(node.kwargs.items())
        return Fused(node.target.attribute, *others, pair.call.spec)
    return Fused(str(node.target), (), (), pair.call.spec)


def _source(trace: ForwardTrace, pairs: list[Pair], names: dict[str, str]) -> str:
    """Python code of the graph with the pairs fused; adds the names it imports to `names`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(trace.graph, copies)
    graph.output(result)
    for pair in pairs:
        conv, activation = copies[pair.conv_node], copies[pair.act_node]
        spec = pair.call.spec
        assert spec is not None
        with graph.inserting_before(conv):
            module = graph.create_node("get_attr", str(conv.target))
            fused = graph.call_function(
                call_convolution,
                (module, *conv.args),
                {**conv.kwargs, "activation": spec.name, "negative_slope": spec.negative_slope},
            )
        activation.replace_all_uses_with(fused)
        graph.erase_node(activation)
        for reader in list(conv.users):  # what is left reads the shape, or is the folded BatchNorm
            if reader is copies.get(pair.tail):
                reader.replace_all_uses_with(fused)
                graph.erase_node(reader)
        conv.replace_all_uses_with(fused)
        graph.erase_node(conv)
    for node in list(graph.nodes):
        node.type = None  # annotations name types that nothing here needs
        if isinstance(node.target, AttributeCall):
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", node.target.attribute)
                call = graph.call_method("__call__", (attribute, *node.args), dict(node.kwargs))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    graph.lint()
    code = graph.python_code("self")
    for name, value in code.globals.items():
        path = _import_path(value)
        if path is None:
            raise UntraceableError(f"it calls {name}, which has no importable name")
        names[name] = path
    return code.src


def _import_path(value: Any) -> str | None:
    if inspect.ismodule(value):
        return f"{value.__name__}:"
    if value is None or value is type(None):
        return "builtins:None" if value is None else "types:NoneType"
    if isinstance(value, float):  # fx offers the two that have no literal
        return "math:inf" if math.isinf(value) else "math:nan"
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    for module in (
        getattr(value, "__module__", None),
        "torch",
        "torch.nn.functional",
        "torch._C._nn",
        "operator",
    ):
        if module and name:
            path = f"{module}:{name}"
            try:
                if _imported(path) is value:
                    return path
            except (ImportError, AttributeError):
                continue
    return None


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    value: Any = importlib.import_module(module)
    if path == "builtins:None":
        return None
    for part in name.split(".") if name else []:
        value = getattr(value, part)
    return value
