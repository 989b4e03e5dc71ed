# SPDX-License-Identifier: BSD-3-Clause
"""Whether two modules that follow each other in a trace do so in every run of the forward.

Replacing a pair of modules changes both for good, while a trace shows one run. The pair is safe
when nothing under a condition can come between the two, see the value between them, or call one
without the other.
"""

from __future__ import annotations

import ast
from types import CodeType

from torch import fx

from .source import FunctionView, Path, has_branches, view_of, view_self
from .trace import ForwardTrace

LOOP_HELPERS = frozenset({"zip", "enumerate", "reversed", "list", "tuple", "len", "range"})


def why_not_straight(trace: ForwardTrace, producer: fx.Node, consumer: fx.Node) -> str:
    """Why `consumer` may not always run right after `producer`; empty if it does."""
    first, second = trace.sites[producer], trace.sites[consumer]
    if first.modes != second.modes:
        return "the grad or autocast mode changes between the two"
    if producer in trace.stashed:
        return f"the value before the activation is kept in self.{trace.stashed[producer]}"
    frames = []
    for site in (first, second):
        own = [(code, line) for code, line in site.frames if not code.co_name.startswith("<")]
        hidden = [code for code, _ in site.frames if code.co_name.startswith("<")]
        if any(has_branches(code) for code in hidden):
            return "runs inside a comprehension or lambda with a condition"
        frames.append(own[::-1])
    outer_first, outer_second = frames
    while outer_first and outer_second and outer_first[0] == outer_second[0]:
        code, line = outer_first.pop(0)
        outer_second.pop(0)
        reason = _check_level(trace, code, line, line, producer, consumer)
        if reason:
            return reason
    if outer_first and outer_second and outer_first[0][0] is outer_second[0][0]:
        code, line = outer_first.pop(0)
        reason = _check_level(trace, code, line, outer_second.pop(0)[1], producer, consumer)
        if reason:
            return reason
    for code, line in (*outer_first, *outer_second):
        view = view_of(code)
        if (view is None and has_branches(code)) or (view is not None and view.path(line)):
            return f"a condition in {code.co_name}() stands between the two"
    return ""


def _check_level(
    trace: ForwardTrace,
    code: CodeType,
    line: int,
    next_line: int,
    producer: fx.Node,
    consumer: fx.Node,
) -> str:
    view = view_of(code)
    if view is None:
        return (
            f"{code.co_name}() branches and its source cannot be read" if has_branches(code) else ""
        )
    start, end = view.statement(line), view.statement(next_line)
    if start is None or end is None:
        return f"the source of {code.co_name}() does not match its code"
    if start[1] != end[1]:
        return "convolution and activation run under different conditions or loops"
    for statement, _ in (start, end):
        if _has_conditional_call(statement):
            return "runs inside a conditional expression"
    path = start[1]
    names = {name for owner, name in trace.sites[consumer].names.get(producer, ()) if owner is code}
    holders = {
        name
        for node in (producer, consumer)
        for owner, name in trace.sites[node].holders
        if owner is code and name != view_self(view)
    }
    turns = bool(names) and end[0].lineno <= start[0].lineno
    if turns:
        reason = _check_loop(view, path)
        if reason:
            return reason
    return _check_regions(view, path, start[0], end[0], names, holders, turns)


def _check_regions(
    view: FunctionView,
    path: Path,
    start: ast.stmt,
    end: ast.stmt,
    names: set[str],
    holders: set[str],
    turns: bool,
) -> str:
    kept = names - _assigned(end)
    span = range(start.lineno, (end.end_lineno or end.lineno) + 1)
    for region in view.regions:
        if path[: len(region.path)] == region.path:
            continue
        rebound = region.rebinds if not _inside_loop_of(region.path, path, view) else set()
        for name in (region.names & holders) - rebound:
            return f"`{name}` is also used under a condition"
        if turns:
            relevant = names if region.path[: len(path)] == path else set()
        else:
            between = region.first in span or region.last in span
            relevant = names if between else kept
        for name in (region.names & relevant) - rebound:
            return f"`{name}`, the value before the activation, is also used under a condition"
    return ""


def _inside_loop_of(region: Path, path: Path, view: FunctionView) -> bool:
    """Whether a region lies inside the loop that the pair is in, so that the loop's variable is the
    pair's.
    """
    return any(region[: len(loop)] == loop and path[: len(loop)] == loop for loop in view.loops)


def _check_loop(view: FunctionView, path: Path) -> str:
    """The value passes from one turn of a loop to the next: the turns must be the modules of a
    container.
    """
    loops = [loop for loop in view.loops if path[: len(loop)] == loop]
    if not loops:
        return "convolution and activation run in an order that the source does not show"
    iterable = view.loops[max(loops, key=len)]
    allowed = {*LOOP_HELPERS, view_self(view)}
    names = {node.id for node in ast.walk(iterable) if isinstance(node, ast.Name)}
    # range(n) with n from anywhere else could stop between a convolution and its activation.
    counts = any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"
        for node in ast.walk(iterable)
    ) and not isinstance(getattr(iterable, "args", [None])[0], ast.Call)
    if names <= allowed and not counts:
        return ""
    return (
        f"convolution and activation run in different turns of a loop over {ast.unparse(iterable)}"
    )


def _has_conditional_call(statement: ast.stmt) -> bool:
    parts: list[ast.AST] = [statement]
    if isinstance(statement, (ast.If, ast.While, ast.For, ast.Try, ast.With, ast.Match)):
        # Only the head belongs to the statement; its blocks have statements of their own.
        parts = [part for part in ast.iter_child_nodes(statement) if isinstance(part, ast.expr)]
    for part in parts:
        for node in ast.walk(part):
            arms: list[ast.expr] = []
            if isinstance(node, ast.IfExp):
                arms = [node.body, node.orelse]
            elif isinstance(node, ast.BoolOp):
                arms = node.values[1:]
            elif isinstance(node, ast.comprehension) and node.ifs:
                return True
            if any(isinstance(inner, ast.Call) for arm in arms for inner in ast.walk(arm)):
                return True
    return False


def _assigned(statement: ast.stmt) -> set[str]:
    """Names that a statement gives a new value; everything is dead after a return."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    elif isinstance(statement, ast.Return) and statement.value is not None:
        return {node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)}
    return {target.id for target in targets if isinstance(target, ast.Name)}
