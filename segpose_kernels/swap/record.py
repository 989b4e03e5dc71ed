# SPDX-License-Identifier: BSD-3-Clause
"""One run of a model with the calls of its convolutions recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .eligible import FUSED_TYPES, Conv, is_convolution
from .journal import journal_of


@dataclass
class LayerCall:
    """One call of a convolution: `output` is after the activation of a fused module."""

    name: str
    module: Conv
    input: Tensor
    output: Tensor
    output_size: list[int] | None

    @property
    def fused(self) -> bool:
        return isinstance(self.module, FUSED_TYPES)


def record_calls(model: nn.Module, x: Any) -> list[LayerCall]:
    """Run the model once and list the calls of its convolutions.

    `x` is the input; a tuple or list is passed as positional arguments, a mapping as keywords.

    No gradients; buffers that the run changes (BatchNorm statistics) are put back, and so is the
    state of the random number generator.
    """
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if is_convolution(module)
    }
    calls: list[LayerCall] = []

    def note(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        rest = dict(zip(("input", "output_size"), args, strict=False)) | kwargs
        assert is_convolution(module)
        calls.append(
            LayerCall(
                names[module] or type(module).__name__,
                module,
                rest["input"].detach().clone(),
                output.detach(),
                rest.get("output_size"),
            )
        )

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in names]
    try:
        run_once(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def run_once(model: nn.Module, x: Any) -> None:
    """Run the model on `x` as in `record_calls`, and put back what the run changes."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(x, Mapping):
                model(**x)
            elif isinstance(x, Sequence) and not isinstance(x, Tensor):
                model(*x)
            else:
                model(x)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def rewritten_activations(model: nn.Module) -> dict[str, str]:
    """The activation of each fused layer as reported, one in a rewritten forward included."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        journal = journal_of(module)
        for row in journal.report.fused if journal is not None else ():
            found[f"{prefix}.{row.name}".lstrip(".")] = row.activation
    return found
