# SPDX-License-Identifier: BSD-3-Clause
"""The demo, run whole but quickly, and its checks, which must see a wrong kernel."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from segpose_kernels.demo import checks
from segpose_kernels.models import SegNet

PICTURES = (
    "segnet_predictions.png",
    "learning_curve.png",
    "pose_heatmaps.png",
    "convolution_matrices.png",
    "speed.png",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one quick run."""
    for module in ("matplotlib", "mlxtend", "skimage"):
        pytest.importorskip(module)
    from segpose_kernels.demo.run import main

    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert main(["--quick", "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_written(output: Path, name: str) -> None:
    data = (output / name).read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 400
    assert len(data) > 20_000, "a picture this small is empty"


def test_results(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    assert 0 <= results["segnet"]["mean_iou"] <= results["segnet"]["pixel_accuracy"] <= 1
    assert len(results["segnet"]["class_iou"]) == 11
    assert results["versions"]["torch"]["version"] == torch.__version__
    assert results["isa"] == results["info"]["cpu"]["isa"]
    assert all(check["passed"] for check in results["checks"])
    assert {check["kind"] for check in results["checks"]} == {"output", "gradient"}
    timed = {(row["workload"].split()[0], row["operation"]) for row in results["timing"]}
    operations = ("forward", "training step")
    assert timed == {(model, name) for model in ("SegNet", "CPM2DPose") for name in operations}
    for row in (*results["timing"], *results["memory"]):
        assert row["ratio"] > 0
    assert [row["workload"].split()[0] for row in results["memory"]] == ["SegNet", "CPM2DPose"]


def test_checks_pass_for_right_kernels() -> None:
    rows = checks.check_model("SegNet", SegNet(3), torch.rand(2, 1, 28, 28))
    assert [(row.scope, row.kind) for row in rows] == [
        (scope, kind) for scope in (checks.WHOLE, checks.LAYERS) for kind in ("output", "gradient")
    ]
    # The image and six layers' weight and bias; layer by layer, the input of each as well.
    assert [row.tensors for row in rows] == [1, 13, 6, 18]
    assert all(row.passed for row in rows)


def test_checks_see_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(model: nn.Module) -> tuple[nn.Module, object]:
        layer = model.get_submodule("decoder.2")
        layer.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-9))
        return model, None

    monkeypatch.setattr(checks, "optimize", slightly_wrong)
    rows = checks._check_whole("SegNet", SegNet(3), torch.rand(2, 1, 28, 28))
    assert [row.passed for row in rows] == [False, False]


def test_a_result_that_is_not_finite_never_passes() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    error = checks.relative_error(torch.tensor([1.0, float("nan"), 1.0]), exact)
    assert error > checks.LARGEST_ERROR_FLOAT64
