# SPDX-License-Identifier: BSD-3-Clause
"""The report's rows, from the analysis."""

from __future__ import annotations

from torch import nn

from .eligible import FUSED_TYPES
from .find import Analysis, ConvPlan, Pair
from .report import SwapRow
from .trace import AttributeCall


def report_rows(analysis: Analysis, refusals: dict[int, str], backend: str) -> list[SwapRow]:
    """A row for each convolution in the model's order, then for each activation and forward left
    alone.
    """
    pairs: dict[int, list[Pair]] = {}
    for pair in analysis.pairs:
        pairs.setdefault(id(pair.conv), []).append(pair)
    rows: list[SwapRow] = []
    ours = _replacements(analysis)
    for name, module in analysis.model.named_modules():
        if isinstance(module, FUSED_TYPES) and id(module) not in ours:
            rows.append(_already_fused(name, module))
    called = {id(module) for trace in analysis.traces for module in trace.called.values()}
    rows += [
        _conv_row(analysis, plan, pairs.get(identity, []), backend, identity in called)
        for identity, plan in analysis.convs.items()
    ]
    left: dict[SwapRow, None] = {}
    for pair in analysis.pairs:
        if pair.trace.tried or _is_fused(analysis, pair):
            continue
        if analysis.convs[id(pair.conv)].left_alone:
            continue
        left[_activation_row(analysis, pair, refusals)] = None
    rows += list(left)
    rows += _untraceable_rows(analysis, called)
    return rows


def _replacements(analysis: Analysis) -> set[int]:
    """Modules that stand where a candidate stood before this call."""
    names = {name for plan in analysis.convs.values() for name in plan.names}
    return {id(module) for name, module in analysis.model.named_modules() if name in names}


def _already_fused(name: str, module: nn.Module) -> SwapRow:
    kind = type(module).__name__
    return SwapRow(
        name, kind, kind, True, "was fused already", str(module.activation), str(module.backend)
    )


def _conv_row(
    analysis: Analysis, plan: ConvPlan, pairs: list[Pair], backend: str, called: bool
) -> SwapRow:
    kind = type(plan.module).__name__
    name = plan.names[0] or "(model)"
    remarks = [f"also named {other}" for other in plan.names[1:]]
    if plan.left_alone:
        labels = dict.fromkeys(pair.call.label for pair in pairs)
        return SwapRow(name, " + ".join((kind, *labels)), kind, False, plan.left_alone)
    fused = [pair for pair in pairs if _is_fused(analysis, pair)]
    labels = dict.fromkeys(pair.call.label for pair in fused)
    activations = dict.fromkeys(str(pair.call.spec) for pair in fused)
    old = [kind]
    new = "Conv2dAct" if isinstance(plan.module, nn.Conv2d) else "ConvTranspose2dAct"
    if plan.batch_norm is not None:
        old.append("BatchNorm2d")
        remarks.append(
            "BatchNorm folded into tensors beside the parameters; restore before training"
        )
    for owner in dict.fromkeys(pair.trace.name for pair in fused if pair.rewritten):
        remarks.append(f"activation fused in a rewritten forward of {owner or 'the model'}")
    if not called:
        remarks.append("its call is in no forward that could be read")
    return SwapRow(
        name,
        " + ".join((*old, *labels)),
        new,
        True,
        "; ".join((*remarks, *plan.remarks)),
        ", ".join(activations) or "none",
        backend,
    )


def _is_fused(analysis: Analysis, pair: Pair) -> bool:
    return not pair.broken and (pair.rewritten or not pair.unsafe)


def _activation_row(analysis: Analysis, pair: Pair, refusals: dict[int, str]) -> SwapRow:
    owner = pair.trace.name
    target = pair.act_node.target
    if pair.act_node.op == "call_module":
        module = pair.trace.module_of(pair.act_node)
        name = analysis.names.get(id(module), [f"{owner}.{target}".strip(".")])[0]
    elif isinstance(target, AttributeCall):
        name = f"{owner}.{target.attribute}".strip(".")
    else:
        name = f"{owner}.forward".strip(".")
    reason = pair.broken
    if not reason:
        refusal = refusals.get(id(pair.trace.owner), "")
        reason = f"after {analysis.convs[id(pair.conv)].names[0]}: {pair.unsafe}"
        reason += f"; its forward cannot be rewritten: {refusal}" if refusal else ""
    return SwapRow(name, pair.call.label, pair.call.label, False, reason, str(pair.call.spec or ""))


def _untraceable_rows(analysis: Analysis, called: set[int]) -> list[SwapRow]:
    """Forwards that could not be read, where they hide the call of a convolution."""
    rows = []
    for name, reason in analysis.untraceable.items():
        owner = analysis.model.get_submodule(name)
        inside = f"{name}." if name else ""
        if all(
            identity in called
            for identity, plan in analysis.convs.items()
            if any(other.startswith(inside) for other in plan.names)
        ):
            continue
        what = f"{type(owner).__name__}.forward"
        why = f"cannot be traced, so activations in it stay separate: {reason}"
        rows.append(SwapRow(f"{name}.forward".strip("."), what, what, False, why))
    return rows
