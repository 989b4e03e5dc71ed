# SPDX-License-Identifier: BSD-3-Clause
"""`optimize(mode="inference")`: changes of a model, copies, options, and what is given back."""

from __future__ import annotations

import copy
import pickle

import inference_models as nets
import pytest
import swap_models as zoo
import torch
from inference_helpers import assert_same, optimized, program_of, randomised
from swap_helpers import IMAGE, tree_of
from torch import Tensor, nn

from segpose_kernels import prepared_bytes, release_workspace
from segpose_kernels.backends import LIBRARY
from segpose_kernels.swap import optimize, restore

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]


def test_an_appended_module_is_seen() -> None:
    model, plain, _ = optimized(nn.Sequential(nets.conv(4, 4), nn.ReLU(), nets.conv(4, 4)).double())
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert_same(model, plain, x)
    for net in (model, plain):
        net.append(nn.Sigmoid())
    with torch.no_grad():
        assert_same(model, plain, x)


def test_changes_of_the_model_are_seen() -> None:
    """Hooks, children, attributes and modes set after the program was made."""
    model, plain, _ = optimized(zoo.PoseMachine().double())
    x = torch.randn(IMAGE, dtype=torch.float64)
    with torch.no_grad():
        model(x), model(x)
        seen: list[Tensor] = []
        handle = model.conv2.register_forward_hook(lambda m, args, out: seen.append(out))
        model(x)
        assert len(seen) == 1
        handle.remove()
        model.all_stages = plain.all_stages = True
        assert len(model(x)) == 2
        assert_same(model, plain, x)
        model.all_stages = plain.all_stages = False
        model.conv5 = plain.conv5 = nn.Conv2d(6, 2, 1).double()
        assert_same(model, plain, x)
        pooled = model.maxpool
        handle = pooled.register_forward_hook(lambda m, args, out: seen.append(out))
        model(x)
        assert len(seen) == 2
        handle.remove()
        pooled.kernel_size = pooled.stride = plain.maxpool.kernel_size = plain.maxpool.stride = 4
        assert_same(model, plain, x)
        pooled.kernel_size = pooled.stride = plain.maxpool.kernel_size = plain.maxpool.stride = 2
        model.conv2.negative_slope = 0.5
        assert not torch.equal(model(x), plain(x))
        model.conv2.negative_slope = 0.01
        model.conv5.forward = lambda y: y[:, :1]
        assert model(x).shape[1] == 1
        model.train()
        assert model(x).shape[1] == 1


def test_copies_hold_no_program_and_no_filters() -> None:
    model, plain, _ = optimized(zoo.PoseMachine().double())
    x = torch.randn(IMAGE, dtype=torch.float64)
    before = len(pickle.dumps(model))
    with torch.no_grad():
        model(x), model(x)
        assert prepared_bytes(model) > 0
        assert len(pickle.dumps(model)) == before
        assert model.state_dict().keys() == plain.state_dict().keys()
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert prepared_bytes(again) == 0
            for parameter in again.parameters():
                parameter.mul_(0.5)
            for parameter in (reference := copy.deepcopy(plain)).parameters():
                parameter.mul_(0.5)
            assert_same(again, reference, x)
            assert_same(again, reference, x)
            assert prepared_bytes(again) > 0
            assert program_of(again) is not program_of(model)
            restore(again)
            assert_same(again, reference, x)
        assert_same(model, plain, x)


def test_restore_undoes_everything() -> None:
    model = randomised(nets.vgg().double())
    before, plain = tree_of(model), copy.deepcopy(model)
    optimize(model, mode="inference")
    x = torch.randn(IMAGE, dtype=torch.float64)
    with torch.no_grad():
        model(x), model(x)
    assert "forward" in vars(model)
    restore(model)
    assert tree_of(model) == before
    assert "forward" not in vars(model)
    assert prepared_bytes(model) == 0
    assert_same(model.train(), plain.train(), x)


def test_options_again_and_other_mode() -> None:
    model, plain, report = optimized(zoo.PoseMachine().double())
    assert optimize(model, mode="inference")[1] is report
    other = optimize(model, mode="inference", max_prepared_bytes=0)[1]
    assert other is not report
    optimize(model)
    assert "forward" not in vars(model)
    assert_same(model, plain, torch.randn(IMAGE, dtype=torch.float64))
    with pytest.raises(ValueError, match="max_prepared_bytes must not be negative, got -1"):
        optimize(model, mode="inference", max_prepared_bytes=-1)
    with pytest.raises(TypeError, match="max_prepared_bytes must be int, not float"):
        optimize(model, mode="inference", max_prepared_bytes=1.5)


def test_models_that_cannot_be_one_graph_run_in_parts() -> None:
    model, plain, report = optimized(nets.Branching().double(), memory_format=torch.channels_last)
    assert report.graphs[""].startswith("module by module: ")
    assert report.graphs["trunk"] == "one graph: 2 convolutions, 1 max-pool"
    assert "trunk: one graph" in str(report)
    x = torch.randn(IMAGE, dtype=torch.float64)
    with torch.no_grad():
        assert_same(model, plain, x)
        packed = prepared_bytes(model)
        assert packed > 0
        assert_same(model, plain, x)
        assert prepared_bytes(model) == packed
    assert report.to_dict()["prepared_bytes"] == packed


def test_memory_format_that_must_stay() -> None:
    model, plain, report = optimized(zoo.PoseMachine().double(), memory_format="preserve_format")
    assert "channels_last" in report.graphs[""]
    with torch.no_grad():
        x = torch.randn(IMAGE, dtype=torch.float64)
        assert_same(model, plain, x)
        assert model(x).stride() == plain(x).stride()
    assert prepared_bytes(model) > 0


def test_backends_without_filters() -> None:
    model, plain, report = optimized(zoo.PoseMachine().double(), backend="aten")
    assert report.graphs == {}
    with torch.no_grad():
        assert_same(model, plain, torch.randn(IMAGE, dtype=torch.float64))
    assert prepared_bytes(model) == 0
    assert prepared_bytes(plain) == 0


def test_arenas_are_given_back() -> None:
    model, plain, _ = optimized(zoo.PoseMachine().double())
    x = torch.randn(IMAGE, dtype=torch.float64)
    release_workspace()
    with torch.no_grad():
        model(x), model(x)
        program = program_of(model)
        held = sum(frame.blueprint.arena_bytes for frame in program._idle)
        assert held > 0
        assert release_workspace() >= held
        assert not program._idle
        assert_same(model, plain, x)


def test_many_shapes_keep_few_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segpose_kernels.swap.inference.IDLE_BYTES", 200_000)
    model, plain, _ = optimized(zoo.PoseMachine().double())
    program = program_of(model)
    with torch.no_grad():
        for size in range(8, 40, 2):
            x = torch.randn(1, 3, size, size, dtype=torch.float64)
            for _ in range(2):
                assert_same(model, plain, x, f"size {size}")
            assert sum(frame.blueprint.arena_bytes for frame in program._idle) <= 200_000
    assert len(program._blueprints) == 16


def test_runs_bind_once() -> None:
    """Where gradients are enabled but nothing needs one, too."""
    model, _, _ = optimized(nn.Sequential(nets.conv(3, 4), nn.ReLU()))
    model.requires_grad_(False)
    x = torch.randn(2, 3, 9, 9)
    model(x), model(x)
    (frame,) = program_of(model)._idle
    (call,) = frame.calls
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            model(x)
        assert program_of(model)._idle == [frame]
        assert frame.calls == [call]


def test_what_changes_between_runs_that_are_alike() -> None:
    """Modes, hooks for all modules, memory formats and dtypes after the short way was open."""
    model, plain, _ = optimized(nn.Sequential(nets.conv(3, 4), nn.ReLU()))
    x = torch.randn(2, 3, 9, 9)

    def warm() -> None:
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(x), plain(x))

    warm()
    assert model(x).requires_grad
    warm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    warm()
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module))
    )
    try:
        warm()
    finally:
        handle.remove()
    assert nn.Conv2d in {kind for base in seen for kind in base.__mro__}
    assert len(seen) > 3 * len(list(plain.modules()))
    warm()
    model.train()
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        model.eval()
        for other in (x.to(memory_format=torch.channels_last), x[:1], x[:, :, ::2], x.mT):
            torch.testing.assert_close(model(other), plain(other))
        assert model(x).is_contiguous()
        assert model(x.to(memory_format=torch.channels_last)).is_contiguous(
            memory_format=torch.channels_last
        )
        with pytest.raises(RuntimeError):
            model(x.double())
        with torch.inference_mode():
            torch.testing.assert_close(model(x), plain(x))
    warm()
