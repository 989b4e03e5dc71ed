# SPDX-License-Identifier: BSD-3-Clause
"""`explain` and `validate`: what they say of a model, and that they leave it as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import inference_models
import pytest
import swap_models as zoo
import torch
from swap_helpers import IMAGE
from torch import Tensor, nn

from segpose_kernels.backends import LIBRARY
from segpose_kernels.models import SegNet
from segpose_kernels.nn import Conv2dAct
from segpose_kernels.swap import checks, explain, optimize, validate


def test_explain_counts_operations_of_both_kinds() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
    )
    optimize(model)
    found = explain(model, torch.randn(2, 3, 8, 8), show=False)
    conv, up = found
    assert conv.flops == 2 * 2 * 4 * 4 * 4 * 3 * 9
    # Once for each input position, not for each of the nine times as many output positions.
    assert up.flops == 2 * 2 * 4 * 4 * 4 * 3 * 9
    assert conv.bytes == 4 * (2 * 3 * 64 + 4 * 27 + 4 + 2 * 4 * 16)
    assert (conv.activation, up.activation) == ("relu", "none")
    assert "s2x2" in up.problem
    assert "g2" in up.problem
    assert found.flops == conv.flops + up.flops
    json.dumps(found.to_dict())


def test_explain_names_the_backend_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 1))
    optimize(model[:2], backend="aten")
    model[0] = Conv2dAct(3, 4, 3, backend="aten")
    model[1] = nn.Identity()
    fused, plain = explain(model, torch.randn(1, 3, 8, 8))
    assert fused.backend == "aten"
    assert plain.backend == "torch"
    assert "GFLOP" in capsys.readouterr().out


def test_explain_shows_plans_of_the_cpu_kernels() -> None:
    plan = pytest.importorskip("segpose_kernels._plan")
    if not LIBRARY.loaded:
        pytest.skip("the C++ library is not built")
    model = zoo.UNet()
    optimize(model)
    layers = {layer.name: layer for layer in explain(model, torch.randn(1, 3, 16, 16), show=False)}
    assert "fprop" in layers["out"].algorithm
    assert "dgrad" in layers["up"].algorithm
    problem = plan.ConvProblem.for_conv_transpose2d(
        (1, 8, 8, 8), (8, 4, 2, 2), (2, 2), (0, 0), (0, 0), 1, (1, 1)
    )
    assert layers["up"].flops == plan.plan(problem, op="dgrad", dtype="float32").flops


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, (3, 4), padding="same"),
        nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
        nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1, dilation=2),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_explain_takes_any_geometry(conv: nn.Module) -> None:
    model = nn.Sequential(conv, nn.ReLU())
    optimize(model)
    (layer,) = explain(model, torch.randn(3, 9, 9), show=False)
    assert layer.flops > 0
    assert validate(model, torch.randn(3, 9, 9))


def test_explain_and_validate_change_nothing() -> None:
    model = zoo.ResNet()
    optimize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    explain(model, x, show=False)
    validate(model, x)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for name, module in model.named_modules() if name)


@pytest.mark.parametrize(
    ("build", "shape", "count"),
    [
        (zoo.PoseMachine, (2, 3, 16, 16), 5),
        (zoo.UNet, (1, 3, 16, 16), 8),
        (zoo.Functional, (1, 4, 7, 7), 8),
        (zoo.generator, (2, 6, 1, 1), 2),
        (lambda: zoo.Twice(True), (1, 3, 8, 8), 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_validate_passes(
    build: Callable[[], nn.Module], shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> None:
    model = build().to(dtype)
    optimize(model)
    report = validate(model, torch.randn(shape).to(dtype))
    assert report, str(report)
    assert len(report) == count
    assert len(str(report).splitlines()) == count + 3


def test_validate_of_folded_layers() -> None:
    model = zoo.ResNet().eval()
    optimize(model, mode="inference")
    report = validate(model, torch.randn(2, 3, 16, 16))
    assert report.passed
    assert {layer.name: layer.activation for layer in report}["layer1.0.conv1"] == "relu"


@pytest.mark.parametrize("quantity", ["output", "input", "weight", "bias"])
def test_validate_finds_a_fault(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A positive control: an error of one part in ten thousand in any one of the four fails."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    optimize(model)
    x = torch.randn(1, 3, 8, 8)
    assert validate(model, x)
    original = checks._ours

    def faulty(*args: object) -> dict[str, Tensor]:
        values = original(*args)
        return {**values, quantity: values[quantity] * 1.0001}

    monkeypatch.setattr(checks, "_ours", faulty)
    report = validate(model, x)
    assert not report.passed
    assert "NO" in str(report)


def test_inputs_of_several_kinds() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.conv(torch.cat((a, b), dim=1))

    model = TwoInputs()
    optimize(model)
    a, b = torch.randn(2, 1, 3, 8, 8)
    for x in ((a, b), [a, b], {"a": a, "b": b}):
        assert len(explain(model, x, show=False)) == len(validate(model, x)) == 1


def test_plain_models_have_nothing_to_validate() -> None:
    model = copy.deepcopy(zoo.UNet())
    assert len(validate(model, torch.randn(1, 3, 16, 16))) == 0
    assert all(layer.backend == "torch" for layer in explain(model, torch.randn(1, 3, 16, 16)))


def test_measured_times_stand_beside_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = optimize(SegNet(3))
    explanation = explain(model, torch.randn(2, 1, 28, 28), measure=True)
    assert len(explanation) == 6
    for layer in explanation:
        assert layer.time is not None
        assert layer.time.measured > 0
        assert layer.time.share > 0
        assert layer.time.predicted > 0
    printed = capsys.readouterr().out
    for title in ("predicted ms", "measured ms", "of limit"):
        assert title in printed
    assert explain(model, torch.randn(2, 1, 28, 28), show=False).layers[0].time is None


def test_measuring_is_for_the_cpu() -> None:
    model, _ = optimize(SegNet(3))
    with pytest.raises(ValueError, match="measure=True is for models on CPU"):
        explain(model, torch.randn(2, 1, 28, 28), measure=True, arch="sm_90")


@pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built")
def test_explain_shows_what_was_prepared() -> None:
    image = torch.randn(IMAGE)
    model = zoo.PoseMachine().eval()
    optimize(model, mode="inference")
    found = {layer.name: layer for layer in explain(model, image, show=False)}
    assert "max-pool behind it" in found["conv1"].inference
    assert "writes into a concatenation" in found["conv2"].inference
    assert all("filter packed" in layer.inference for layer in found.values())
    assert "packed filters" in str(explain(model, image, show=False))
    tight = zoo.PoseMachine().eval()
    optimize(tight, mode="inference", max_prepared_bytes=0)
    for layer in explain(tight, image, show=False):
        assert "packed on every call" in layer.inference
    optimize(tight)
    assert all(not layer.inference for layer in explain(tight, image, show=False))


def test_validate_of_an_inference_model() -> None:
    model = inference_models.vgg().eval()
    optimize(model, mode="inference")
    report = validate(model, torch.randn(IMAGE))
    assert report, str(report)
    assert len(report) == 3
