# SPDX-License-Identifier: BSD-3-Clause
"""What a trace cannot show: the parts of a model's code that run under a condition, read from its
source.

A *region* is a part that may run more or less often than the code around it: a branch, a loop body,
a handler, the arm of a conditional expression. A *mention* is a place that names something of
`self`.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from torch import nn

Path = tuple[int, ...]


@dataclass(frozen=True)
class Mention:
    """A chain of attributes from `self`: `self.a.b` is ("a", "b"); `called` if the chain itself is
    called.
    """

    chain: tuple[str, ...]
    called: bool
    path: Path
    in_expression: bool


@dataclass
class Region:
    """A conditional part of a function; `rebinds` holds the targets of the loops around it."""

    path: Path
    first: int
    last: int
    names: set[str]
    rebinds: set[str]
    in_expression: bool


@dataclass
class FunctionView:
    """The regions, mentions and statements of one function."""

    node: ast.FunctionDef | ast.AsyncFunctionDef
    regions: list[Region] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
    statements: list[tuple[ast.stmt, Path]] = field(default_factory=list)
    loops: dict[Path, ast.expr] = field(default_factory=dict)

    def statement(self, line: int) -> tuple[ast.stmt, Path] | None:
        """The innermost statement on a line, with the path of the region it is in."""
        found = [
            (statement, path)
            for statement, path in self.statements
            if statement.lineno <= line <= (statement.end_lineno or statement.lineno)
        ]
        # On one line, `if c: return y`, the deeper statement is the one meant.
        return min(
            found,
            key=lambda item: ((item[0].end_lineno or 0) - item[0].lineno, -len(item[1])),
            default=None,
        )

    def path(self, line: int) -> Path:
        """The region a line is in."""
        found = self.statement(line)
        return found[1] if found else ()


@functools.lru_cache(maxsize=512)
def view_of(code: CodeType) -> FunctionView | None:
    """Read a function's source; None when there is none."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    ast.increment_lineno(tree, first - 1)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == code.co_name:
            return _Reader(node).view
    return None


def view_self(view: FunctionView) -> str:
    """The name of a method's first argument."""
    arguments = [*view.node.args.posonlyargs, *view.node.args.args]
    return arguments[0].arg if arguments else ""


def has_branches(code: CodeType) -> bool:
    """Whether the bytecode has a conditional jump other than a loop's."""
    return any("JUMP" in step.opname and "IF" in step.opname for step in dis.get_instructions(code))


def methods_of(owner: nn.Module, *, overridden: bool = False) -> Iterator[FunctionType]:
    """The functions of a module's own classes that its instances would run, torch's classes left
    out; `overridden`: and those that only super() would find.
    """
    seen: set[str] = set()
    for kind in type(owner).__mro__:
        if kind.__module__.split(".")[0] == "torch" or kind is object:
            continue
        for name, value in vars(kind).items():
            if name in seen and not overridden:
                continue
            seen.add(name)
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            for function in (value.fget, value.fset) if isinstance(value, property) else (value,):
                if isinstance(function, FunctionType):
                    yield inspect.unwrap(function)


def _may_leave(statement: ast.AST, *, in_loop: bool = False) -> bool:
    """Whether a statement that has others inside may end the block that it is in."""
    in_loop = in_loop or isinstance(statement, (ast.For, ast.While))
    for part in ast.iter_child_nodes(statement):
        if isinstance(part, (ast.FunctionDef, ast.Lambda, ast.expr)):
            continue
        if isinstance(part, ast.Return):
            return True
        if isinstance(part, (ast.Break, ast.Continue)) and not in_loop:
            return True
        if _may_leave(part, in_loop=in_loop):
            return True
    return False


class _Reader(ast.NodeVisitor):
    """Fills a FunctionView."""

    def __init__(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.view = FunctionView(node)
        arguments = [*node.args.posonlyargs, *node.args.args]
        self.self_name = arguments[0].arg if arguments else ""
        self.path: Path = ()
        self.rebinds: list[set[str]] = []
        self.in_expression = False
        self.next_id = 0
        self.block(node.body)

    def block(self, body: list[ast.stmt]) -> None:
        for place, statement in enumerate(body, 1):
            self.view.statements.append((statement, self.path))
            self.visit(statement)
            if _may_leave(statement):
                # What follows runs under a condition too.
                self.region(body[place:])
                return

    def region(
        self, body: list[Any], rebinds: set[str] | None = None, *, expression: bool = False
    ) -> Path:
        """Read `body`, statements or expressions, as a region of its own."""
        if not body:
            return self.path
        outer, outer_expression = self.path, self.in_expression
        self.next_id += 1
        self.path = (*outer, self.next_id)
        self.rebinds.append(rebinds or set())
        self.in_expression = outer_expression or expression
        names = {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
        last = body[-1].end_lineno or body[-1].lineno
        bound = set().union(*self.rebinds)
        self.view.regions.append(
            Region(self.path, body[0].lineno, last, names, bound, self.in_expression)
        )
        inner = self.path
        if expression:
            for part in body:
                self.visit(part)
        else:
            self.block(body)
        self.rebinds.pop()
        self.path, self.in_expression = outer, outer_expression
        return inner

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.region(node.body)
        self.region(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self.region(node.body)
        self.region(node.orelse)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        targets = {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
        self.view.loops[self.region(node.body, targets)] = node.iter
        self.region(node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        self.region(node.body)
        for handler in node.handlers:
            self.region(handler.body)
        self.region(node.orelse)
        self.block(node.finalbody)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self.block(node.body)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        for case in node.cases:
            self.region(case.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.region(node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.region([node.body], expression=True)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self.region([node.body], expression=True)
        self.region([node.orelse], expression=True)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self.region(list(node.values[1:]), expression=True)

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> None:
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for generator in node.generators:
            self.visit(generator.iter)
        if any(generator.ifs for generator in node.generators):
            self.region(parts, expression=True)
        else:
            for part in parts:
                self.visit(part)

    visit_ListComp = _comprehension  # noqa: N815
    visit_SetComp = _comprehension  # noqa: N815
    visit_GeneratorExp = _comprehension  # noqa: N815
    visit_DictComp = _comprehension  # noqa: N815

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return
        self._chain(node.func, called=True)
        for part in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._chain(node, called=False)

    def visit_Name(self, node: ast.Name) -> None:
        self._chain(node, called=False)

    def _chain(self, node: ast.expr, *, called: bool) -> None:
        chain: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            chain.append(root.attr)
            root = root.value
        if not isinstance(root, ast.Name):
            self.visit(root)
        elif root.id == self.self_name:
            self.view.mentions.append(
                Mention(tuple(reversed(chain)), called, self.path, self.in_expression)
            )
