# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of an nn.Sequential that follow each other run as one node of the autograd graph.

In training mode `optimize` sets a forward on each Sequential that holds such runs. It takes the
short way only where the modules' own forwards would do the same: plain tensors on the CPU kernels,
no hooks, no autocast, no transform, nothing that watches. Everything else runs module by module,
and so do bad arguments, which the operators then name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .. import backends, fastest
from ..chain import Chain, native_layer
from .eligible import CONV_ATTRIBUTES, DTYPES, FUSED_TYPES, Fused, why_not_plain
from .filters import is_unwatched, slope_of
from .flatten import Guards
from .forward import OwnForward
from .layout import is_contiguous
from .pieces import AbsorbedActivation
from .unchanged import Unchanged

# A chain keeps all its values until its backward is done; beyond this they would be missed, and the
# way through Python would not.
MOST_BYTES = 64 << 20
# Input shapes that are remembered.
_MOST_SHAPES = 256


def can_join(module: nn.Module) -> bool:
    """Whether a fused convolution computes what a layer of a chain does."""
    return (
        isinstance(module, FUSED_TYPES)
        and type(module) in FUSED_TYPES
        and not why_not_plain(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.backend in ("auto", "cpu")
        and _is_fusible(slope_of(module.activation, module.negative_slope))
    )


def _is_fusible(slope: float | None) -> bool:
    return isinstance(slope, (float, int)) and math.isfinite(slope)


class Run:
    """Modules that follow each other, convolutions and what was absorbed in them, as one chain."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.convs: list[Fused] = [m for m in modules if isinstance(m, FUSED_TYPES)]
        self.has_bias = [conv.bias is not None for conv in self.convs]
        self.chain = Chain(
            [
                native_layer(isinstance(c, nn.ConvTranspose2d), _params(c), b)
                for c, b in zip(self.convs, self.has_bias, strict=True)
            ]
        )
        self.guards = Guards()
        for module in self.modules:
            self.guards.watch_call(module)
        for conv in self.convs:
            for name in CONV_ATTRIBUTES:
                self.guards.equal(conv, name, getattr(conv, name))
        # The parameters as they were last found, and what has to hold for them. Replaced as a
        # whole: other threads read it.
        self.known: tuple[list[Tensor], Unchanged] | None = None
        # By shape and dtype of the input: whether the chain may run.
        self.seen: dict[tuple[torch.Size, torch.dtype], bool] = {}

    def __call__(self, x: Tensor) -> Tensor:
        output = self.run(x)
        if output is not None:
            return output
        for module in self.modules:
            x = module(x)
        return x

    def run(self, x: Tensor, *, keep_format: bool = False) -> Tensor | None:
        """The output of the chain, None where it may not run. `keep_format`: of a contiguous input
        it is contiguous.
        """
        if x.__class__ is not Tensor or not x.is_cpu or x.dim() != 4:
            return None
        if x.layout is not torch.strided or not self.guards.hold():
            return None
        known = self.known
        if known is None or not known[1].hold():
            known = self.known = self._find_parameters()
            if known is None:
                return None
        parameters = known[0]
        if x.dtype is not parameters[0].dtype:
            return None
        if not torch._C._any_requires_grad(x, *parameters):
            return None
        key = x.shape, x.dtype
        runs = self.seen.get(key)
        if runs is None:
            if len(self.seen) >= _MOST_SHAPES:
                self.seen.clear()
            runs = self.seen[key] = self._can_run(x)
        if not runs:
            return None
        # The strides of an empty result say nothing.
        contiguous = keep_format and is_contiguous(x) and x.shape[0] > 0
        return self.chain(x, parameters, contiguous=contiguous)

    def _find_parameters(self) -> tuple[list[Tensor], Unchanged] | None:
        """Those of a chain, all of one dtype and on CPU, and what was looked at."""
        found = Unchanged()
        parameters: list[Tensor] = []
        for conv, has_bias in zip(self.convs, self.has_bias, strict=True):
            table = conv._parameters
            weight, bias = table.get("weight"), table.get("bias")
            if set(table) != {"weight", "bias"} or (bias is not None) != has_bias:
                return None
            found.values(conv, "_parameters")
            for tensor in (weight, bias) if has_bias else (weight,):
                if tensor is None or type(tensor) is not nn.Parameter:
                    return None
                parameters.append(tensor)
        dtype = parameters[0].dtype
        if dtype not in DTYPES or any(p.dtype != dtype or not p.is_cpu for p in parameters):
            return None
        for parameter in parameters:
            found.equal(parameter, "dtype", dtype)
            found.equal(parameter, "is_cpu", True)
            found.equal(parameter, "shape", parameter.shape)
        return parameters, found

    def _can_run(self, x: Tensor) -> bool:
        """Whether the operators take the shape, on these kernels and in little memory. They are
        asked with an empty batch; what they reject, they reject again with the whole one.
        """
        if any(backends.select(conv.backend, "cpu", x.dtype) != "cpu" for conv in self.convs):
            return False
        size = 0
        try:
            with torch.no_grad():
                y = x[:0]
                for module in self.modules:
                    y = module(y)
                    size += x.shape[0] * y.shape[1:].numel() * y.element_size()
        except (RuntimeError, ValueError, TypeError):
            return False
        return size <= MOST_BYTES


def _params(conv: Fused) -> tuple[Any, ...]:
    """The operator's arguments after the tensors."""
    slope = slope_of(conv.activation, conv.negative_slope)
    if isinstance(conv, nn.ConvTranspose2d):
        return conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation, slope
    return conv.stride, conv.padding, conv.dilation, conv.groups, slope


def _segments(modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """The modules in order, what can run as a chain together."""
    run: list[nn.Module] = []
    for module in modules:
        joins = can_join(module) or (
            run and type(module) is AbsorbedActivation and not why_not_plain(module)
        )
        if joins:
            run.append(module)
            continue
        if run:
            yield run
        run = []
        yield [module]
    if run:
        yield run


def _is_chain(segment: Sequence[nn.Module]) -> bool:
    return sum(type(module) in FUSED_TYPES for module in segment) > 1


def may_chain() -> bool:
    """Whether chains may run now, as far as it does not depend on the modules."""
    return is_unwatched() and torch.is_grad_enabled() and not fastest.enabled


class ChainForward(OwnForward):
    """Set as `forward` on a Sequential. Copies and pickles find their runs at the first call."""

    def __init__(self, owner: nn.Sequential) -> None:
        self.owner = owner
        self.modules: tuple[nn.Module | None, ...] = ()
        self.calls: list[Callable[[Tensor], Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "modules": (), "calls": []}

    def _find_runs(self) -> None:
        modules: list[Any] = list(self.owner._modules.values())
        self.calls = [
            call
            for segment in _segments(modules)
            for call in ([Run(segment)] if _is_chain(segment) else segment)
        ]
        self.modules = tuple(modules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if kwargs or len(args) != 1 or not may_chain():
            return type(owner).forward(owner, *args, **kwargs)
        (input,) = args
        if self.modules != tuple(owner._modules.values()):
            self._find_runs()
        for call in self.calls:
            input = call(input)
        return input


def holds_chain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether the module is a Sequential with convolutions that can run as a chain."""
    return (
        isinstance(module, nn.Sequential)
        and module.__class__.forward is nn.Sequential.forward
        and "forward" not in vars(module)
        and any(_is_chain(segment) for segment in _segments(list(module)))
    )
