# SPDX-License-Identifier: BSD-3-Clause
"""What else a forward might run: it is traced again with other values of what it reads.

A number, name or list on the module may choose its layers (`self.heads[self.task]`). A trace shows
the choice of now. Traces with other values show the others, and count as uses like it does. What
chooses from elsewhere, such as an object of the user's, cannot be tried, and the source tells.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from .hidden import lookup
from .links import LOOP_HELPERS
from .rewritable import MISSING, Text, codes_of, is_plain_function, own_code, unguarded_read
from .source import has_branches, view_of, view_self
from .trace import ForwardTrace, UntraceableError, trace_forward

# Traces of one forward, in one mode; a trace takes a few milliseconds.
_TRIES = 256
# Entries of a list up to which each is tried with other values, beside lists of one.
_SHORT = 4


def explore(traces: list[ForwardTrace]) -> tuple[list[ForwardTrace], str]:
    """Traces that differ from those of the model as it is, and why there may be more."""
    found: list[ForwardTrace] = []
    shapes: list[Any] = []
    if reason := next((reason for trace in traces if (reason := _why_not_tried(trace))), ""):
        return [], reason
    for trace in traces:
        if _shape(trace) in shapes:  # training makes no difference
            continue
        shapes.append(_shape(trace))
        tries = _Tries(trace)
        tries.try_all()
        found += [other for _, other in tries.found]
        if tries.left <= 0:
            return found, f"self.{', self.'.join(tries.choosing)} choose among too many layers"
    return found, next((reason for trace in traces if (reason := _why_unseen(trace))), "")


def _why_not_tried(trace: ForwardTrace) -> str:
    """A loop until something happens may never end with another value."""
    for code in codes_of(trace):
        view = view_of(code)
        if view is not None and any(isinstance(node, ast.While) for node in ast.walk(view.node)):
            return f"a while loop in {code.co_name}() decides what runs"
    return ""


class _Tries:
    """Traces of one forward with other values, those that differ from the one it begins with."""

    def __init__(self, trace: ForwardTrace) -> None:
        self.trace = trace
        self.shape = _shape(trace)
        self.left = _TRIES
        self.found: list[tuple[dict[str, Any], ForwardTrace]] = []
        # For each attribute that matters, the values that showed it.
        self.choosing: dict[str, list[Any]] = {}

    def matters(self, given: dict[str, Any]) -> bool:
        """Whether something else runs with these values, or they find nothing to run."""
        trace = self.trace
        self.left -= 1
        if self.left <= 0:
            return False
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # a forward may print
                other = trace_forward(trace.owner, trace.name, trace.training, given=given)
        except UntraceableError as error:
            return isinstance(error.__cause__, (LookupError, AttributeError))
        if _shape(other) == self.shape:
            return False
        self.found.append((given, other))
        return True

    def try_all(self) -> None:
        """Each attribute with every value, and those that matter together in pairs."""
        for attribute, value in self.trace.reads.items():
            showing = [one for one in _probes(value) if self.matters({attribute: one})]
            if showing:
                self.choosing[attribute] = showing
                for one in _others(self.trace, value):
                    self.matters({attribute: one})
        for (first, ones), (second, others) in itertools.combinations(self.choosing.items(), 2):
            for one, other in itertools.product(ones, others):
                self.matters({first: one, second: other})
        for given, trace in self.found.copy():
            for attribute in trace.reads.keys() - self.trace.reads.keys() - given.keys():
                for one in _probes(trace.reads[attribute]):
                    self.matters({**given, attribute: one})


def _shape(trace: ForwardTrace) -> list[tuple[Any, ...]]:
    """What runs, without the plain numbers that are passed along."""
    place = {node: index for index, node in enumerate(trace.graph.nodes)}
    return [
        (node.op, str(node.target), *(place[source] for source in node.all_input_nodes))
        for node in trace.graph.nodes
    ]


def _probes(value: Any) -> list[Any]:
    """A few values that show whether it matters which one it is."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 0]
    if isinstance(value, float):
        return [0.0, 2 * value + 1]
    if isinstance(value, str):
        return [value + "?"]
    if isinstance(value, (tuple, list)) and value:
        kind = type(value)
        return [kind(reversed(value)), value[:-1], *(kind([one]) for one in value[:1])]
    return []


def _others(trace: ForwardTrace, value: Any) -> Iterator[Any]:
    """Every value that could choose something else."""
    containers = [module for module in trace.owner._modules.values() if module is not None]
    if isinstance(value, (bool, float)):
        return
    if isinstance(value, int):
        yield from range(1, max(len(m._modules) for m in (trace.owner, *containers)) + 1)
    elif isinstance(value, str):
        yield from _alternatives(trace, value)
        yield from dict.fromkeys(name for module in containers for name in module._modules)
    elif value:
        kind = type(value)
        yield kind()
        for one in dict.fromkeys(_others(trace, value[0])):
            yield kind([one])
            for place in range(len(value)) if len(value) <= _SHORT else ():
                yield kind([*value[:place], one, *value[place + 1 :]])


def _alternatives(trace: ForwardTrace, name: str) -> Iterator[str]:
    """Parts that may stand where the one of that name does: of its type, or not running now."""
    parts = trace.owner._modules
    running = set(trace.called.values())
    for other, module in parts.items():
        if module not in running or type(module) is type(parts.get(name)):
            yield other


def _why_unseen(trace: ForwardTrace) -> str:
    """Why what is chosen cannot be tried; empty if nothing is."""
    own = own_code(trace)
    inner = {part for code in own for part in code.co_consts if isinstance(part, CodeType)}
    for code in trace.handed - own - inner:
        if has_branches(code):
            return f"{code.co_name}(), which is given modules, branches"
    texts = [
        Text(view, scope, trace.owner, view_self(view) if code in own else "")
        for code, scope in codes_of(trace).items()
        if (view := view_of(code)) is not None
    ]
    source = ""
    if trace.draws:
        source = "random numbers"
    elif trace.opaque_reads:
        source = f"self.{min(trace.opaque_reads)}"
    else:
        source = next((reason for text in texts if (reason := unguarded_read(text))), "")
        source = source.removeprefix("reads ")
    if source:
        for text in texts:
            if choice := _selection(text):
                return f"{source} may choose what {choice} is"
    return ""


def _selection(text: Text) -> str:
    """An expression that may give another layer, or another number of them, in another run."""
    counters: set[str] = set()
    for node in text.nodes():
        if isinstance(node, (ast.For, ast.comprehension)) and _is_whole(node.iter, text):
            counters |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    for node in text.nodes():
        parts: list[ast.expr] = []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            parts = [node.slice]
        elif isinstance(node, (ast.For, ast.comprehension)):
            parts = [] if _is_whole(node.iter, text) or _is_local(node.iter) else [node.iter]
        elif isinstance(node, ast.Call):
            called = text.value_of(node.func)
            if called is getattr or called is range:
                parts = node.args[called is getattr :]
            elif (
                called is not MISSING
                and not is_plain_function(called)
                and any(_is_whole(argument, text) for argument in node.args)
            ):
                return ast.unparse(node)  # such as random.choice(self.layers)
        if any(_varies(part, counters) for part in parts):
            return ast.unparse(node.iter if isinstance(node, ast.comprehension) else node)
    return ""


def _is_local(node: ast.expr) -> bool:
    return isinstance(node, ast.Name)


def _is_whole(node: ast.expr, text: Text) -> bool:
    """Whether an iterable is a container of modules, all of it, or counts one."""
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute):  # self.layers.values()
            return not node.args and _is_whole(function.value, text)
        return (
            isinstance(function, ast.Name)
            and function.id in LOOP_HELPERS
            and any(_is_whole(argument, text) for argument in node.args)
            and not any(isinstance(argument, ast.BinOp) for argument in node.args)
        )
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id != text.self_name:
        return False
    value: Any = text.owner
    for attribute in chain:
        value = lookup(value, attribute) if isinstance(value, nn.Module) else None
    return isinstance(value, nn.Module)


def _varies(part: ast.expr, counters: set[str]) -> bool:
    """Whether an index or a number is more than a constant or the count of a loop."""
    names = [node for node in ast.walk(part) if isinstance(node, (ast.Name, ast.Attribute))]
    return any(
        isinstance(node, ast.Attribute) or node.id not in counters | {"len", "str"}
        for node in names
    ) and not _is_length(part)


def _is_length(part: ast.expr) -> bool:
    return isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "len"
