# SPDX-License-Identifier: BSD-3-Clause
"""Modules that code outside the traces may call: other methods, branches not taken."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import CodeType
from typing import Any

from torch import nn

from .source import FunctionView, Mention, Path, methods_of, view_of
from .trace import AttributeCall, ForwardTrace

Key = tuple[Any, ...]
# Methods that set a module up or describe it; they do not run its layers.
_SETUP = frozenset(
    {
        "__init__",
        "__repr__",
        "__setstate__",
        "__getstate__",
        "extra_repr",
        "reset_parameters",
        "init_weights",
        "train",
        "eval",
        "_load_from_state_dict",
    }
)
_WALKERS = frozenset(
    {"children", "named_children", "modules", "named_modules", "get_submodule", "_modules"}
)


def module_key(module: nn.Module) -> Key:
    """How uses of a module are counted, whatever its names."""
    return ("module", id(module))


def attribute_key(owner: nn.Module, attribute: str) -> Key:
    """How uses of a callable attribute are counted."""
    return ("attribute", id(owner), attribute)


def hidden_uses(owner: nn.Module, name: str, traces: Iterable[ForwardTrace]) -> dict[Key, str]:
    """What this module's code may call unseen, with the reason.

    Without traces all of its code counts as unseen.
    """
    traces = list(traces)
    executed = _executed_regions(traces)
    functions = list(methods_of(owner))
    ran_too = {code for code, _ in executed}
    for function in methods_of(owner, overridden=True):  # by super()
        if function not in functions and function.__code__ in ran_too:
            functions.append(function)
    views = {function.__code__: view_of(function.__code__) for function in functions}
    by_name = {function.__name__: function.__code__ for function in reversed(functions)}
    forward_like = _reachable_methods("forward", by_name, views)
    setup = _reachable_methods("__init__", by_name, views) - forward_like
    found: dict[Key, str] = {}
    label = name or type(owner).__name__
    for function in functions:
        code = function.__code__
        if function.__name__ in _SETUP or function.__name__ in setup:
            continue
        where = f"{label}.{function.__name__}()"
        in_forward = function.__name__ in forward_like or code in ran_too
        view = views[code]
        ran = any(key[0] is code for key in executed)
        if view is None:
            if not ran:
                for attribute in code.co_names:
                    mention = Mention((attribute,), False, (), False)
                    _note(owner, mention, where, in_forward, False, found)
            continue
        for mention in view.mentions:
            seen = (code, mention.path) in executed and not mention.in_expression
            _note(owner, mention, where, in_forward, seen, found)
    return found


def _executed_regions(traces: list[ForwardTrace]) -> set[tuple[CodeType, Path]]:
    executed: set[tuple[CodeType, Path]] = set()
    for trace in traces:
        # A forward that makes no node (an empty one) has still run.
        forward = inspect.unwrap(type(trace.owner).forward)
        executed.add((forward.__code__, ()))
        executed.update((code, ()) for code in trace.entered or ())
        for site in trace.sites.values():
            for code, line in site.frames:
                view = view_of(code)
                path = view.path(line) if view is not None else ()
                executed.update((code, path[:length]) for length in range(len(path) + 1))
    return executed


def _reachable_methods(
    start: str, by_name: dict[str, CodeType], views: dict[CodeType, FunctionView | None]
) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in found or name not in by_name:
            continue
        found.add(name)
        view = views[by_name[name]]
        waiting.extend(
            mention.chain[0] for mention in (view.mentions if view else ()) if mention.chain
        )
    return found


def _note(
    owner: nn.Module,
    mention: Mention,
    where: str,
    in_forward: bool,
    seen: bool,
    found: dict[Key, str],
) -> None:
    """Add what one mention may call.

    In code that a trace ran, only another module's callable attribute is news.
    """
    target = owner
    for attribute in mention.chain:
        value = lookup(target, attribute)
        if isinstance(value, nn.Module):
            target = value
            continue
        if callable(value) and attribute in vars(target):
            if not seen or target is not owner:
                found.setdefault(attribute_key(target, attribute), f"also named in {where}")
        elif attribute in ("forward", "__call__") and not seen:
            found.setdefault(module_key(target), f"also called in {where}")
        elif attribute in _WALKERS and in_forward and not seen:
            _expose(target, where, found)
        # Past a method or a plain value there is no module that this code could call by name.
        return
    if seen or (not mention.chain and not in_forward):
        return
    if mention.called and mention.chain:
        found.setdefault(module_key(target), f"also called in {where}")
    else:
        _expose(target, where, found)


def _expose(module: nn.Module, where: str, found: dict[Key, str]) -> None:
    for part in module.modules():
        found.setdefault(module_key(part), f"{where} may call it in a way a trace does not show")
        for attribute, value in vars(part).items():
            if callable(value) and not isinstance(value, (nn.Module, AttributeCall)):
                found.setdefault(attribute_key(part, attribute), f"{where} may call it")


def lookup(target: nn.Module, attribute: str) -> Any:
    """A child, an instance attribute or what the class has, without running a property."""
    if attribute in target._modules:
        return target._modules[attribute]
    if attribute in vars(target):
        return vars(target)[attribute]
    return inspect.getattr_static(type(target), attribute, None)
