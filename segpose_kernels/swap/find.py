# SPDX-License-Identifier: BSD-3-Clause
"""Analysis: which convolutions can take over which activations. Changes nothing in the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from . import activation as act
from .activation import NONE, Activation, ActivationCall
from .choices import explore
from .eligible import (
    FUSED_TYPES,
    Conv,
    is_convolution,
    modules_held_outside,
    why_not_eligible,
    why_not_plain,
)
from .hidden import Key, attribute_key, hidden_uses, module_key
from .links import why_not_straight
from .mutation import mutated_nodes
from .pieces import fused_module
from .trace import AttributeCall, ForwardTrace, UntraceableError, trace_forward

_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "layout"})
_SHAPE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "__len__"})


@dataclass
class Pair:
    """A convolution's output reaching an activation, in one graph.

    Attributes:
        tail: the node the activation reads: the convolution, or the BatchNorm folded into it.
        key: what would be replaced by a pass-through; None for a call in the forward's own
            code.
        broken: why the two can never be one op.
        unsafe: why the two modules cannot be replaced for good; a rewritten forward may still
            fuse them.
    """

    trace: ForwardTrace
    conv: Conv
    conv_node: fx.Node
    tail: fx.Node
    act_node: fx.Node
    call: ActivationCall
    key: Key | None
    broken: str = ""
    unsafe: str = ""
    rewritten: bool = False


@dataclass
class ConvPlan:
    """What becomes of one convolution module."""

    module: Conv
    names: list[str]
    left_alone: str = ""
    activation: Activation = NONE
    batch_norm: nn.Module | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass
class Analysis:
    """All that `optimize` needs to know; modules and nodes by identity."""

    model: nn.Module
    convs: dict[int, ConvPlan]
    traces: list[ForwardTrace]
    untraceable: dict[str, str]
    pairs: list[Pair]
    absorbed: dict[Key, set[int]]
    hidden: dict[Key, str]
    names: dict[int, list[str]]


def analyse(model: nn.Module, mode: str) -> Analysis:
    """Trace every forward of the model and decide; `mode` is train or inference."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    traces, untraceable, hidden, choices = _trace_all(model)
    held = modules_held_outside(model)
    for identity, place in held.items():
        hidden.setdefault(("module", identity), f"is also held by the plain attribute {place}")
    convs = {
        id(module): ConvPlan(
            module, names[id(module)], _why_left_alone(model, module, names[id(module)][0], held)
        )
        for module in model.modules()
        if is_convolution(module) and not isinstance(module, FUSED_TYPES)
    }
    finder = _Finder(traces, convs, hidden, choices, names)
    if mode == "inference":
        finder.fold_batch_norms()
    pairs = finder.pairs()
    absorbed = finder.absorb(pairs)
    return Analysis(model, convs, traces, untraceable, pairs, absorbed, hidden, names)


def _why_left_alone(model: nn.Module, module: Conv, name: str, held: dict[int, str]) -> str:
    if module is model:
        return "is the model itself, which keeps its class: wrap it in nn.Sequential"
    reason = why_not_eligible(module)
    if not reason and id(module) in held:
        reason = f"is also held by the plain attribute {held[id(module)]}"
    if not reason and "_orig_mod" in name:
        reason = "is inside a compiled module: optimize first, then compile"
    if not reason:
        try:
            fused_module(module, NONE, "auto")
        except ValueError as error:
            reason = str(error)
    return reason


def has_forward(module: nn.Module) -> bool:
    """Whether the forward is worth a graph: torch's layers are leaves, its Sequential is not."""
    if isinstance(module, (torch.jit.ScriptModule, nn.ModuleList, nn.ModuleDict)):
        return False
    if type(module).__module__.split(".")[0] == "torch" and not isinstance(module, fx.GraphModule):
        return type(module) is nn.Sequential and len(module) > 0
    return not is_convolution(module)


def _trace_all(
    model: nn.Module,
) -> tuple[list[ForwardTrace], dict[str, str], dict[Key, str], dict[int, str]]:
    """The traces, the forwards without one, what code outside of them may call, and the modules
    whose traces do not show all that may run; each with the reason.
    """
    traces: list[ForwardTrace] = []
    untraceable: dict[str, str] = {}
    hidden: dict[Key, str] = {}
    choices: dict[int, str] = {}
    for name, module in model.named_modules():
        own: list[ForwardTrace] = []
        if has_forward(module):
            try:
                if "forward" in vars(module):
                    raise UntraceableError("its forward is set on the instance")
                own = _traces_of(module, name)
            except UntraceableError as error:
                untraceable[name] = str(error)
        for key, reason in hidden_uses(module, name, own).items():
            hidden.setdefault(key, reason)
        others, choices[id(module)] = explore(own)
        traces += own + others
        for part in (part for trace in own + others for part in trace.direct):
            reason = f"also runs in {name or type(module).__name__} by the name of its forward"
            hidden.setdefault(module_key(part), reason)
    return traces, untraceable, hidden, choices


def _traces_of(module: nn.Module, name: str) -> list[ForwardTrace]:
    """In training and in eval mode. Where an argument decides what runs, as in `features=False`,
    with its default and with the other value.
    """
    modes = (True, False)
    try:
        return [trace_forward(module, name, training) for training in modes]
    except UntraceableError as error:
        defaults = _flags(module) if isinstance(error.__cause__, fx.proxy.TraceError) else {}
        if not defaults:
            raise
    found = []
    for training in modes:
        found.append(trace_forward(module, name, training, arguments=defaults))
        for flag, value in defaults.items():
            other = {**defaults, flag: not value}
            trace = trace_forward(module, name, training, arguments=other)
            trace.tried = flag
            found.append(trace)
    return found


def _flags(module: nn.Module) -> dict[str, bool]:
    """The forward's arguments that are True or False unless given, with these defaults."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {each.name: each.default for each in parameters if isinstance(each.default, bool)}


class _Finder:
    """The traces, indexed by what they call."""

    def __init__(
        self,
        traces: list[ForwardTrace],
        convs: dict[int, ConvPlan],
        hidden: dict[Key, str],
        choices: dict[int, str],
        names: dict[int, list[str]],
    ) -> None:
        self.convs = convs
        self.hidden = hidden
        self.choices = choices
        self.names = names
        self.uses: dict[Key, list[tuple[ForwardTrace, fx.Node]]] = {}
        self.mutated = mutated_nodes(traces)
        for trace in traces:
            for node in trace.graph.nodes:
                key = _key_of(trace, node)
                if key is not None:
                    self.uses.setdefault(key, []).append((trace, node))

    def conv_uses(self, plan: ConvPlan) -> list[tuple[ForwardTrace, fx.Node]]:
        return self.uses.get(module_key(plan.module), [])

    def tail(self, plan: ConvPlan, node: fx.Node) -> fx.Node:
        """The convolution's node, or that of the BatchNorm folded into it."""
        return next(iter(_value_users(node))) if plan.batch_norm is not None else node

    def pairs(self) -> list[Pair]:
        """Every activation that reads a convolution's output, or a BatchNorm's behind one."""
        return [
            pair
            for plan in self.convs.values()
            for trace, node in self.conv_uses(plan)
            for pair in self._pairs_of(plan, trace, node)
        ]

    def _pairs_of(self, plan: ConvPlan, trace: ForwardTrace, node: fx.Node) -> Iterator[Pair]:
        tail = self.tail(plan, node)
        readers = [(tail, user) for user in _value_users(tail)]
        if plan.batch_norm is None:
            for user in _value_users(node):
                if isinstance(trace.module_of(user), nn.modules.batchnorm._BatchNorm):
                    readers += [(user, later) for later in _value_users(user)]
        for source, user in readers:
            call = _activation_at(trace, user)
            if call is None or not user.args or user.args[0] is not source:
                continue
            pair = Pair(trace, plan.module, node, tail, user, call, _key_of(trace, user))
            pair.broken = self._why_broken(plan, trace, tail, source, user, call)
            if not pair.broken:
                pair.unsafe = self._why_unsafe(plan, trace, pair)
            yield pair

    def _why_broken(
        self,
        plan: ConvPlan,
        trace: ForwardTrace,
        tail: fx.Node,
        source: fx.Node,
        user: fx.Node,
        call: ActivationCall,
    ) -> str:
        conv = plan.names[0]
        if plan.left_alone:
            return f"{conv} {plan.left_alone}"
        if source is not tail:
            norm = type(trace.module_of(source)).__name__
            return f"{norm} stands between {conv} and the activation: its statistics come first"
        if call.spec is None:
            return call.reason
        others = [reader for reader in _value_users(tail) if reader is not user]
        if others:
            return f"the output of {conv} is used twice, also by {_label(trace, others[0])}"
        module = trace.module_of(user)
        if module is not None and (reason := why_not_plain(module)):
            return f"the activation {reason}"
        modes = {trace.sites[node].modes for node in (tail, user)}
        if len(modes) > 1:
            return "the grad or autocast mode changes between convolution and activation"
        if call.spec.name == "leaky_relu" and not call.inplace and user in self.mutated:
            return "its output is changed in place later, but the fused op saves it for backward"
        return ""

    def _why_unsafe(self, plan: ConvPlan, trace: ForwardTrace, pair: Pair) -> str:
        if pair.key is None:
            return "the activation is a call in the forward's code"
        for key, what in ((module_key(plan.module), plan.names[0]), (pair.key, "the activation")):
            if key in self.hidden:
                return f"{what} {self.hidden[key]}"
        choice = self.choices[id(trace.owner)]
        return choice or why_not_straight(trace, pair.tail, pair.act_node)

    def fold_batch_norms(self) -> None:
        """Mark convolutions whose every use feeds one BatchNorm that nothing else uses."""
        for plan in self.convs.values():
            if plan.left_alone:
                continue
            uses = self.conv_uses(plan)
            norms = {id(m): m for t, n in uses for m in (self._only_reader(t, n),) if m is not None}
            if not uses or len(norms) != 1:
                continue
            (norm,) = norms.values()
            reason = self._why_not_folded(plan, norm, uses)
            if reason:
                plan.remarks.append(f"BatchNorm {self.names[id(norm)][0]} not folded: {reason}")
            else:
                plan.batch_norm = norm

    @staticmethod
    def _only_reader(trace: ForwardTrace, node: fx.Node) -> nn.Module | None:
        readers = _value_users(node)
        module = trace.module_of(readers[0]) if len(readers) == 1 else None
        return module if isinstance(module, nn.BatchNorm2d) else None

    def _why_not_folded(
        self, plan: ConvPlan, norm: nn.Module, uses: list[tuple[ForwardTrace, fx.Node]]
    ) -> str:
        if type(norm) is not nn.BatchNorm2d:
            return f"{type(norm).__name__} is a subclass of BatchNorm2d"
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return "it uses the statistics of the batch"
        if reason := why_not_plain(norm):
            return f"it {reason}"
        for key in (module_key(norm), module_key(plan.module)):
            if key in self.hidden:
                return self.hidden[key]
        followers = set()
        for trace, node in uses:
            reader = next(iter(_value_users(node)), None)
            if (
                reader is None
                or self._only_reader(trace, node) is not norm
                or reader.args != (node,)
            ):
                return "the convolution is also used without it"
            choice = self.choices[id(trace.owner)]
            if reason := choice or why_not_straight(trace, node, reader):
                return reason
            followers.add(reader)
        if any(node not in followers for _, node in self.uses[module_key(norm)]):
            return "it is also used elsewhere"
        return ""

    def absorb(self, pairs: list[Pair]) -> dict[Key, set[int]]:
        """The activations to absorb, with the convolutions that take them; sets the plans'
        activation.

        Starts from every pair that could be replaced and drops, until nothing changes, each
        convolution with a use outside the pairs and each activation with a use outside the
        convolutions that are left.
        """
        by_conv: dict[int, list[Pair]] = {}
        for pair in pairs:
            if not pair.broken and not pair.unsafe:
                by_conv.setdefault(id(pair.conv), []).append(pair)
        outside: dict[int, str] = {}

        def drop(test: Callable[[int, list[Pair]], str]) -> bool:
            reasons = {identity: test(identity, own) for identity, own in by_conv.items()}
            for identity, reason in reasons.items():
                if reason:
                    outside[identity] = reason
                    del by_conv[identity]
            return any(reasons.values())

        def uneven(identity: int, own: list[Pair]) -> str:
            plan = self.convs[identity]
            if len({pair.act_node for pair in own}) != len(self.conv_uses(plan)):
                return f"{plan.names[0]} is also used without the activation"
            if len({pair.call.spec for pair in own}) > 1:
                return f"{plan.names[0]} is used with different activations"
            return ""

        def shared(identity: int, own: list[Pair]) -> str:
            taken = {pair.act_node for rest in by_conv.values() for pair in rest}
            for pair in own:
                if any(node not in taken for _, node in self.uses[pair.key or ()]):
                    return "the activation is shared: it is also used where it cannot be fused"
            return ""

        drop(uneven)
        while drop(shared):
            pass
        absorbed: dict[Key, set[int]] = {}
        for identity, own in by_conv.items():
            assert own[0].call.spec is not None
            self.convs[identity].activation = own[0].call.spec
            for pair in own:
                absorbed.setdefault(pair.key or (), set()).add(identity)
        for pair in pairs:
            if not pair.broken and not pair.unsafe and id(pair.conv) in outside:
                pair.unsafe = outside[id(pair.conv)]
        return absorbed


def _value_users(node: fx.Node) -> list[fx.Node]:
    """Who reads a node's values; its shape, which an activation does not change, does not count."""
    return [user for user in node.users if not _reads_shape(user)]


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return (
        node.op == "call_function"
        and node.target is getattr
        and len(node.args) > 1
        and node.args[1] in _SHAPE_ATTRIBUTES
    )


def _key_of(trace: ForwardTrace, node: fx.Node) -> Key | None:
    module = trace.module_of(node)
    if module is not None:
        return module_key(module)
    if isinstance(node.target, AttributeCall):
        return attribute_key(trace.owner, node.target.attribute)
    return None


def _activation_at(trace: ForwardTrace, node: fx.Node) -> ActivationCall | None:
    module = trace.module_of(node)
    if module is not None:
        return act.of_module(module)
    if node.op == "call_method" and node.target in act.RELU_METHODS:
        return ActivationCall("relu", act.RELU, inplace=node.target == "relu_")
    if node.op != "call_function":
        return None
    function = node.target.function if isinstance(node.target, AttributeCall) else node.target
    return act.of_function(function, node.args[1:], node.kwargs)


def _label(trace: ForwardTrace, node: fx.Node) -> str:
    if node.op == "output":
        return "the forward's result"
    if node.op == "call_module":
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
