# SPDX-License-Identifier: BSD-3-Clause
"""Measuring in the middle of a program that must not notice it.

A call that is measured (fastest.py) runs the candidates many times, with gradients. Neither the
random numbers of the program nor its hooks on saved tensors may see that: dropout would draw other
masks, and a checkpointed layer would count other tensors. A mode or a tracer cannot be kept from
seeing operators, so nothing is measured under one.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["draw_like", "hidden_from_hooks", "is_watched"]


def is_watched() -> bool:
    """Whether a dispatch mode, a tracer or anomaly mode looks at the operators that run.

    A function mode does not: it has handed the call on, and is off until that returns.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.is_anomaly_enabled()
    )


def hidden_from_hooks() -> contextlib.AbstractContextManager[object]:
    """What runs inside saves its tensors without the hooks that are set outside."""
    # Not where there are none: hooks cost time, and torch may have forbidden them.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def draw_like(tensor: Tensor) -> Tensor:
    """Normal random numbers in the format of `tensor`, from a generator of their own.

    Not constants: a GPU multiplies those faster, since it needs less power for them.
    """
    generator = torch.Generator(tensor.device).manual_seed(0)
    return torch.empty_like(tensor).normal_(generator=generator)
