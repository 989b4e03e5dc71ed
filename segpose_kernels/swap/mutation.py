# SPDX-License-Identifier: BSD-3-Clause
"""Which values a model changes in place.

A fused leaky ReLU saves its output for backward, where torch's saves its input. A later `y += skip`
would then make autograd raise although the plain model trains, so such a pair must stay as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx, nn

from .trace import ForwardTrace

_INPLACE_OPERATORS = frozenset(
    {
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.ipow,
        operator.iand,
        operator.ior,
        operator.ixor,
        operator.setitem,
    }
)
_ALIAS_NAMES = """
    view view_as reshape flatten unflatten squeeze unsqueeze permute transpose movedim moveaxis
    swapaxes t narrow select getitem getattr chunk split tensor_split unbind expand expand_as
    contiguous to type float double half bfloat16 detach dropout dropout2d alpha_dropout
    feature_dropout requires_grad_
"""
_ALIASES = frozenset(_ALIAS_NAMES.split())
_ALIAS_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def mutated_nodes(traces: Iterable[ForwardTrace]) -> set[fx.Node]:
    """Nodes whose value is changed in place somewhere in the model, through views and across
    forwards.
    """
    traces = list(traces)
    by_owner: dict[int, list[ForwardTrace]] = {}
    calls: dict[int, list[fx.Node]] = {}
    home: dict[fx.Node, ForwardTrace] = {}
    waiting: list[fx.Node] = []
    for trace in traces:
        by_owner.setdefault(id(trace.owner), []).append(trace)
        for node in trace.graph.nodes:
            home[node] = trace
            module = trace.module_of(node)
            if module is not None:
                calls.setdefault(id(module), []).append(node)
            waiting.extend(_changes(node, module))
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        trace = home[node]
        module = trace.module_of(node)
        if node.op == "placeholder":
            for call in calls.get(id(trace.owner), ()):
                waiting.extend(call.all_input_nodes)
        elif module is not None and id(module) in by_owner:
            for inner in by_owner[id(module)]:
                waiting.extend(inner.graph.output_node().all_input_nodes)
        if _may_alias(node, module):
            waiting.extend(node.all_input_nodes)
    return found


def _changes(node: fx.Node, module: nn.Module | None) -> list[fx.Node]:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    first = node.all_input_nodes[:1]
    if isinstance(node.kwargs.get("out"), fx.Node):
        return [node.kwargs["out"]]  # type: ignore[list-item]
    if node.op == "call_module":
        return first if getattr(module, "inplace", False) else []
    if node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
        return first
    if node.op == "call_function":
        in_place = target in _INPLACE_OPERATORS or bool(node.kwargs.get("inplace"))
        # Functional activations take `inplace` last, as the only bool.
        in_place = in_place or (name.endswith("_") and not name.endswith("__"))
        in_place = in_place or (name in ("relu", "leaky_relu") and True in node.args[1:])
        return first if in_place else []
    return []


def _may_alias(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_module":
        return isinstance(module, _ALIAS_MODULES) or bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _ALIASES or (name.endswith("_") and not name.endswith("__"))
