# SPDX-License-Identifier: BSD-3-Clause
"""`optimize` and `restore`: what is fused, what is left alone, and that results never change."""

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
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from segpose_kernels.nn import Conv2dAct, ConvTranspose2dAct
from segpose_kernels.swap import SwapError, SwapReport, optimize, restore

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


# Name, model, what each convolution is fused with.
FUSED: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = [
    (
        "callable attribute",
        zoo.PoseMachine,
        IMAGE,
        {
            "conv1": "leaky_relu(0.01)",
            "conv2": "leaky_relu(0.01)",
            "conv3": "none",
            "conv4": "leaky_relu(0.01)",
            "conv5": "none",
        },
    ),
    (
        "U-Net",
        zoo.UNet,
        (2, 3, 14, 18),
        {
            "down1.double_conv.0": "relu",
            "down1.double_conv.2": "relu",
            "down2.double_conv.0": "relu",
            "down2.double_conv.2": "relu",
            "up": "none",
            "conv.double_conv.0": "relu",
            "conv.double_conv.2": "relu",
            "out": "none",
        },
    ),
    ("generator", lambda: zoo.generator(norm=False), (2, 6, 1, 1), {"0": "relu", "2": "none"}),
    ("discriminator", zoo.discriminator, (2, 3, 8, 8), {"0": "leaky_relu(0.2)", "3": "none"}),
    ("partial", zoo.Partial, IMAGE, {"conv": "leaky_relu(0.3)"}),
    ("safe flag", zoo.SafeFlag, IMAGE, {"conv": "leaky_relu(0.2)"}),
    ("loop over layers", zoo.Loop, IMAGE, {"layers.0": "relu", "layers.2": "relu"}),
    ("helper method", zoo.Helper, IMAGE, {"a": "leaky_relu(0.01)", "b": "leaky_relu(0.01)"}),
    ("both calls activated", lambda: zoo.Twice(True), IMAGE, {"conv": "relu"}),
    (
        "functional",
        zoo.Functional,
        (2, 4, 7, 7),
        {
            "convs.0": "relu",
            "convs.1": "relu",
            "convs.2": "relu",
            "convs.3": "leaky_relu(0.2)",
            "convs.4": "leaky_relu(0.1)",
            "convs.5": "relu",
            "convs.6": "relu",
            "up": "relu",
        },
    ),
]


@pytest.mark.parametrize(
    ("build", "shape", "expected"), [f[1:] for f in FUSED], ids=[f[0] for f in FUSED]
)
def test_everything_is_fused(
    build: Callable[[], nn.Module], shape: tuple[int, ...], expected: dict[str, str]
) -> None:
    report = swap_and_check(build(), shape)
    assert activations(report) == expected
    assert report.skipped == []


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


def test_shared_activation_used_elsewhere() -> None:
    """The forward is rewritten, so that the shared module still serves its other uses."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
            self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.conv1(x))
            return self.act(self.conv2(y) + x)

    report = swap_and_check(Shared())
    assert activations(report) == {"conv1": "relu", "conv2": "none"}
    assert "rewritten" in report["conv1"].reason


def test_hook_added_to_a_rewritten_layer_later() -> None:
    model = zoo.Functional()
    optimize(model)
    seen: list[Tensor] = []
    model.convs[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.randn(2, 4, 7, 7))
    assert (seen[0] < 0).any()


def test_module_with_two_names() -> None:
    conv, act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
    model = nn.Sequential(nn.Sequential(conv, act), nn.Sequential(conv, act))
    report = swap_and_check(model)
    assert activations(report) == {"0.0": "relu"}
    assert "1.0" in report["0.0"].reason


def test_same_convolution_with_and_without_activation() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    report = swap_and_check(nn.Sequential(conv, nn.ReLU(), nn.Sequential(conv, nn.Tanh())))
    assert activations(report)["0"] in ("none", "relu")


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_padding_modes(padding_mode: str, padding: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), padding=padding, padding_mode=padding_mode), nn.ReLU()
    )
    assert activations(swap_and_check(model)) == {"0": "relu"}


def test_what_can_be_fused_of_a_model_that_cannot_be_traced() -> None:
    report = swap_and_check(zoo.DataDependent())
    assert activations(report) == {"block.0": "relu", "conv": "none"}


def test_inference_folds_batch_norm() -> None:
    model = zoo.ResNet().double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    for _ in range(3):
        model(x)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    model.eval()
    expected, state = model(x), copy.deepcopy(model.state_dict())
    before = tree_of(model)
    report = optimize(model, mode="inference")[1]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert all("BatchNorm" in row.old for row in report.fused)
    assert "folded" in report["conv1"].reason
    assert activations(report)["conv1"] == "relu"
    assert activations(report)["layer1.0.conv1"] == "relu"
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    with pytest.raises(RuntimeError, match="restore"):
        model.train()(x)
    restored = restore(model.eval())
    assert tree_of(restored) == before
    assert torch.equal(restored(x), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_follows_a_loaded_checkpoint(groups: int, bias: bool) -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, groups=groups, bias=bias),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.1),
        ).double()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 2)
        return model.eval()

    model, other = build(), build()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    optimize(model, mode="inference")
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), other(x))
    torch.testing.assert_close(model.float()(x.float()), other.float()(x.float()))


def test_inference_needs_eval_mode() -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        optimize(nn.Sequential(nn.Conv2d(3, 4, 3)), mode="inference")


def test_batch_norm_in_training_mode_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    report = optimize(model, mode="inference")[1]
    assert "statistics of the batch" in report["0"].reason
    assert type(model[1]) is nn.BatchNorm2d


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


def test_root_convolution_is_left_alone() -> None:
    conv = nn.Conv2d(3, 4, 3)
    model, report = optimize(conv)
    assert model is conv
    assert type(conv) is nn.Conv2d
    assert "nn.Sequential" in report.skipped[0].reason


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


def test_the_lectures_models_are_fused_completely() -> None:
    models = pytest.importorskip("segpose_kernels.models")
    for model, shape, count in (
        (models.Autoencoder(), (1, 1, 28, 28), 6),
        (models.SegNet(10), (1, 1, 28, 28), 6),
        (models.CPM2DPose(width=0.06), (1, 3, 16, 16), 31),
        (models.JointRegression(), (1, 3, 128, 128), 5),
    ):
        report = swap_and_check(model, shape, strict=True)
        assert len(report.fused) == count
        assert report.memory_format == "channels_last"


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
