# SPDX-License-Identifier: BSD-3-Clause
"""Expressions in a forward's source that may give another layer, or another number of them, in
another run: `self.heads[self.task]`, `range(self.depth)`, `random.choice(self.layers)`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .hidden import lookup
from .links import LOOP_HELPERS
from .rewritable import MISSING, Text, is_plain_function

# Methods that look something up by its first argument.
_LOOKUPS = frozenset({"get", "pop", "get_submodule", "__getitem__"})
_ANY = re.compile(".*")


@dataclass
class Selection:
    """One of them, and the layers that it may give as far as the source tells."""

    written: str
    parts: list[nn.Module]


def selections(text: Text) -> list[Selection]:
    """All of a function's."""
    found: list[Selection] = []
    for node, sources, key in selecting(text):
        parts: list[nn.Module] = []
        for source in sources:
            base = module_at(source, text)
            if base is not None:
                parts += [
                    part
                    for name, part in base._modules.items()
                    if part is not None and key.fullmatch(name)
                ]
            else:
                parts += _handed_on(text)
        found.append(Selection(ast.unparse(node), parts))
    return found


def _pattern(node: ast.expr) -> re.Pattern[str]:
    """What names an expression may give: all of those, but for an f-string."""
    if not isinstance(node, ast.JoinedStr):
        return _ANY
    parts = (
        re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*"
        for part in node.values
    )
    return re.compile("".join(parts))


def module_at(node: ast.expr, text: Text) -> nn.Module | None:
    """The part of the owner that a chain of attributes from self stands for."""
    if isinstance(node, ast.Name):
        return text.owner if text.self_name and node.id == text.self_name else None
    if not isinstance(node, ast.Attribute):
        return None
    base = module_at(node.value, text)
    if base is not None and node.attr == "_modules":
        return base
    value = lookup(base, node.attr) if base is not None else None
    return value if isinstance(value, nn.Module) else None


def _handed_on(text: Text) -> list[nn.Module]:
    """Parts that the code names as values, and all that are in lists of them."""
    passed_over: set[ast.AST] = set()
    found: list[nn.Module] = []
    for node in text.nodes():  # outer nodes come first
        if isinstance(node, ast.Attribute):
            passed_over.add(node.value)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            passed_over.add(node.test)
        elif isinstance(node, ast.Compare):
            passed_over |= {node.left, *node.comparators}
        elif isinstance(node, ast.UnaryOp):
            passed_over.add(node.operand)
        elif isinstance(node, ast.Call):
            passed_over.add(node.func)
            if text.value_of(node.func) in (len, isinstance, hasattr):
                passed_over.update(node.args)
        if isinstance(node, ast.Attribute) and node not in passed_over:
            module = module_at(node, text)
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                found += [part for part in module._modules.values() if part is not None]
            elif module is not None:
                found.append(module)
    return found


def selecting(text: Text) -> Iterator[tuple[ast.AST, list[ast.expr], re.Pattern[str]]]:
    """Expressions that select, what from, and what name that has there."""
    counters: set[str] = set()
    for node in text.nodes():
        if isinstance(node, (ast.For, ast.comprehension)) and _is_whole(node.iter, text):
            counters |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    for node in text.nodes():
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            if _varies(node.slice, counters):
                yield node, [node.value], _ANY
        elif isinstance(node, (ast.For, ast.comprehension)):
            whole = _is_whole(node.iter, text) or _is_local(node.iter)
            if not whole and _varies(node.iter, counters):
                yield node.iter, [], _ANY
        elif isinstance(node, ast.Call):
            called, method = text.value_of(node.func), getattr(node.func, "attr", "")
            if called is getattr and len(node.args) > 1 and _varies(node.args[1], counters):
                yield node, node.args[:1], _pattern(node.args[1])
            elif called is range and any(_varies(part, counters) for part in node.args):
                yield node, [], _ANY
            elif called is next and not _gives_tensors(node.args[0]):
                yield node, [node.args[0]], _ANY
            elif called is MISSING and method in _LOOKUPS and isinstance(node.func, ast.Attribute):
                if any(_varies(part, counters) for part in node.args[:1]):
                    yield node, [node.func.value], _ANY
            elif (
                called is not MISSING
                and not is_plain_function(called)
                and (whole_ones := [part for part in node.args if _is_whole(part, text)])
            ):
                yield node, whole_ones, _ANY  # such as random.choice(self.layers)


def _gives_tensors(node: ast.expr) -> bool:
    """Whether it is a call such as self.parameters()."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("parameters", "buffers")
    )


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
