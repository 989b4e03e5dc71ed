# SPDX-License-Identifier: BSD-3-Clause
"""The script for machines with a GPU, as far as it runs without one."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from segpose_kernels.testing.problems import by_name

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "gpu_report"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "path", [str(SCRIPT), *sys.path])
    return runpy.run_path(str(SCRIPT / "__main__.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert script["main"](["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_parts_are_reported_by_name(script: dict[str, Any]) -> None:
    good = script["run"]("says hello", [sys.executable, "-c", "print('hello')"])
    bad = script["run"]("fails", [sys.executable, "-c", "raise SystemExit('broken')"])
    assert (good.outcome, good.failed) == ("passed", False)
    assert (bad.outcome, bad.failed) == ("failed", True)
    text = script["markdown"]({"gpu": "none"}, [good, bad], [])
    assert "| says hello | passed |" in text
    assert "broken" in text


@pytest.mark.parametrize("training", [False, True], ids=["forward", "step"])
def test_a_row_of_the_benchmark(
    script: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU: every contender is checked, timed and compared."""
    import measure

    monkeypatch.setattr(measure.torch, "compile", lambda f, **options: f)  # minutes on a CPU
    spec = replace(by_name("transposed-k3s2"), activation="relu")
    row = measure.measure(spec, torch.float32, torch.device("cpu"), training, rounds=2)
    assert set(row["ms"]) == {
        "segpose",
        "torch NCHW",
        "torch NCHW benchmark",
        "torch NHWC",
        "torch NHWC benchmark",
        "compile NHWC",
    }
    assert all(milliseconds > 0 for milliseconds in row["ms"].values())
    assert row["ratio"] > 0
    assert row["error"] < 100
    table = script["markdown"]({}, [], [row])
    assert f"| {spec.name} | float32 | {'step' if training else 'forward'} |" in table


def test_wrong_values_are_no_time(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import measure

    monkeypatch.setattr(measure.torch, "compile", lambda f, **options: f)
    monkeypatch.setattr(measure, "ours", lambda spec, x, w, b: measure.eager(spec, x, w, b) * 1.2)
    with pytest.raises(RuntimeError, match="wrong values from segpose"):
        measure.measure(by_name("conv-k3s2"), torch.float32, torch.device("cpu"), False, rounds=1)


def test_layers_are_those_of_the_models(script: dict[str, Any]) -> None:
    import measure

    names = {spec.name for spec in measure.layers(quick=False)}
    assert {"cpm-conv6_1", "segnet-decoder3", "transposed-unet-up"} <= names
    assert len(measure.layers(quick=True)) < len(names)
