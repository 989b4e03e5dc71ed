# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark mode measures in the middle of a program, which must not notice it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from segpose_kernels import Conv2dAct, ConvTranspose2dAct, conv2d_act, fastest, optimize
from segpose_kernels.backends import LIBRARY

pytestmark = [
    pytest.mark.skipif(not LIBRARY.has_kernels_for("CPU"), reason="the C++ library is not loaded"),
    pytest.mark.usefixtures("own_cache"),
]


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """The calls that were measured; benchmark mode is on."""
    calls: list[Callable[[], object]] = []

    def measure(call: Callable[[], object]) -> float:
        calls.append(call)
        call()
        return float(len(calls))

    monkeypatch.setattr(fastest, "enabled", True)
    monkeypatch.setattr(fastest, "_winners", {})
    monkeypatch.setattr(fastest, "measure_ms", measure)
    return calls


def layers() -> nn.Sequential:
    """Two layers that are measured on their first call, with a dropout between them."""
    return nn.Sequential(
        Conv2dAct(3, 8, 3, padding=1), nn.Dropout(0.5), ConvTranspose2dAct(8, 4, 2, stride=2)
    )


def gradients(
    model: nn.Sequential, x: Tensor, run: Callable[..., Tensor], **arguments: Any
) -> list[Tensor]:
    """Of the parameters and of x, with the dropout of one seed."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    run(model, leaf, **arguments).pow(2).sum().backward()
    grads = [tensor.grad for tensor in (leaf, *model.parameters())]
    assert all(grad is not None for grad in grads)
    return grads  # type: ignore[return-value]


def plainly(model: nn.Sequential, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


def test_random_numbers_are_the_programs(measured: list[Callable[[], object]]) -> None:
    first, _, last = layers()
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    state = torch.get_rng_state()
    last(first(x))
    assert len(measured) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_of_a_prepared_model() -> None:
    model, _ = optimize(nn.Sequential(nn.Conv2d(40, 48, 3, padding=1)).eval(), mode="inference")
    x = torch.randn(1, 40, 20, 17)
    state = torch.get_rng_state()
    with torch.no_grad():
        model(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_checkpointed_layers(
    reentrant: bool, measured: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run draws the masks of the first, and saves as many tensors."""
    model, x = layers(), torch.randn(2, 3, 6, 5)
    with monkeypatch.context() as patch:
        patch.setattr(fastest, "enabled", False)
        expected = gradients(model, x, plainly)
    assert not measured
    actual = gradients(model, x, checkpoint, use_reentrant=reentrant)
    assert measured
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_hooks_see_the_calls_own_tensors(measured: list[Callable[[], object]]) -> None:
    """Input, weight and output: those of the call, not those of the candidates."""
    layer, x = layers()[0], torch.randn(2, 3, 6, 5)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert measured
    assert len(kept) == 3


def test_hooks_may_be_forbidden(measured: list[Callable[[], object]]) -> None:
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        layers()[0](torch.randn(2, 3, 6, 5))
    assert measured


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def anomalies() -> Any:
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        yield


@pytest.mark.parametrize("mode", [Seen, anomalies], ids=["dispatch", "anomaly"])
def test_nothing_is_measured_while_watched(
    mode: Callable[[], Any], measured: list[Callable[[], object]]
) -> None:
    """And a watched call takes its default also where a measurement has found another."""
    layer, x = layers()[0], torch.randn(2, 3, 6, 5)
    with mode():
        layer(x)
    assert not measured
    layer(x)
    assert measured
    fastest._winners = dict.fromkeys(fastest._winners, "aten")
    with Seen() as seen:
        layer(x)
    assert "segpose::conv2d_act" in seen.names


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_is_measured_in_a_trace(measured: list[Callable[[], object]]) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(layers()[0], torch.randn(2, 3, 6, 5), check_trace=False)
    assert not measured
    assert [node.kind() for node in traced.inlined_graph.nodes()][-1] == "segpose::conv2d_act"


class Called(TorchFunctionMode):
    """The functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[object] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


def test_function_modes_see_the_call_alone(measured: list[Callable[[], object]]) -> None:
    x, w = torch.randn(2, 3, 6, 5), torch.randn(8, 3, 3, 3)
    with Called() as called:
        conv2d_act(x, w)
    assert measured
    assert called.functions == [conv2d_act]
