# SPDX-License-Identifier: BSD-3-Clause
"""Whether the graph of a forward does in every run what the forward does.

A trace runs the code once, with proxies for arguments. What the code finds out about an argument
other than by computing with it, and what it reads elsewhere, is frozen in the graph. So all code
that ran is read: what it asks, calls and reads must be the same in every run, or be compared at
each call.
"""

from __future__ import annotations

import ast
import builtins
import enum
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._jit_internal import is_scripting
from torch.nn import functional as F

from .activation import LEAKY_FUNCTIONS, RELU_FUNCTIONS
from .contents import is_users_object
from .source import FunctionView, has_branches, methods_of, view_of, view_self
from .trace import MODULE_STATE, PLAIN, ForwardTrace

# Changing a list or dict that the forward made itself is part of the graph.
_BUILDERS = frozenset({"append", "extend", "insert", "update", "setdefault", "pop", "reverse"})
# What gives the same for the same values, or raises for a proxy.
_FUNCTIONS = frozenset(
    {
        *(abs, all, any, divmod, iter, len, max, min, next, pow, round, sorted, sum),
        *(bool, complex, dict, enumerate, filter, float, frozenset, int, list, map, range),
        *(reversed, set, slice, str, super, tuple, zip),
    }
)
_MODULES = frozenset(
    {"math", "operator", "_operator", "itertools", "functools", "typing", "collections"}
)
_STATEMENTS = (
    *(ast.With, ast.Try, ast.Match, ast.Global, ast.Nonlocal, ast.Yield, ast.Await, ast.Raise),
)
MISSING = object()


def why_not_rewritable(trace: ForwardTrace) -> str:
    """Why the graph may not do what the forward does in every run; empty if it does."""
    if hasattr(type(trace.owner).forward, "__wrapped__"):
        return "its forward is decorated"
    if trace.arguments:
        return f"its argument {min(trace.arguments)} decides what runs"
    if trace.constants:
        return "it makes tensors that a graph would freeze"
    if trace.stashed:
        return f"it stores a value in self.{next(iter(trace.stashed.values()))}"
    if trace.draws:
        return "it draws random numbers that do not depend on its input"
    if trace.opaque_reads:
        return f"it reads self.{min(trace.opaque_reads)}, whose content may change"
    if any(site.modes != trace.modes for site in trace.sites.values()):
        return "it changes the grad or autocast mode"
    codes, own = codes_of(trace), own_code(trace)
    nested = {inner for code in codes for inner in _inner_codes(code)}
    for code, scope in codes.items():
        if code not in nested and set(code.co_freevars) - {"__class__"}:
            return f"{code.co_name}() reads variables of the function that made it"
        view = None if code.co_name.startswith("<") else view_of(code)
        if view is None:
            if has_branches(code):
                return f"{code.co_name}() branches and its source cannot be read"
            continue
        text = Text(view, scope, trace.owner, view_self(view) if code in own else "")
        reason = _why_not_plain_code(text) or _why_not_plain_calls(text) or unguarded_read(text)
        if reason:
            return f"{code.co_name}() {reason}"
    return ""


@dataclass
class Text:
    """A function that ran: its source, its globals, and its name for the owner if it is a method of
    the owner's.
    """

    view: FunctionView
    scope: dict[str, Any]
    owner: nn.Module
    self_name: str

    def __post_init__(self) -> None:
        nodes = list(ast.walk(self.view.node))
        # Of the function and of those inside it.
        self.local = {node.arg for node in nodes if isinstance(node, ast.arg)}
        stores = [node.id for node in nodes if isinstance(node, ast.Name) and _is_store(node)]
        self.stored = set(stores)
        self.local |= self.stored
        loops = [node for node in nodes if isinstance(node, (ast.For, ast.comprehension))]
        counted = [name for node in loops for name in self._counted(node.target, node.iter)]
        # Names that only loops over plain data give values to.
        self.plain = {name for name in counted if stores.count(name) == counted.count(name)}

    def _counted(self, target: ast.expr, source: ast.expr) -> Iterator[str]:
        """Names in a loop's target that stand for numbers, or for plain data of the owner's."""
        call = (
            source if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) else None
        )
        function = call.func.id if call is not None and isinstance(call.func, ast.Name) else ""
        if call is not None and function in ("enumerate", "zip"):
            sources = [ast.Call(ast.Name("range"), [], []), *call.args]
            if isinstance(target, ast.Tuple):
                for part, own in zip(
                    target.elts, sources if function == "enumerate" else call.args, strict=False
                ):
                    yield from self._counted(part, own)
        elif function == "range" or self._is_plain_attribute(source):
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))

    def _is_plain_attribute(self, node: ast.expr) -> bool:
        """Whether it is a list of plain data on the owner, which is compared at each call."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return False
        value = getattr(self.owner, node.attr, None)
        return (
            node.value.id == self.self_name
            and isinstance(value, (tuple, list))
            and all(isinstance(item, PLAIN) for item in value)
        )

    def nodes(self) -> Iterator[ast.AST]:
        """All of the body."""
        for statement in self.view.node.body:
            yield from ast.walk(statement)

    def value_of(self, node: ast.expr) -> Any:
        """What a global name, or a chain of attributes from one, stands for; `MISSING` if it is
        local, passes through something other than modules and classes, or is a constant of torch's
        or a mathematical module's.
        """
        if isinstance(node, ast.Name):
            if node.id in self.local:
                return MISSING
            return self.scope.get(node.id, getattr(builtins, node.id, MISSING))
        base = self.value_of(node.value) if isinstance(node, ast.Attribute) else MISSING
        if not isinstance(node, ast.Attribute) or not isinstance(base, (ModuleType, type)):
            return MISSING
        value = inspect.getattr_static(base, node.attr, MISSING)
        home = base.__name__ if isinstance(base, ModuleType) else base.__module__
        if home.partition(".")[0] in {*_MODULES, "torch"}:
            return value if callable(value) or isinstance(value, ModuleType) else MISSING
        return value


def _is_store(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def codes_of(trace: ForwardTrace) -> dict[CodeType, dict[str, Any]]:
    """The code that the trace ran, its own forward first, with its globals."""
    forward = inspect.unwrap(type(trace.owner).forward)
    scope = getattr(forward, "__globals__", {})
    codes = {forward.__code__: scope} if isinstance(forward, FunctionType) else {}
    for site in trace.sites.values():
        codes.update((code, scope) for code, _ in site.frames)
    return codes | (trace.entered or {})


def own_code(trace: ForwardTrace) -> set[CodeType]:
    """Of methods that get the owner as their first argument."""
    forward = inspect.unwrap(type(trace.owner).forward)
    codes = {forward.__code__} if isinstance(forward, FunctionType) else set()
    for function in methods_of(trace.owner, overridden=True):
        kept = inspect.getattr_static(type(trace.owner), function.__name__, None)
        if not isinstance(kept, (staticmethod, classmethod)):
            codes.add(function.__code__)
    return codes


def _inner_codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner_codes(constant)


def _why_not_plain_code(text: Text) -> str:
    for node in text.nodes():
        tests: list[ast.expr] = []
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            tests = [node.test]
        elif isinstance(node, ast.BoolOp):
            tests = list(node.values[:-1])
        elif isinstance(node, ast.comprehension):
            tests = node.ifs
        for test in tests:
            if not _reads_only_self(test, text):
                return f"branches on {ast.unparse(test)}"
        # A proxy answers at once, for every later argument.
        if (
            isinstance(node, ast.Compare)
            and any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops)
            and not _reads_only_self(node, text)
        ):
            return f"asks {ast.unparse(node)}"
        if isinstance(node, _STATEMENTS):
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
                and _root_name(function.value) in text.stored
            ):
                return f"calls {ast.unparse(function)}() for its effect"
    return ""


def _why_not_plain_calls(text: Text) -> str:
    """A call of something, found by its global name, that may give another result later."""
    for node in text.nodes():
        if not isinstance(node, ast.Call):
            continue
        value = text.value_of(node.func)
        asks_self = node.args and _root_name(node.args[0]) == text.self_name != ""
        if asks_self and (value is getattr or value is hasattr):
            continue  # noted like other reads
        if value is not MISSING and not is_plain_function(value):
            return f"calls {ast.unparse(node.func)}()"
    return ""


def is_plain_function(value: Any) -> bool:
    """Whether calls of it are nodes of a graph, depend on their arguments alone, or are code that
    was entered and is read too.
    """
    try:
        if value in _FUNCTIONS | _graph_functions() or value is is_scripting:
            return True
    except TypeError:  # cannot be hashed: an object with a __call__, which was entered
        return True
    home = str(getattr(value, "__module__", None) or "").partition(".")[0]
    if home in _MODULES or isinstance(value, nn.Module):
        return True
    if inspect.isbuiltin(value) or home in sys.stdlib_module_names:
        return False
    return home != "torch" or isinstance(value, type)


@functools.lru_cache(maxsize=1)
def _graph_functions() -> frozenset[Any]:
    """Functions of torch whose calls with a proxy are nodes."""
    tables = torch.overrides.get_overridable_functions().values()
    functions = {function for functions in tables for function in functions}
    # Those that only pass on to others, and those that write into their argument, are not listed.
    functions |= {value for value in vars(F).values() if inspect.isfunction(value)}
    functions |= {value for name, value in vars(torch).items() if name[-1:] == "_" != name[-2:-1]}
    return frozenset(functions | RELU_FUNCTIONS | LEAKY_FUNCTIONS)


def unguarded_read(text: Text) -> str:
    """Plain data that a graph freezes and no call compares: of a child, or a variable global."""
    held = _held_by_parts(text.owner)
    for node in text.nodes():
        if not isinstance(node, (ast.Attribute, ast.Name)) or not isinstance(node.ctx, ast.Load):
            continue
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == text.self_name != ""
            root = _chain_root(node)
            # Where the name says nothing of what it is read from, it may be a tensor.
            of_other = root in text.local and node.attr in held and not of_self
            if of_other and (root == view_self(text.view) or not hasattr(torch.Tensor, node.attr)):
                return f"reads {ast.unparse(node)}"
            parts = [] if of_self else _parts_at(node.value, text)
            if any(_is_data(part, node.attr) for part in parts):
                return f"reads {ast.unparse(node)}"
            if _is_class(node.value) and _is_class_data(text.owner, node):
                return f"reads {ast.unparse(node)}"
        value = text.value_of(node)
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if value is not MISSING and not _stays(value, name):
            return f"reads the global {ast.unparse(node)}"
    return ""


def _held_by_parts(owner: nn.Module) -> set[str]:
    """Names under which modules inside the owner hold plain data, other than what tensors have."""
    parts = [module for module in owner.modules() if module is not owner]
    names = {name for module in parts for name in vars(module) if _is_data(module, name)}
    for kind in {kind for module in parts for kind in _own_classes(module)}:
        names |= {name for name, value in vars(kind).items() if _is_constant(name, value)}
    return names


def _own_classes(module: nn.Module) -> list[type]:
    """The classes of a module, torch's left out."""
    kinds = type(module).__mro__
    return [
        kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")
    ]


def _is_constant(name: str, value: Any) -> bool:
    """Whether what a class has is data, and may change."""
    return not (name.startswith("__") or callable(value) or hasattr(type(value), "__get__"))


def _is_data(module: nn.Module, name: str) -> bool:
    """Whether a module has plain data or a function under that name, itself or in its class."""
    if name in vars(module):
        return name not in MODULE_STATE or name == "training"
    return any(
        name in vars(kind) and _is_constant(name, vars(kind)[name]) for kind in _own_classes(module)
    )


def _parts_at(node: ast.expr, text: Text) -> list[nn.Module]:
    """The modules that an expression such as self.blocks[0].conv may stand for."""
    if isinstance(node, ast.Name):
        return [text.owner] if node.id == text.self_name != "" else []
    if isinstance(node, ast.Subscript):
        found = [list(base._modules.values()) for base in _parts_at(node.value, text)]
        return [part for parts in found for part in parts if part is not None]
    if not isinstance(node, ast.Attribute):
        return []
    named = [base._modules.get(node.attr) for base in _parts_at(node.value, text)]
    return [part for part in named if part is not None]


def _is_class(node: ast.expr) -> bool:
    """Whether it is what code calls the class of something."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "type"
    return (isinstance(node, ast.Name) and node.id == "cls") or (
        isinstance(node, ast.Attribute) and node.attr == "__class__"
    )


def _is_class_data(owner: nn.Module, node: ast.Attribute) -> bool:
    value = inspect.getattr_static(type(owner), node.attr, None)
    return value is None or _is_constant(node.attr, value)


def _stays(value: Any, name: str) -> bool:
    """Whether a global is one that programs do not change: code, or a constant by its name."""
    if isinstance(value, nn.Module) or (callable(value) and is_users_object(value)):
        return False
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return True
    if isinstance(value, (*PLAIN, tuple, frozenset)):
        return name.isupper() or name.startswith("__")
    return callable(value) or isinstance(value, (ModuleType, enum.Enum))


def _chain_root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return _root_name(node)


def _root_name(node: ast.expr) -> str:
    """The variable that `x`, `x[...]` and `x[...][...]` begin with; empty for anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _reads_only_self(test: ast.expr, text: Text) -> bool:
    """Whether a condition reads only constants and what is compared at each call."""
    constant = {part for node in ast.walk(test) if _is_fixed(node, text) for part in ast.walk(node)}
    for node in ast.walk(test):
        if node in constant:
            continue
        if isinstance(node, ast.Name) and node.id not in text.plain | {text.self_name}:
            return False
        if isinstance(node, (ast.Call, ast.Subscript, ast.NamedExpr, ast.Lambda)):
            return False
        if isinstance(node, ast.Attribute) and not isinstance(node.value, ast.Name):
            return False
    return True


def _is_fixed(node: ast.AST, text: Text) -> bool:
    """Whether it is a member of an Enum, or asks whether a script runs, which none of ours does."""
    if isinstance(node, ast.Call):
        return text.value_of(node.func) is is_scripting
    return isinstance(node, ast.Attribute) and isinstance(text.value_of(node), enum.Enum)
