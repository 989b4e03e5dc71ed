# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of `optimize(mode="inference")` share: models beside their plain copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from segpose_kernels.swap import SwapReport, optimize
from segpose_kernels.swap.blueprint import FIXED
from segpose_kernels.swap.inference import InferenceForward, Program

Build = Callable[[], nn.Module]


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and parameters that are not their neutral defaults."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same(model: nn.Module, plain: nn.Module, x: Tensor, when: str = "") -> None:
    """The same to rounding of float64; memory formats are the plain model's."""
    expected, found = leaves(plain(x)), leaves(model(x))
    assert len(expected) == len(found)
    for i, (value, reference) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            value, reference, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"output {i} {when}: {m}"
        )


def program_of(model: nn.Module) -> Program:
    forward = vars(model)["forward"]
    assert isinstance(forward, InferenceForward)
    return forward.build()


def optimized(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module, SwapReport]:
    """The model under inference mode, a plain copy, and the report."""
    model = randomised(model)
    plain = copy.deepcopy(model)
    _, report = optimize(model, mode="inference", **options)
    return model, plain, report


def run_steps(code: Sequence[int], tensors: Sequence[Tensor]) -> bool:
    """The steps of a sequence between these tensors; False where a convolution is not current."""
    places = [number for i in range(len(tensors)) for number in (FIXED, i, 0, 0, 0, 0, 0)]
    handle = torch.ops.segpose.prepare_sequence(code, places, tensors)
    try:
        done, results = torch.ops.segpose.run_sequence(handle, [])
    finally:
        torch.ops.segpose.release_sequence(handle)
    assert not results
    return bool(done)
