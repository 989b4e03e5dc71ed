# SPDX-License-Identifier: BSD-3-Clause
"""What `optimize` leaves alone, and why; flags and branches keep their meaning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import swap_flow_models as flow
import swap_models as zoo
import torch
import torch.nn.functional as F
from swap_helpers import IMAGE, activations, assert_same, swap_and_check
from torch import Tensor, nn
from torch.nn.utils import prune

from segpose_kernels.swap import SwapError, optimize

# Name, model, a word of the reason; the activation stays on its own and nothing changes.
SEPARATE: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str]] = [
    ("data-dependent branch", zoo.DataDependent, IMAGE, "cannot be traced"),
    ("tap before the activation", lambda: zoo.Taps((0, 3)), IMAGE, "used twice"),
    ("in-place skip", zoo.InplaceSkip, IMAGE, "changed in place"),
    ("grad mode", zoo.GradMode, IMAGE, "mode changes"),
    ("BatchNorm between", zoo.ResNet, (2, 3, 16, 16), "BatchNorm2d stands between"),
    ("generator with BatchNorm", zoo.generator, (2, 6, 1, 1), "BatchNorm2d stands between"),
    ("plain list", zoo.HeldInList, IMAGE, "plain attribute order"),
]


@pytest.mark.parametrize(
    ("build", "shape", "reason"), [s[1:] for s in SEPARATE], ids=[s[0] for s in SEPARATE]
)
def test_activation_stays_separate(
    build: Callable[[], nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    report = swap_and_check(build(), shape)
    assert any(reason in row.reason for row in report.skipped), report


def test_sliced_sequential() -> None:
    """Its own forward is rewritten; a slice of it takes the modules, which keep their meaning."""
    report = swap_and_check(zoo.Slicing())
    assert activations(report) == {"features.0": "relu", "features.2": "relu"}
    assert "rewritten forward of features" in report["features.0"].reason


def test_value_kept_for_others_stays() -> None:
    model = zoo.Stash()
    x = torch.randn(IMAGE)
    report = optimize(model)[1]
    assert not hasattr(model, "before")
    model(x)
    torch.testing.assert_close(model.before, model.conv(x))
    assert (model.before < 0).any()
    assert "self.before" in report["act"].reason


def test_flags_keep_their_meaning() -> None:
    """Flags that the trace saw in one position only may be turned afterwards."""
    x = torch.randn(IMAGE, dtype=torch.float64)
    for build, flag in (
        (zoo.Flagged, "use_act"),
        (zoo.EarlyExit, "logits"),
        (zoo.SafeFlag, "pool"),
    ):
        model = build().double()
        plain = copy.deepcopy(model)
        optimize(model)
        assert_same(plain, model, x)
        value: Any = nn.MaxPool2d(2) if flag == "pool" else not getattr(plain, flag)
        setattr(plain, flag, value)
        setattr(model, flag, value)
        assert_same(plain, model, x)


@pytest.mark.parametrize(
    "build",
    [
        flow.LocalName,
        flow.OtherValue,
        flow.KeptName,
        flow.Collected,
        flow.BothArms,
        flow.ActivationReused,
        flow.ShortCircuit,
        flow.FunctionalFlag,
        flow.Counted,
    ],
)
def test_branches_keep_their_meaning(build: Callable[[], nn.Module]) -> None:
    """Whatever a flag decides, before or after the swap, the models agree."""
    x = torch.randn(IMAGE, dtype=torch.float64)
    for first, then in ((False, True), (True, False)):
        if build is flow.Counted:
            first, then = (4, 1) if first else (2, 3)
        model = build().double()
        model.flag = first
        plain = copy.deepcopy(model)
        optimize(model)
        assert_same(plain, model, x)
        plain.flag = model.flag = then
        assert_same(plain, model, x)


def test_list_input_keeps_its_meaning() -> None:
    model = flow.Instance()
    parts = [torch.randn(IMAGE)]
    expected = model(parts)
    optimize(model)
    torch.testing.assert_close(model(parts), expected)


def test_taps_may_move() -> None:
    model = zoo.Taps((1, 3)).double()
    plain = copy.deepcopy(model)
    optimize(model)
    x = torch.randn(IMAGE, dtype=torch.float64)
    assert_same(plain, model, x)
    plain.taps = model.taps = (0, 2)
    assert_same(plain, model, x)


def test_other_methods_keep_their_meaning() -> None:
    model = zoo.OtherMethod()
    x = torch.randn(IMAGE)
    expected = model.logits(x)
    assert (expected < 0).any()
    optimize(model)
    torch.testing.assert_close(model.logits(x), expected)


def test_constants_in_a_rewritten_forward_are_compared_at_each_call() -> None:
    model = zoo.Functional().double()
    plain = copy.deepcopy(model)
    optimize(model)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert_same(plain, model, x)
    plain.p = model.p = 0.9
    assert_same(plain, model, x)


@pytest.mark.parametrize("act", [nn.ReLU(), None])
def test_conditional_expression(act: nn.Module | None) -> None:
    swap_and_check(zoo.Conditional(act))


def test_one_call_activated_one_not() -> None:
    report = swap_and_check(zoo.Twice(False))
    assert "conv" in activations(report)


def test_frozen_forward_constants_are_refused() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)) + torch.rand(1, dtype=torch.float64)

    report = swap_and_check(Noise())
    (row,) = report.skipped
    assert "freeze" in row.reason
    assert report["conv"].activation == "none"


def test_forwards_with_side_effects_are_not_rewritten() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.relu(self.conv(x))

    model = Counting()
    report = optimize(model)[1]
    assert model.calls == 0
    model(torch.randn(IMAGE))
    assert model.calls == 1
    assert "sets self.calls" in report.skipped[0].reason


def test_optional_argument_is_not_baked_in() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            y = F.relu(self.conv(x))
            if skip is not None:
                y = y + skip
            return y

    model = Skip()
    x = torch.randn(IMAGE)
    expected = model(x), model(x, x)
    report = optimize(model)[1]
    assert "branches on skip is not None" in report.skipped[0].reason
    torch.testing.assert_close((model(x), model(x, x)), expected)


def odd_convolutions() -> list[tuple[str, nn.Module, str]]:
    class Subclass(nn.Conv2d):
        pass

    hooked = nn.Conv2d(3, 4, 3)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    backward = nn.Conv2d(3, 4, 3)
    backward.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    quantized = nn.Conv2d(3, 4, 3)
    quantized.qconfig = object()
    extra = nn.Conv2d(3, 4, 3)
    extra.register_buffer("mask", torch.ones(1))
    override = nn.Conv2d(3, 4, 3)
    override.forward = lambda x: nn.Conv2d.forward(override, x) + 1
    pruned = nn.Conv2d(3, 4, 3)
    prune.random_unstructured(pruned, "weight", 0.5)
    subclass_weight = nn.Conv2d(3, 4, 3)

    class Weight(Tensor):
        pass

    subclass_weight.weight = nn.Parameter(subclass_weight.weight.detach().as_subclass(Weight))
    return [
        ("subclass", Subclass(3, 4, 3), "subclass"),
        ("forward hook", hooked, "hooks"),
        ("backward hook", backward, "hooks"),
        (
            "parametrization",
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            "parametrization",
        ),
        ("spectral norm", nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), "by a hook"),
        ("pruning", pruned, "by a hook"),
        ("qconfig", quantized, "qconfig"),
        ("extra buffer", extra, "beyond weight and bias"),
        ("own forward", override, "set on the instance"),
        ("tensor subclass", subclass_weight, "not a plain Parameter"),
        ("complex", nn.Conv2d(3, 4, 3, dtype=torch.complex64), "complex64"),
    ]


@pytest.mark.parametrize(
    ("conv", "reason"), [c[1:] for c in odd_convolutions()], ids=[c[0] for c in odd_convolutions()]
)
def test_odd_convolutions_are_left_alone(conv: nn.Module, reason: str) -> None:
    relu = nn.ReLU()
    model = nn.Sequential(conv, relu)
    _, report = optimize(model)
    assert model[0] is conv
    assert model[1] is relu
    assert reason in report["0"].reason
    assert not report["0"].fused
    with pytest.raises(SwapError, match="strict=True"):
        optimize(model, strict=True)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    assert "run the model once" in optimize(model)[1]["0"].reason
    model(torch.randn(IMAGE))
    assert activations(optimize(model)[1]) == {"0": "relu"}


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (nn.PReLU(), "PReLU"),
        (nn.ReLU6(), "ReLU6"),
        (nn.LeakyReLU(-0.1), "negative"),
        (nn.LeakyReLU(0.0), "NaN"),
        (nn.LeakyReLU(float("nan")), "finite"),
    ],
)
def test_other_activations_stay(act: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act)
    report = swap_and_check(model) if reason != "finite" else optimize(model)[1]
    assert model[1] is act
    assert reason in report["1"].reason
    assert report["0"].activation == "none"


def test_hooked_activation_stays() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[1].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    report = optimize(model)[1]
    model(torch.randn(IMAGE))
    assert (seen[0] < 0).any()
    assert "hooks" in report["1"].reason


def test_batch_norm_in_training_mode_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    report = optimize(model, mode="inference")[1]
    assert "statistics of the batch" in report["0"].reason
    assert type(model[1]) is nn.BatchNorm2d


def test_root_convolution_is_left_alone() -> None:
    conv = nn.Conv2d(3, 4, 3)
    model, report = optimize(conv)
    assert model is conv
    assert type(conv) is nn.Conv2d
    assert "nn.Sequential" in report.skipped[0].reason
