# SPDX-License-Identifier: BSD-3-Clause
"""What was changed in a model, kept on it, so that its copies can be restored too."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .activation import Activation
from .eligible import FUSED_TYPES, JOURNAL, Fused
from .forward import OwnForward
from .layout import contiguous_outputs
from .pieces import fold, keep_folded, own_attributes
from .report import SwapReport


@dataclass(eq=False)
class StandIn:
    """A module in another's place; `kind` and `attributes` are its class and its own then.

    The two share their tables of parameters, buffers, children and hooks (`pieces.take_place`).
    """

    old: nn.Module
    new: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]

    def obstacle(self) -> str:
        """What the old module could not take over, and what to do; empty where it can all."""
        if parametrize.is_parametrized(self.new):
            return (
                "has a parametrization: remove it first, by "
                "torch.nn.utils.parametrize.remove_parametrizations, and add it again afterwards"
            )
        if type(self.new) is not self.kind:
            name = type(self.new).__name__
            return f"became a {name}: set its class to {self.kind.__name__} first"
        if "forward" in vars(self.new):
            return (
                "has a forward of its own set on the instance: delete that attribute first, and "
                "set one for the plain module afterwards"
            )
        if vars(self.new).get("_compiled_call_impl") is not None:
            return "is compiled: set its _compiled_call_impl to None first"
        return ""

    def hand_over(self) -> None:
        """Give the old module what was set on the new one since then."""
        old, new = vars(self.old), vars(self.new)
        own = own_attributes(self.new)
        for name in {**self.attributes, **new}:
            if name in own:
                continue
            if name not in new:
                old.pop(name, None)
            elif name not in self.attributes or new[name] is not self.attributes[name]:
                old[name] = new[name]
        keep_folded(self.new, self.old)
        hooks: list[Any] = list(self.old._load_state_dict_pre_hooks.values())
        for hook in hooks:
            # torch's wrapper of a hook that is given its module.
            if getattr(hook, "with_module", False) and hook.module() is self.new:
                hook.module = weakref.ref(self.old)


@dataclass(eq=False)
class Absorbed:
    """An activation inside convolutions, with its slope then. `module` is None for one that is not
    a LeakyReLU module.
    """

    module: nn.LeakyReLU | None
    convs: list[Fused]
    slope: float

    def new_slope(self) -> float | None:
        """What all its convolutions agree on now; None where the module could not say it."""
        agreed = {(conv.activation, conv.negative_slope) for conv in self.convs}
        if self.module is None or len(agreed) > 1 or self.convs[0].activation != "leaky_relu":
            return None
        return self.convs[0].negative_slope


@dataclass
class Journal:
    """Every change, with what stood there before.

    Attributes:
        modules: (parent, attribute, old, new) for each replaced module.
        stand_ins: each new module of those, once.
        absorbed: the activations that run inside convolutions now.
        attributes: (owner, attribute, old, new) for each replaced callable attribute.
        forwards: modules that got a forward of their own.
        formats: (module, parameter name, shape, strides) of each parameter whose memory format
            was changed.
        folds: convolutions that hold folded tensors, with their BatchNorm.
        options: the arguments of `optimize`, to tell a repeated call.
        layers: names and types of all modules afterwards, for the same purpose.
        owner: the model.
    """

    owner: nn.Module
    report: SwapReport
    options: dict[str, Any]
    modules: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(default_factory=list)
    stand_ins: list[StandIn] = field(default_factory=list)
    absorbed: list[Absorbed] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)
    forwards: list[nn.Module] = field(default_factory=list)
    formats: list[tuple[nn.Module, str, torch.Size, tuple[int, ...]]] = field(default_factory=list)
    folds: list[tuple[Fused, nn.BatchNorm2d]] = field(default_factory=list)
    layers: list[tuple[str, str]] = field(default_factory=list)

    def replace_module(self, parent: nn.Module, attribute: str, new: nn.Module) -> None:
        """Put `new` in a child's place, keeping its position."""
        old = parent._modules[attribute]
        assert old is not None
        self.modules.append((parent, attribute, old, new))
        if not self.stand_ins or self.stand_ins[-1].new is not new:
            self.stand_ins.append(StandIn(old, new, type(new), dict(vars(new))))
        parent._modules[attribute] = new

    def replace_attribute(self, owner: nn.Module, attribute: str, new: Any) -> None:
        """Put `new` in place of a plain attribute."""
        self.attributes.append((owner, attribute, vars(owner)[attribute], new))
        vars(owner)[attribute] = new

    def set_forward(self, owner: nn.Module, forward: Any) -> None:
        """Set a forward on the instance, over one set before."""
        vars(owner)["forward"] = forward
        if owner not in self.forwards:
            self.forwards.append(owner)

    def to_channels_last(self, module: nn.Module) -> None:
        """Reorder a 4-d weight in place, and its gradient; the Parameter object stays."""
        weight = module._parameters["weight"]
        assert weight is not None
        _, channels, rows, columns = weight.shape
        # Written out: where an extent is 1, a contiguous weight passes for channels_last and yet
        # does not ask for channels_last results.
        strides = (rows * columns * channels, 1, columns * channels, channels)
        if weight.stride() == strides:
            return
        self.formats.append((module, "weight", weight.shape, weight.stride()))
        _reorder(weight, strides)

    def check(self) -> None:
        """Raise RuntimeError for what `undo` would lose."""
        names = {id(module): name for name, module in self.owner.named_modules()}
        found = {
            names.get(id(stand_in.new), attribute): obstacle
            for _, attribute, stand_in in self._places()
            if (obstacle := stand_in.obstacle() or self._other_activation(stand_in))
        }
        if found:
            raise RuntimeError(
                "segpose_kernels: the model cannot be restored, which optimize with other "
                "arguments does first, and was left as it is: a plain module could not take over "
                "what was changed in the one that stands in its place:"
                + "".join(f"\n  {name} {obstacle}" for name, obstacle in found.items())
            )

    def undo(self, *, keep_formats: bool = False) -> None:
        """Put everything back; what the user has replaced since is left as it is. `keep_formats`:
        weights stay in the memory format that they have.
        """
        for owner in self.forwards:
            if isinstance(vars(owner).get("forward"), OwnForward):
                del vars(owner)["forward"]
        for owner, attribute, old, new in reversed(self.attributes):
            if vars(owner).get(attribute) is new:
                vars(owner)[attribute] = old
        for module, name, shape, strides in self.formats:
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.shape == shape and not keep_formats:
                _reorder(parameter, strides)
        for parent, attribute, stand_in in list(self._places()):
            parent._modules[attribute] = stand_in.old
        for stand_in in self.stand_ins:
            stand_in.hand_over()
        for absorbed in self.absorbed:
            slope = absorbed.new_slope()
            if absorbed.module is not None and slope not in (None, absorbed.slope):
                vars(absorbed.module)["negative_slope"] = slope
        self.unhook()
        loading = self.owner._load_state_dict_post_hooks
        for key in [key for key, hook in loading.items() if hook is refold]:
            del loading[key]
        vars(self.owner).pop(JOURNAL, None)

    def _other_activation(self, stand_in: StandIn) -> str:
        """Whether a convolution's activation became one that no module of the plain model takes."""
        conv = stand_in.new
        if not isinstance(conv, FUSED_TYPES):
            return ""
        before, now = map(_activation_of, (stand_in.attributes, vars(conv)))
        if before == now:
            return ""
        slopes = [each.new_slope() for each in self.absorbed if conv in each.convs]
        if slopes and None not in slopes:
            return ""
        return (
            f"computes {now} where optimize put {before}: set its activation and negative_slope "
            "back first, and change the plain model's activation afterwards"
        )

    def _places(self) -> Iterator[tuple[nn.Module, str, StandIn]]:
        """Where the new modules are now: (parent, attribute, module)."""
        by_module = {id(stand_in.new): stand_in for stand_in in self.stand_ins}
        parents = {id(parent): parent for parent, *_ in self.modules}
        parents |= {id(module): module for module in self.owner.modules()}
        for parent in parents.values():
            for attribute, child in parent._modules.items():
                if id(child) in by_module:
                    yield parent, attribute, by_module[id(child)]

    def hook(self) -> None:
        """Give the caller contiguous outputs."""
        self.owner.register_forward_hook(contiguous_outputs, with_kwargs=True)

    def hook_loading(self) -> None:
        """Fold again whenever a checkpoint is loaded into the model."""
        self.owner.register_load_state_dict_post_hook(refold)  # type: ignore[no-untyped-call]

    def unhook(self) -> None:
        """Leave outputs as they are."""
        hooks = self.owner._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is contiguous_outputs]:
            del hooks[key]
            self.owner._forward_hooks_with_kwargs.pop(key, None)


def _activation_of(attributes: dict[str, Any]) -> Activation:
    """That of a fused module; a slope that decides nothing is left out."""
    name = attributes["activation"]
    if name == "leaky_relu":
        return Activation(name, attributes["negative_slope"])
    return Activation(name)


def _reorder(parameter: nn.Parameter, strides: tuple[int, ...]) -> None:
    """Give the parameter, and a gradient that lay as it did, these strides."""
    before, gradient = parameter.stride(), parameter.grad
    # Data of inference mode could not be trained.
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.data = _ordered(parameter.data, strides)
        # Fused optimizers walk through both as they lie in memory.
        strided = gradient is not None and gradient.layout is torch.strided
        if gradient is not None and strided and gradient.stride() == before:
            parameter.grad = _ordered(gradient, strides)


def _ordered(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


def refold(model: nn.Module, incompatible_keys: Any) -> None:
    """Hook of `load_state_dict`: the folded tensors follow the parameters just loaded."""
    journal = journal_of(model)
    for conv, norm in journal.folds if journal is not None else ():
        fold(conv, norm)


def layers_of(model: nn.Module) -> list[tuple[str, str]]:
    """Names and types of all modules."""
    return [(name, type(module).__name__) for name, module in model.named_modules()]


def journal_of(model: nn.Module) -> Journal | None:
    """The journal of an optimized model, None for a plain one."""
    journal = vars(model).get(JOURNAL)
    return journal if isinstance(journal, Journal) else None
