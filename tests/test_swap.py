# SPDX-License-Identifier: BSD-3-Clause
"""`optimize` fuses what it can, and results never change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import swap_flow_models as flow
import swap_models as zoo
import torch
from swap_helpers import IMAGE, activations, swap_and_check, tree_of
from torch import Tensor, nn

from segpose_kernels.swap import optimize, restore

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


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (flow.Dense, {"convs.0": "relu", "convs.1": "relu", "convs.2": "relu"}),
        (
            flow.Branches,
            {
                "convs.0": "leaky_relu(0.3)",
                "convs.1": "leaky_relu(0.3)",
                "more.0": "leaky_relu(0.1)",
                "more.1": "leaky_relu(0.2)",
            },
        ),
        (flow.Auxiliary, {"conv": "relu", "head": "none", "aux": "relu"}),
        (flow.Residual, {"conv1": "relu", "conv2": "none"}),
        (flow.NoGrad, {"inner.conv1": "relu", "inner.conv2": "none", "conv": "none"}),
        (flow.ChangedOutside, {"block.0": "none"}),
        (flow.Checkpointed, {"block.0": "relu", "block.2": "none"}),
        (flow.Instance, {"conv": "none"}),
        (flow.Inherited, {"conv": "relu"}),
        (flow.StochasticDepth, {"conv": "relu"}),
        (flow.RandomScale, {"conv": "none"}),
    ],
)
def test_python_code_around_the_layers(
    build: Callable[[], nn.Module], expected: dict[str, str]
) -> None:
    assert activations(swap_and_check(build())) == expected


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
