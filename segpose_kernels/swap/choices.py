# SPDX-License-Identifier: BSD-3-Clause
"""What else a forward might run: it is traced again with other values of what it reads.

A number, name or list on the module may choose its layers (`self.heads[self.task]`). A trace shows
the choice of now. Traces with other values show the others, and count as uses like it does. What
chooses from elsewhere, such as an object of the user's, cannot be tried, and the source tells. So
it does for layers that could be chosen and run in none of the traces.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import itertools
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from .contents import Contents
from .rewritable import MISSING, Text, codes_of, is_plain_function, own_code, unguarded_read
from .selections import module_at, selecting, selections
from .source import has_branches, view_of, view_self
from .trace import ForwardTrace, Missing, UntraceableError, trace_forward

# Traces of one forward, in one mode; a trace takes a few milliseconds.
_TRIES = 256
# Iterators that go on for ever.
_ENDLESS = frozenset({"count", "cycle", "repeat"})
# Strings in the code that are longer are no names.
_LONG = 40
# What they tell of the input is asked for elsewhere.
_STEADY: tuple[Any, ...] = (isinstance, issubclass, hasattr, getattr, callable, print, id, repr)
# Entries of a list up to which each is tried with other values, beside lists of one.
_SHORT = 4


def explore(traces: list[ForwardTrace]) -> tuple[list[ForwardTrace], str]:
    """Traces that differ from those of the model as it is, and why there may be more."""
    found: list[ForwardTrace] = []
    shapes: list[Any] = []
    texts = [text for trace in traces for text in _texts(trace)]
    if traces and not any(selections(text) for text in texts):
        # What the forward runs is written in it, and conditions are looked at elsewhere.
        return [], next((reason for trace in traces if (reason := _why_unseen(trace))), "")
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
    ran = traces + found
    reason = next((reason for trace in ran if (reason := _why_unseen(trace))), "")
    return found, reason or _why_not_all_ran(ran)


def _texts(trace: ForwardTrace) -> list[Text]:
    """The source of all code that ran."""
    own = own_code(trace)
    return [
        Text(view, scope, trace.owner, view_self(view) if code in own else "")
        for code, scope in codes_of(trace).items()
        if (view := view_of(code)) is not None
    ]


def _why_not_tried(trace: ForwardTrace) -> str:
    """A loop until something happens may never end with another value."""
    for code in codes_of(trace):
        view = view_of(code)
        for node in ast.walk(view.node) if view is not None else ():
            if isinstance(node, ast.While):
                return f"a while loop in {code.co_name}() decides what runs"
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.rpartition(".")[2] in _ENDLESS:
                return f"{name}() in {code.co_name}() has no end"
    return ""


class _Tries:
    """Traces of one forward with other values, those that differ from the one it begins with."""

    def __init__(self, trace: ForwardTrace) -> None:
        self.trace = trace
        self.shape = _shape(trace)
        self.contents = Contents(trace.owner)
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
            other = trace_forward(
                trace.owner,
                trace.name,
                trace.training,
                given=given,
                arguments=trace.arguments,
                contents=self.contents,
            )
        except UntraceableError as error:
            return isinstance(error.__cause__, (LookupError, AttributeError))
        except SystemExit:
            return False
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
    if value is None or value is Missing:
        return [True, 1, "?"]
    if isinstance(value, enum.Enum):
        return [one for one in type(value) if one is not value]
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
    containers = _containers(trace)
    names = dict.fromkeys(name for module in containers for name in module._modules)
    if isinstance(value, (bool, float, enum.Enum)):
        return
    if value is None or value is Missing:
        yield from range(2, max(len(m._modules) for m in (trace.owner, *containers)) + 1)
        yield from names
    elif isinstance(value, int):
        yield from range(1, max(len(m._modules) for m in (trace.owner, *containers)) + 1)
        for part in _within_names(str(value), (*trace.owner._modules, *names)):
            with contextlib.suppress(ValueError):
                yield int(part)
        yield from _written(trace, int)
    elif isinstance(value, str):
        yield from _alternatives(trace, value)
        yield from names
        yield from _within_names(value, (*trace.owner._modules, *names))
        yield from _written(trace, str)
    elif value:
        kind = type(value)
        yield kind()
        for one in dict.fromkeys(_others(trace, value[0])):
            yield kind([one])
            for place in range(len(value)) if len(value) <= _SHORT else ():
                yield kind([*value[:place], one, *value[place + 1 :]])


def _containers(trace: ForwardTrace) -> list[nn.Module]:
    """What an index or a key may look into: not the layers of every Sequential that is called."""
    found: list[nn.Module] = [
        module
        for module in trace.owner._modules.values()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict))
    ]
    for text in _texts(trace):
        for _, sources, _ in selecting(text):
            found += [base for one in sources if (base := module_at(one, text)) is not None]
    return [module for module in dict.fromkeys(found) if module is not trace.owner]


def _alternatives(trace: ForwardTrace, name: str) -> Iterator[str]:
    """Parts that may stand where the one of that name does: of its type, or not running now."""
    parts = trace.owner._modules
    running = set(trace.called.values())
    for other, module in parts.items():
        if module not in running or type(module) is type(parts.get(name)):
            yield other


def _within_names(part: str, names: Iterable[str]) -> Iterator[str]:
    """What stands in other names where `part` does in one, such as depth of head_depth."""
    names = list(names)
    for name in names:
        before, found, after = name.partition(part)
        if part and found and (before or after):
            for other in names:
                if other.startswith(before) and other.endswith(after) and other != name:
                    yield other[len(before) : len(other) - len(after)]


def _written(trace: ForwardTrace, kind: type) -> Iterator[Any]:
    """Constants of that type in the code that ran, such as the keys of a table."""
    waiting = [constant for code in codes_of(trace) for constant in code.co_consts[1:]]
    for constant in waiting:
        if type(constant) in (tuple, frozenset):
            waiting += constant
        elif type(constant) is kind and len(str(constant)) < _LONG:
            yield constant


def _why_unseen(trace: ForwardTrace) -> str:
    """Why what is chosen cannot be tried; empty if nothing is."""
    own = own_code(trace)
    inner = {part for code in own for part in code.co_consts if isinstance(part, CodeType)}
    for code in trace.handed - own - inner:
        if has_branches(code):
            return f"{code.co_name}(), which is given modules, branches"
    texts = _texts(trace)
    source = ""
    if trace.draws:
        source = "random numbers"
    elif trace.opaque_reads:
        source = f"self.{min(trace.opaque_reads)}"
    elif any(set(code.co_freevars) - {"__class__"} for code in codes_of(trace).keys() - inner):
        source = "a variable of the function that made the forward"
    else:
        reasons = (unguarded_read(text) or _unsteady_call(text) for text in texts)
        source = next((reason for reason in reasons if reason), "").removeprefix("reads ")
    if source:
        for text in texts:
            for choice in selections(text):
                return f"{source} may choose what {choice.written} is"
    return ""


def _unsteady_call(text: Text) -> str:
    """A call whose result may be another one in another run, such as os.getenv()."""
    for node in text.nodes():
        if isinstance(node, ast.Call):
            value = text.value_of(node.func)
            if value is not MISSING and value not in _STEADY and not is_plain_function(value):
                return ast.unparse(node)
    return ""


def _why_not_all_ran(traces: list[ForwardTrace]) -> str:
    """A layer that could be chosen and was in none of the traces: what chooses it is not known."""
    ran = {part for trace in traces for part in trace.called.values()}
    for text in (text for trace in traces for text in _texts(trace)):
        for choice in selections(text):
            for part in choice.parts:
                if ran.isdisjoint(part.modules()) and not isinstance(part, nn.modules.loss._Loss):
                    names = text.owner.named_modules()
                    name = next(name for name, one in names if one is part)
                    return f"{choice.written} may be {name}, which did not run"
    return ""
