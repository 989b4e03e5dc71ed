# SPDX-License-Identifier: BSD-3-Clause
"""What `info` reports, and how a missing or foreign library is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segpose_kernels
from segpose_kernels import backends, info


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(segpose_kernels.__file__).resolve().parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_collect_names_versions_processor_and_backends() -> None:
    facts = info.collect()
    assert facts["segpose_kernels"] == segpose_kernels.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["isa"] in facts["cpu"]["isas"]
    assert "generic" in facts["cpu"]["isas"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert all(isinstance(present, bool) for present in facts["cpu"]["features"].values())
    names = [backend["name"] for backend in facts["backends"]]
    assert names == [backend.name for backend in backends.BACKENDS]
    for backend in facts["backends"]:
        assert backend["available"] == (backend["reason"] is None)
    assert json.loads(json.dumps(facts)) == facts


def test_text_has_a_line_for_each_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for backend in backends.BACKENDS:
        line = next(line for line in lines if line.startswith(f"backend {backend.name}"))
        assert "available" in line if backend.missing is None else backend.missing in line


def test_json_is_what_collect_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_bad_argument_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        info.main(["--jsn"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


MISSING = """
import torch, segpose_kernels as sk
from segpose_kernels import backends, info
print(backends.LIBRARY.missing)
x, w = torch.randn(1, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3)
y = sk.conv2d_act(x, w)
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(x, w)))
try:
    sk.conv2d_act(x, w, backend="cpu")
except RuntimeError as error:
    print("refused:", error)
print(info.render(info.collect()))
"""


def test_missing_library_falls_back_and_keeps_the_reason(tmp_path: Path) -> None:
    """Importing works, "auto" runs on aten, and the backend asked for by name says why not."""
    result = run(MISSING, SEGPOSE_LIBRARY=str(tmp_path / "_C.so"))
    assert result.returncode == 0, result.stderr
    assert "_C.so does not load with torch" in result.stdout
    assert "refused: segpose_kernels: backend 'cpu' cannot run this call: _C.so" in result.stdout


def test_library_of_another_version_is_turned_away(tmp_path: Path) -> None:
    """A library that loads but registers other operators is no library of ours."""
    code = """
import torch
torch.ops.load_library = lambda path: None
library = torch.library.Library("segpose", "DEF")
library.define("conv2d_act(Tensor input) -> Tensor")
import segpose_kernels.backends as backends
print(backends.LIBRARY.missing)
assert backends.select("auto", "cpu", torch.float32) == "aten"
"""
    result = run(code, SEGPOSE_LIBRARY=str(tmp_path / "_C.so"))
    assert result.returncode == 0, result.stderr
    assert "was built from another version of the sources: its segpose::conv2d_act" in result.stdout


def test_environment_chooses_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGPOSE_BACKEND", "aten")
    assert backends._default_backend() == "aten"
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "aten")
    assert backends.select("auto", "cpu", torch.float32) == "aten"
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "triton")
    expected = r"backend 'triton' \(from SEGPOSE_BACKEND\) cannot run this call"
    with pytest.raises(RuntimeError, match=expected):
        backends.select("auto", "cpu", torch.float32)


def test_unknown_name_in_the_environment_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGPOSE_BACKEND", "what")
    with pytest.warns(UserWarning, match="SEGPOSE_BACKEND='what' is not one of auto, cuda"):
        assert backends._default_backend() == "auto"
