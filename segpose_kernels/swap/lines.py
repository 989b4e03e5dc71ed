# SPDX-License-Identifier: BSD-3-Clause
"""Models that are one line of convolutions run as one chain (chains.py), whatever their modules.

An autoencoder calls an encoder and a decoder: two chains, and a hook that gives the caller the
memory format of the input. In one line all of it is one node of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .chains import Run, can_join, may_chain
from .eligible import FUSED_TYPES
from .flatten import FlatModel, Guards, flatten
from .forward import OwnForward
from .layout import contiguous_outputs
from .pieces import AbsorbedActivation
from .trace import UntraceableError

_IN_LINES = (*FUSED_TYPES, AbsorbedActivation, nn.Identity)


def _convolutions(flat: FlatModel) -> list[nn.Module] | None:
    """The convolutions in order, None for what is no line of them alone."""
    if len(flat.parameters) != 1 or flat.calls_code:
        return None
    _, value = flat.parameters[0]
    modules: list[nn.Module] = []
    for operation in flat.operations:
        module = operation.target
        if not isinstance(module, nn.Module) or not can_join(module):
            return None
        if operation.args != (value,) or operation.kwargs:
            return None
        modules.append(module)
        value = operation.result
    return modules if flat.output == value and len(modules) > 1 else None


class LineForward(OwnForward):
    """Set as `forward` on a module. Copies and pickles find their line at the first call."""

    def __init__(
        self, owner: nn.Module, inner: Callable[..., Any] | None, *, keeps_format: bool
    ) -> None:
        self.owner = owner
        self.inner = inner
        # Results are contiguous where inputs are.
        self.keeps_format = keeps_format
        self.looked = False
        # What must not have changed, in training and in eval mode.
        self.guards: dict[bool, Guards] = {}
        self.run: Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "looked": False, "guards": {}, "run": None}

    def find(self) -> bool:
        """Whether the owner is a line, the same one in both modes."""
        if not self.looked:
            self.looked = True
            try:
                flats = {mode: flatten(self.owner, training=mode) for mode in (True, False)}
            except UntraceableError:
                return False
            modules = _convolutions(flats[True])
            if modules is not None and modules == _convolutions(flats[False]):
                self.guards = {mode: flat.guards for mode, flat in flats.items()}
                self.run = Run(modules)
        return self.run is not None

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The forward module by module."""
        if self.inner is not None:
            output = self.inner(*args, **kwargs)
        else:
            output = type(self.owner).forward(self.owner, *args, **kwargs)
        if self.keeps_format:
            return contiguous_outputs(self.owner, args, kwargs, output)
        return output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1 and may_chain():
            run = self.run if self.find() else None
            if run is not None and self.guards[bool(self.owner.training)].hold():
                output = run.run(args[0], keep_format=self.keeps_format)
                if output is not None:
                    return output
        return self.plain(*args, **kwargs)


def line_forward(owner: nn.Module, *, keeps_format: bool) -> LineForward | None:
    """A forward for a module that is a line of convolutions, None for others."""
    leaves = [module for module in owner.modules() if not module._modules]
    if len(leaves) < 2 or not all(type(module) in _IN_LINES for module in leaves):
        return None
    forward = LineForward(owner, vars(owner).get("forward"), keeps_format=keeps_format)
    return forward if forward.find() else None
