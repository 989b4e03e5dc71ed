# SPDX-License-Identifier: BSD-3-Clause
"""`restore`, copies, checkpoints, memory formats, wrappers, compilers and messages."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import swap_models as zoo
import torch
import torch.nn.functional as F
from swap_helpers import IMAGE, assert_same, run, swap_and_check, tree_of
from torch import Tensor, nn

from segpose_kernels.nn import Conv2dAct, ConvTranspose2dAct
from segpose_kernels.swap import SwapError, optimize, restore


def test_hook_added_to_a_rewritten_layer_later() -> None:
    model = zoo.Functional()
    optimize(model)
    seen: list[Tensor] = []
    model.convs[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.randn(2, 4, 7, 7))
    assert (seen[0] < 0).any()


def test_idempotent() -> None:
    model = zoo.PoseMachine()
    _, first = optimize(model)
    modules = [id(module) for module in model.modules()]
    _, second = optimize(model)
    assert second is first
    assert [id(module) for module in model.modules()] == modules
    optimize(model, memory_format=torch.preserve_format)
    assert len(model._forward_hooks) == 0
    model.conv5 = nn.Conv2d(6, 7, 1)
    assert optimize(model)[1]["conv5"].fused
    assert isinstance(model.conv5, Conv2dAct)


def test_optimizing_a_part_first() -> None:
    model = zoo.UNet().double()
    plain = copy.deepcopy(model)
    before = tree_of(model)
    optimize(model.down1)
    report = optimize(model)[1]
    assert not report.skipped
    assert_same(plain, model, torch.randn(IMAGE, dtype=torch.float64))
    assert tree_of(restore(model)) == before


def test_restoring_a_copy() -> None:
    model = zoo.PoseMachine().double()
    plain = copy.deepcopy(model)
    optimize(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        restore(again)
        assert type(again.conv1) is nn.Conv2d
        assert again.relu is F.leaky_relu
        assert_same(plain, again, torch.randn(IMAGE, dtype=torch.float64))
    assert isinstance(model.conv1, Conv2dAct)


def test_checkpoints_pass_both_ways() -> None:
    model, other = zoo.UNet(), zoo.UNet()
    optimize(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer), strict=True)
    model.load_state_dict(zoo.UNet().state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True, assign=True)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(restore(model)(x), other(x), rtol=1e-4, atol=1e-5)


def test_optimizer_made_before_keeps_working() -> None:
    model = zoo.PoseMachine().double()
    plain = copy.deepcopy(model)
    steps = {}
    for net, swap in ((plain, False), (model, True)):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        if swap:
            optimize(net)
        torch.manual_seed(3)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = net(torch.randn(IMAGE, dtype=torch.float64)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        steps[swap] = losses
    assert steps[True] == pytest.approx(steps[False], rel=1e-9)


def test_memory_format_auto() -> None:
    model = zoo.PoseMachine()
    x = torch.randn(IMAGE)
    report = optimize(model)[1]
    assert report.memory_format == "channels_last"
    weight = model.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert model(x).is_contiguous()
    assert model(x.to(memory_format=torch.channels_last)).stride(1) == 1
    model.all_stages = True
    assert all(stage.is_contiguous() for stage in model(x))
    restore(model)
    assert model.conv2.weight is weight
    assert weight.is_contiguous()
    assert not model._forward_hooks


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("batch", [1, 3])
def test_memory_format_of_one_pixel(mode: Any, batch: int) -> None:
    """Both formats fit: the strides tell, and results have the format that torch gives them."""
    plain = nn.Sequential(nn.ConvTranspose2d(6, 4, 3), nn.ReLU()).eval()
    model, _ = optimize(copy.deepcopy(plain), mode=mode, memory_format=torch.channels_last)
    x = torch.randn(batch, 6, 1, 1)
    for strides in ((6, 1, 1, 1), (6, 1, 6, 6)):
        image = x.as_strided(x.shape, strides)
        with torch.no_grad():
            for _ in range(2):
                assert model(image).stride() == plain(image).stride()


def test_memory_format_stays_where_strides_matter() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv(x))
            return x.view(x.size(0), -1)

    report = swap_and_check(Viewing())
    assert report.memory_format == "preserve_format"
    assert "Tensor.view" in report.memory_format_reason
    assert optimize(zoo.DataDependent())[1].memory_format == "preserve_format"
    asked = optimize(zoo.PoseMachine(), memory_format=torch.preserve_format)[1]
    assert asked.memory_format == "preserve_format"
    assert "channels_last" in str(
        optimize(zoo.DataDependent(), memory_format=torch.channels_last)[1]
    )


def test_memory_format_stays_where_random_numbers_follow_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))
    report = swap_and_check(model)
    assert "Dropout, which draws in memory order" in report.memory_format_reason
    assert optimize(model.eval(), mode="inference")[1].memory_format == "channels_last"
    assert optimize(zoo.discriminator())[1].memory_format == "channels_last"


def test_wrappers() -> None:
    model = nn.DataParallel(zoo.PoseMachine())
    wrapped, report = optimize(model)
    assert wrapped is model
    assert isinstance(model.module.conv1, Conv2dAct)
    assert report["conv1"].activation == "leaky_relu(0.01)"
    restore(model)
    assert type(model.module.conv1) is nn.Conv2d


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inner = zoo.Functional().double()
        plain = copy.deepcopy(inner)
        model = nn.parallel.DistributedDataParallel(inner)
        optimize(model)
        x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
        expected, found = run(plain.train(), x), run(model.train(), x)
        for name, value in expected.items():
            renamed = name.replace("grad of convs", "grad of module.convs")
            renamed = renamed.replace("grad of up", "grad of module.up")
            torch.testing.assert_close(found[renamed], value)
        assert type(restore(model).module.up) is nn.ConvTranspose2d
    finally:
        torch.distributed.destroy_process_group()


def test_models_that_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match=r"optimize the plain model"):
        optimize(torch.compile(zoo.Loop(), backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 3, 3)), torch.randn(IMAGE))
    with pytest.raises(TypeError, match="scripted"):
        optimize(scripted)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        optimize(F.relu)


def test_options_are_checked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="mode must be one of"):
        optimize(model, mode="eval")
    with pytest.raises(ValueError, match="backend must be one of"):
        optimize(model, backend="cudnn")
    with pytest.raises(ValueError, match="memory_format must be"):
        optimize(model, memory_format=torch.contiguous_format)


def test_strict_leaves_the_model_as_it_was() -> None:
    model = zoo.ResNet()
    before = tree_of(model)
    with pytest.raises(SwapError, match="BatchNorm2d") as error:
        optimize(model, strict=True)
    assert tree_of(model) == before
    assert error.value.report.skipped
    optimize(zoo.PoseMachine(), strict=True)


def test_report() -> None:
    report = optimize(zoo.ResNet())[1]
    assert len(report) == len(list(report)) == len(report.fused) + len(report.skipped)
    assert all(row.reason for row in report.skipped)
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["name", "old", "new"]
    assert len(lines) == len(report) + 3
    assert report.to_dict()["rows"][0]["name"] == "conv1"
    assert optimize(nn.Sequential(nn.Linear(2, 2)))[1].rows == []


def test_a_refused_mode_leaves_the_model_optimized() -> None:
    model, report = optimize(zoo.PoseMachine())
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        optimize(model, mode="inference")
    assert optimize(model)[1] is report


def test_random_numbers_are_not_drawn() -> None:
    model = zoo.Functional()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    optimize(model)
    assert torch.equal(torch.rand(3), expected)


def test_existing_fused_modules_are_reported() -> None:
    model = nn.Sequential(Conv2dAct(3, 4, 3, activation="relu"), ConvTranspose2dAct(4, 3, 3))
    report = optimize(model)[1]
    assert [row.reason for row in report] == ["was fused already"] * 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("build", [zoo.PoseMachine, zoo.Functional])
def test_exported_model(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    x = torch.randn(2, model.conv1.in_channels if hasattr(model, "conv1") else 4, 8, 8)
    optimize(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


# Dynamo looks at the gradient of any tensor that enters a frame, here the output's in a hook.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("build", [zoo.PoseMachine, zoo.Functional])
def test_compiled_model_has_one_graph(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    x = torch.randn(2, model.conv1.in_channels if hasattr(model, "conv1") else 4, 8, 8)
    optimize(model)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


class Shared(nn.Module):
    """Its forward is rewritten: one activation stands behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.c2(self.act(self.c1(x))))


def test_a_rewritten_forward_sees_a_parametrization() -> None:
    plain, x = Shared(), torch.randn(2, 3, 9, 9)
    model, _ = optimize(copy.deepcopy(plain))
    for net in (plain, model):
        nn.utils.parametrizations.weight_norm(net.c2)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_slope_of_an_absorbed_activation_cannot_be_set() -> None:
    model, _ = optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1)))
    for net in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AttributeError, match=r"inside 0\); set it on the convolution"):
            net[1].negative_slope = 0.2
        net[1].tag = "last"
        assert net[1].tag == "last"
        net[0].negative_slope = 0.2
        assert net[0].negative_slope == 0.2
