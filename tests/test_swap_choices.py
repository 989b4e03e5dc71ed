# SPDX-License-Identifier: BSD-3-Clause
"""What chooses the layers of a model, or a number in it, may change after `optimize`."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import swap_choice_models as zoo
import swap_reading_models as reading
import torch
import torch.nn.functional as F
from swap_helpers import IMAGE, activations, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segpose_kernels.swap import choices, optimize

CHOOSING = [
    zoo.ByIndex,
    zoo.ByKey,
    zoo.ByDepth,
    zoo.BySlice,
    zoo.ByName,
    zoo.ByOrder,
    zoo.ByAlias,
    zoo.ByHelper,
    zoo.ByPart,
    zoo.ByConfig,
    zoo.ByConfigOrder,
    zoo.LeavesEarly,
    zoo.ByTable,
    zoo.InParts,
    reading.PartsNumber,
    reading.PartsNumberByName,
    reading.BecomesTensor,
    zoo.ByPartOfName,
    zoo.ByStride,
    zoo.ByTableMethod,
    zoo.ByNone,
    zoo.ByMissing,
    reading.MissingNumber,
    zoo.ByFraction,
    zoo.ByMember,
    zoo.ByDelegate,
    reading.PartsClassNumber,
    reading.PartsMean,
    reading.PartsTable,
    reading.PartsPair,
    reading.PartsMode,
    reading.PartInList,
    zoo.SuperForward,
    zoo.ByAttributes,
]


def image() -> Tensor:
    return torch.randn(IMAGE, dtype=torch.float64)


def put(model: nn.Module, path: str, value: Any) -> None:
    *parts, name = path.split(".")
    owner: Any = model
    for part in parts:
        owner = getattr(owner, part)
    setattr(owner, name, value)


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("build", CHOOSING)
def test_choice_changes_later(build: Callable[[], zoo.Model], mode: str) -> None:
    x = image()
    for path, value in build().others:
        model = build().double().eval()
        plain = copy.deepcopy(model)
        optimize(model, mode=mode)
        with torch.set_grad_enabled(mode == "train"):
            torch.testing.assert_close(model(x), plain(x))
            put(plain, path, value)
            put(model, path, value)
            torch.testing.assert_close(model(x), plain(x))
        if mode == "train":
            assert_same(plain, model, x)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_two_switches(mode: str) -> None:
    model = zoo.TwoSwitches().double().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode=mode)
    x = image()
    for change in ({}, {"several": True, "task": 1}):
        vars(plain).update(change)
        vars(model).update(change)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x))


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.ByEnvironment().double()
    plain = copy.deepcopy(model)
    optimize(model)
    x = image()
    for task in range(3):
        monkeypatch.setenv("SEGPOSE_TEST_TASK", str(task))
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_class_changes_later(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reading.ClassNumber().double().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode=mode)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        monkeypatch.setattr(reading.ClassNumber, "task", 1)
        monkeypatch.setattr(reading.ClassNumber, "gain", 3.0)
        torch.testing.assert_close(model(x), plain(x))


def test_conditions_above_do_not_hinder() -> None:
    """A condition in a forward that runs by super() is read like one in the forward itself."""
    report = optimize(zoo.SuperForward())[1]
    assert activations(report)["convs.0"] == "relu"


def test_forward_by_name() -> None:
    model = zoo.ForwardByName().double()
    plain = copy.deepcopy(model)
    optimize(model)
    assert_same(plain, model, image())


def test_numbers_that_choose_nothing_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try takes time, and a model may have a hundred blocks."""
    traced = []
    monkeypatch.setattr(choices, "trace_forward", lambda *args, **options: traced.append(options))
    report = optimize(zoo.ActsByFunction())[1]
    assert sum(act == "relu" for act in activations(report).values()) == 2
    assert not traced


def test_every_head_is_fused() -> None:
    """Heads that a number chooses take the activation, each of them, where all are known."""
    report = optimize(zoo.ByIndex())[1]
    assert {name: act for name, act in activations(report).items() if act != "none"} == {
        "convs.0": "relu",
        "convs.1": "relu",
        "convs.2": "relu",
    }
    for build in (zoo.ByPartOfName, zoo.ByStride, zoo.ByNone):
        report = optimize(build())[1]
        heads = 2 if build is zoo.ByStride else 3
        assert sum(act == "relu" for act in activations(report).values()) == heads


def test_backbone_by_names() -> None:
    """Names choose its layers, and it is fused all the same; other outputs may be chosen later."""
    model = zoo.Backbone().double().eval()
    plain = copy.deepcopy(model)
    report = optimize(model, mode="inference")[1]
    assert set(activations(report).values()) == {"relu"}
    assert "one graph: 4 convolutions" in str(report)
    assert "BatchNorm folded" in report["conv1"].reason
    plain.out_indices = model.out_indices = (0, 2)
    with torch.no_grad():
        for found, expected in zip(model(image()), plain(image()), strict=True):
            assert found.shape == expected.shape
    x = image()
    for change in ({}, {"layer_names": ["layer3"], "out_indices": (0,)}):
        vars(plain).update(change)
        vars(model).update(change)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x))


def test_long_layers_by_names() -> None:
    """The layers inside those that are called by names are not what the names choose."""
    model = zoo.Backbone().eval()
    for name in model.layer_names:
        getattr(model, name).extend(nn.Identity() for _ in range(60))
    report = optimize(model, mode="inference")[1]
    assert "BatchNorm folded" in report["conv1"].reason


class Drawn(zoo.Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(random.choice(self.convs)(x)))


def test_drawn_layers() -> None:
    model = Drawn().double()
    plain = copy.deepcopy(model)
    optimize(model)
    x = image()
    for seed in range(12):
        results = []
        for one in (plain, model):
            random.seed(seed)
            results.append(one(x))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "build",
    [
        reading.ArgumentAsNumber,
        reading.ArgumentKind,
        reading.ArgumentAttribute,
        reading.ArgumentInHelper,
    ],
)
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_arguments_outside_of_conditions(build: Callable[[], zoo.Model], mode: str) -> None:
    model = build().double().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode=mode)
    x = image()
    with torch.set_grad_enabled(mode == "train"):
        for arguments in ((x,), (x, x), (x, None)):
            torch.testing.assert_close(model(*arguments), plain(*arguments))


@pytest.mark.parametrize("build", [reading.GradMode, reading.GradModeAsNumber])
def test_grad_mode_is_read(build: Callable[[], zoo.Model]) -> None:
    model = build().double()
    plain = copy.deepcopy(model)
    optimize(model)
    x = image()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_globals_change_later(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = image()
    for build in (reading.GlobalBehindHelper, reading.TableBehindHelper, reading.ClassTable):
        model = build().double().eval()
        plain = copy.deepcopy(model)
        optimize(model, mode=mode)
        with torch.set_grad_enabled(mode == "train"), monkeypatch.context() as patch:
            torch.testing.assert_close(model(x), plain(x))
            patch.setattr(reading, "scale", 5.0)
            patch.setitem(reading.SCALE, "value", 5.0)
            patch.setitem(reading.ClassTable.table, "scale", 5.0)
            torch.testing.assert_close(model(x), plain(x))


class Checkpointed(zoo.Model):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.convs[0](x))
        return checkpoint(self.part, y, use_reentrant=False)

    def part(self, x: Tensor) -> Tensor:
        return F.relu(self.convs[1](x))


def test_checkpoint_stays() -> None:
    """A forward that gives back memory goes on doing so: its part runs again in backward."""
    model = Checkpointed()
    optimize(model)
    runs = []
    model.convs[1].register_forward_pre_hook(lambda module, args: runs.append(1))
    model(torch.randn(IMAGE)).sum().backward()
    assert len(runs) == 2


CHANGES: list[Callable[[nn.Module], object]] = [
    lambda model: setattr(model.relu, "negative_slope", 0.5),
    lambda model: setattr(model, "relu", nn.GELU()),
    lambda model: setattr(model, "relu", nn.LeakyReLU(0.5)),
    lambda model: model.relu.register_forward_hook(lambda module, args, output: output + 1),
    lambda model: model.relu.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    lambda model: setattr(model.relu, "forward", torch.tanh),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_shared_activation_changes_later(change: Callable[[nn.Module], object], mode: str) -> None:
    model = reading.SharedLeaky().double().eval()
    plain = copy.deepcopy(model)
    optimize(model, mode=mode)
    x = image()
    with torch.set_grad_enabled(mode == "train"):
        torch.testing.assert_close(model(x), plain(x))
        change(model)
        change(plain)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(copy.deepcopy(model)(x), plain(x))


def test_shared_function_changes_later() -> None:
    model = reading.SharedFunction().double()
    plain = copy.deepcopy(model)
    report = optimize(model)[1]
    assert "rewritten forward" in report["convs.0"].reason
    assert_same(plain, copy.deepcopy(model), image())
    model.act = plain.act = torch.tanh
    assert_same(plain, model, image())


def test_value_kept_in_an_object() -> None:
    """The trace leaves nothing in it, and it goes on getting the value before the activation."""
    model = reading.KeepsInObject()
    plain = copy.deepcopy(model)
    optimize(model)
    assert model.seen.before is None
    x = torch.randn(IMAGE)
    model(x)
    plain(x)
    torch.testing.assert_close(model.seen.before, plain.seen.before)


KEEPING = [
    reading.KeepsInLists,
    reading.KeepsInQueue,
    reading.KeepsInTable,
    reading.KeepsInPart,
    reading.KeepsInListOfObject,
    reading.KeepsInClass,
    reading.KeepsInFile,
]


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("build", KEEPING)
def test_values_kept_elsewhere(build: Callable[[], reading.Keeps], mode: str) -> None:
    model = build().double().eval()
    optimize(model, mode=mode)
    assert model.kept() == []
    x = image()
    with torch.no_grad():
        model(x)
        (found,) = model.kept()
        torch.testing.assert_close(found, model.convs[0](x))
        assert found.min() < 0
    reading.Keeps.log.clear()
    reading.TAPS.clear()


def test_numbers_and_output_stay(capsys: pytest.CaptureFixture[str]) -> None:
    model = reading.DrawsAndPrints()

    def states() -> list[str]:
        numbers = [np.random.get_state(), model.numbers.bit_generator.state]
        return [str(state) for state in (*numbers, model.tensors.get_state().tolist())]

    before = states()
    optimize(model)
    assert states() == before
    assert capsys.readouterr() == ("", "")


class Scripted(zoo.Model):
    """As models that can be scripted are written."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convs[0](x))
        if torch.jit.is_scripting():
            return x
        return F.relu(self.last(x))


def test_asking_for_scripts_is_no_obstacle() -> None:
    model = Scripted().double().eval()
    plain = copy.deepcopy(model)
    report = optimize(model, mode="inference")[1]
    assert activations(report)["convs.0"] == activations(report)["last"] == "relu"
    assert "one graph: 2 convolutions" in str(report)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize(
    "build", [zoo.FlagArgument, zoo.FlagLeavesActivationOut, zoo.FlagLeavesEarly]
)
def test_an_argument_decides(build: Callable[[], zoo.Model], mode: str) -> None:
    model = build().double().eval()
    plain = copy.deepcopy(model)
    report = optimize(model, mode=mode)[1]
    x = image()
    with torch.set_grad_enabled(mode == "train"):
        for given in ((), (False,), (True,), (1,), (None,), (True, False)):
            if len(given) <= len(inspect.signature(model.forward).parameters) - 1:
                found, expected = model(x, *given), plain(x, *given)
                torch.testing.assert_close(found, expected)
    if build is zoo.FlagArgument:
        assert activations(report)["convs.0"] == activations(report)["convs.1"] == "relu"
        assert report.memory_format == "channels_last"
    else:
        assert set(activations(report).values()) == {"none"}
