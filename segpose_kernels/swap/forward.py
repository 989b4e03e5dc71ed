# SPDX-License-Identifier: BSD-3-Clause
"""Forwards rewritten on the instance, for activations that are called as functions or shared.

There is a graph for training and one for evaluation, chosen by `self.training` at each call. What
else the forward read while it was traced is compared at each call; when something differs, the
class's own forward runs, which is right too, because its convolutions have kept their meaning.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import fx, nn

from .find import Pair
from .pieces import call_convolution
from .source import FunctionView, has_branches, view_of
from .trace import PLAIN, AttributeCall, ForwardTrace, UntraceableError, trace_forward

_MISSING = object()
# Changing a list or dict that the forward made itself is part of the graph.
_BUILDERS = frozenset({"append", "extend", "insert", "update", "setdefault", "pop", "reverse"})


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


class RewrittenForward(OwnForward):
    """Set as `forward` on an instance. Holds source text, so that it can be pickled."""

    def __init__(
        self,
        owner: nn.Module,
        sources: dict[bool, str],
        names: dict[str, str],
        reads: dict[str, Any],
    ) -> None:
        self.owner = owner
        self.sources = sources
        self.names = names
        self.reads = reads
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
        for name, value in self.reads.items():
            if getattr(owner, name, _MISSING) != value:
                return type(owner).forward(owner, *args, **kwargs)
        return self.compiled[owner.training](owner, *args, **kwargs)


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
    return RewrittenForward(owner, sources, names, reads)


def why_not_rewritable(trace: ForwardTrace) -> str:
    """Why the graph may not do what the forward does in every run; empty if it does."""
    if hasattr(type(trace.owner).forward, "__wrapped__"):
        return "its forward is decorated"
    if trace.constants:
        return "it makes tensors that a graph would freeze"
    if trace.stashed:
        return f"it stores a value in self.{next(iter(trace.stashed.values()))}"
    if trace.opaque_reads:
        return f"it reads self.{min(trace.opaque_reads)}, whose content may change"
    if any(site.modes != trace.modes for site in trace.sites.values()):
        return "it changes the grad or autocast mode"
    codes = {inspect.unwrap(type(trace.owner).forward).__code__}
    codes |= {code for site in trace.sites.values() for code, _ in site.frames}
    for code in sorted(codes, key=lambda code: code.co_firstlineno):
        view = None if code.co_name.startswith("<") else view_of(code)
        if view is None:
            if has_branches(code):
                return f"{code.co_name}() branches and its source cannot be read"
            continue
        reason = _why_not_plain_code(view) or _unguarded_read(view, trace.owner)
        if reason:
            return f"{code.co_name}() {reason}"
    return ""


def _why_not_plain_code(view: FunctionView) -> str:
    self_name = view.node.args.args[0].arg if view.node.args.args else ""
    made = {
        node.id
        for node in ast.walk(view.node)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for node in (inner for statement in view.node.body for inner in ast.walk(statement)):
        tests: list[ast.expr] = []
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            tests = [node.test]
        elif isinstance(node, ast.BoolOp):
            tests = list(node.values[:-1])
        elif isinstance(node, ast.comprehension):
            tests = node.ifs
        for test in tests:
            if not _reads_only_self(test, self_name):
                return f"branches on {ast.unparse(test)}"
        if isinstance(
            node,
            (
                ast.With,
                ast.Try,
                ast.Match,
                ast.Global,
                ast.Nonlocal,
                ast.Yield,
                ast.Await,
                ast.Raise,
            ),
        ):
            return f"has a {type(node).__name__.lower()} statement"
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
            if any(
                isinstance(part, ast.Attribute) for target in targets for part in ast.walk(target)
            ):
                return f"sets {ast.unparse(targets[0])}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            if not (
                isinstance(function, ast.Attribute)
                and function.attr in _BUILDERS
                and _root_name(function.value) in made
            ):
                return f"calls {ast.unparse(function)}() for its effect"
    return ""


def _root_name(node: ast.expr) -> str:
    """The variable that `x`, `x[...]` and `x[...][...]` begin with; empty for anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _unguarded_read(view: FunctionView, owner: nn.Module) -> str:
    """Plain data that a graph freezes and no call compares: of a child, or a variable global."""
    for mention in view.mentions:
        child = owner._modules.get(mention.chain[0]) if len(mention.chain) > 1 else None
        if child is None or mention.chain[1] not in vars(child):
            continue
        if isinstance(vars(child)[mention.chain[1]], PLAIN):
            return f"reads self.{'.'.join(mention.chain)}"
    scope = getattr(inspect.unwrap(type(owner).forward), "__globals__", {})
    for node in ast.walk(view.node):
        if not isinstance(node, ast.Name) or node.id.isupper() or node.id.startswith("__"):
            continue
        if isinstance(node.ctx, ast.Load) and isinstance(scope.get(node.id), (bool, int, float)):
            return f"reads the global {node.id}"
    return ""


def _reads_only_self(test: ast.expr, self_name: str) -> bool:
    """Whether a condition reads only constants and what is compared at each call."""
    for node in ast.walk(test):
        if isinstance(node, ast.Name) and node.id != self_name:
            return False
        if isinstance(node, (ast.Call, ast.Subscript, ast.NamedExpr, ast.Lambda)):
            return False
        if isinstance(node, ast.Attribute) and not isinstance(node.value, ast.Name):
            return False
    return True


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
