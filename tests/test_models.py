# SPDX-License-Identifier: BSD-3-Clause
"""The lecture's models: shapes, layer names, costs; every layer is optimized and restored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segpose_kernels import optimize, restore
from segpose_kernels.models import Autoencoder, CPM2DPose, JointRegression, SegNet

MODELS = {
    "autoencoder": (lambda: Autoencoder(), (2, 1, 28, 28), (2, 1, 28, 28), 6),
    "segnet": (lambda: SegNet(11), (2, 1, 28, 28), (2, 11, 28, 28), 6),
    "segnet without final ReLU": (
        lambda: SegNet(11, final_activation=False),
        (2, 1, 28, 28),
        (2, 11, 28, 28),
        6,
    ),
    "cpm": (lambda: CPM2DPose(width=0.125), (2, 3, 40, 48), (2, 21, 5, 6), 31),
    "joint regression": (lambda: JointRegression(), (2, 3, 128, 128), (2, 14, 2), 5),
}
by_model = pytest.mark.parametrize("name", list(MODELS))


def tensors_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The output, the image's gradient and every parameter's, by name."""
    model.zero_grad(set_to_none=True)
    leaf = image.clone().requires_grad_()
    output = model(leaf)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {"output": output.detach(), "image": leaf.grad, **gradients}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


@by_model
def test_shapes(name: str) -> None:
    make, input_shape, output_shape, _ = MODELS[name]
    assert make()(torch.rand(input_shape)).shape == output_shape


@by_model
def test_optimize_fuses_every_layer_and_restore_undoes_it(name: str) -> None:
    make, input_shape, _, convolutions = MODELS[name]
    # In float64, in which both must agree but for rounding.
    model = make().double()
    image = torch.rand(input_shape, dtype=torch.float64)
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    plain = tensors_of(copy.deepcopy(model), image)

    optimized, report = optimize(model)
    assert optimized is model
    assert not report.skipped, f"left alone:\n{report}"
    assert len(report.fused) == convolutions
    assert list(model.state_dict()) == keys
    ours = tensors_of(model, image)
    assert ours.keys() == plain.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(ours[key], tensor, msg=lambda text, key=key: f"{key}: {text}")

    restored = restore(model)
    assert [type(module) for module in restored.modules()] == types
    torch.testing.assert_close(restored(image), plain["output"])


def test_activations_behind_functional_calls_are_fused() -> None:
    _, report = optimize(CPM2DPose(width=0.125))
    plain_answers = {"conv5_2", "conv6_7", "conv7_7"}
    for row in report.fused:
        expected = "none" if row.name in plain_answers else "leaky_relu(0.01)"
        assert row.activation == expected, row.name


def test_checkpoints_pass_both_ways() -> None:
    plain, (optimized, _) = SegNet(11), optimize(SegNet(11))
    optimized.load_state_dict(plain.state_dict(), strict=True)
    image = torch.rand(1, 1, 28, 28)
    torch.testing.assert_close(optimized(image), plain(image))
    SegNet(11).load_state_dict(optimized.state_dict(), strict=True)


def test_segnet_is_as_listed() -> None:
    layers = [str(layer) for layer in SegNet(10).decoder]
    assert layers == [
        "ConvTranspose2d(64, 32, kernel_size=(7, 7), stride=(1, 1))",
        "ReLU()",
        "ConvTranspose2d(32, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), "
        "output_padding=(1, 1))",
        "ReLU()",
        "ConvTranspose2d(16, 10, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), "
        "output_padding=(1, 1))",
        "ReLU()",
    ]
    assert (SegNet(10)(torch.rand(1, 1, 28, 28)) >= 0).all()
    assert (SegNet(10, final_activation=False)(torch.rand(1, 1, 28, 28)) < 0).any()


def test_cpm_is_as_listed() -> None:
    model = CPM2DPose()
    assert model.relu is F.leaky_relu
    with torch.device("meta"):
        assert CPM2DPose(14)(torch.empty(1, 3, 256, 256)).shape == (1, 14, 32, 32)
    flops = 0
    extents = {"1": 256, "2": 128, "3": 64}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            extent = extents.get(name[len("conv")], 32)
            flops += 2 * module.weight.numel() * extent**2
            assert module.bias is not None
    assert flops / 1e9 == pytest.approx(60.3, abs=0.05)
    assert model.conv6_1.in_channels == model.conv7_1.in_channels == 149


def test_cpm_gives_all_stages() -> None:
    model = CPM2DPose(14, all_stages=True, width=0.125)
    image = torch.rand(1, 3, 32, 32)
    stages = model(image)
    assert [stage.shape for stage in stages] == [(1, 14, 4, 4)] * 3
    model.all_stages = False
    torch.testing.assert_close(model(image), stages[-1])


def test_joint_regression_has_the_lectures_head() -> None:
    head = JointRegression().head
    assert (head.in_features, head.out_features) == (4096, 28)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegNet(0), "num_objects must be at least 1, got 0"),
        (lambda: CPM2DPose(0), "joints must be at least 1, got 0"),
        (lambda: CPM2DPose(width=0.0), r"width must be above 0, got 0\.0"),
        (lambda: JointRegression(-1), "joints must be at least 1, got -1"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
