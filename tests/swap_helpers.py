# SPDX-License-Identifier: BSD-3-Clause
"""How the tests of `optimize` compare a swapped model with a plain one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from segpose_kernels.swap import SwapReport, optimize, restore

# Plain and swapped models compute in float64, so that only a difference of meaning can show.
TOLERANCE = 1e-9

IMAGE = (2, 3, 16, 16)


def tree_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything `restore` must bring back: module and attribute identities, hooks, strides."""
    rows: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        own = {k: id(v) for k, v in vars(module).items() if not k.startswith("_")}
        hooks = len(module._forward_hooks), len(module._load_state_dict_post_hooks)
        rows.append((name, id(module), own, hooks))
    rows += [(name, id(p), p.stride()) for name, p in model.named_parameters()]
    return rows


def run(model: nn.Module, x: Tensor, seed: int = 7) -> dict[str, Tensor]:
    """Outputs, gradients and new statistics of one step; the statistics stay as they were."""
    torch.manual_seed(seed)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = x.clone().requires_grad_()
    model.zero_grad()
    outputs = [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    loss = sum(
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()
        for output in outputs
    )
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if loss.requires_grad:
        loss.backward()
        values["grad of input"] = x.grad
        values |= {
            f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None
        }
    for name, buffer in model.named_buffers():
        values[name] = buffer.clone()
        buffer.data.copy_(buffers[name])
    return values


def assert_same(plain: nn.Module, swapped: nn.Module, x: Tensor) -> None:
    mode = plain.training
    for training in (not mode, mode):
        expected, found = run(plain.train(training), x), run(swapped.train(training), x)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name],
                value,
                rtol=TOLERANCE,
                atol=TOLERANCE,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def swap_and_check(model: nn.Module, shape: tuple[int, ...] = IMAGE, **options: Any) -> SwapReport:
    """Swap, compare with a plain copy in both modes, and check that `restore` brings everything
    back.
    """
    model = model.double()
    plain = copy.deepcopy(model)
    x = torch.randn(shape, dtype=torch.float64)
    before, keys = tree_of(model), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    same, report = optimize(model, **options)
    assert same is model
    assert type(model) is type(plain)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert_same(plain, model, x)
    assert_same(plain, copy.deepcopy(model), x)
    if "<locals>" not in type(model).__qualname__:
        assert_same(plain, pickle.loads(pickle.dumps(model)), x)
    restore(model)
    assert tree_of(model) == before
    assert_same(plain, model, x)
    return report


def activations(report: SwapReport) -> dict[str, str]:
    return {row.name: row.activation for row in report.fused}
