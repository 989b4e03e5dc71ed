# SPDX-License-Identifier: BSD-3-Clause
"""`segpose bench` and `pytest benchmarks/` as commands: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_results import result, run_of

from segpose_kernels.__main__ import main
from segpose_kernels.bench import gate, run
from segpose_kernels.bench.arguments import parser
from segpose_kernels.bench.catalogue import CASES
from segpose_kernels.bench.results import Run
from segpose_kernels.info import collect

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--only", "segnet-decoder2", "--dtype", "float32", "--mode", "inference", "--threads", "1")


def isas() -> list[str]:
    """Instruction sets that the package can be held to; none where it was not built."""
    return list(collect()["cpu"]["isas"])


def exit_code(*arguments: str) -> int:
    """Exit code of `segpose bench` in this process, argparse's own exits included."""
    try:
        return main(["bench", *arguments])
    except SystemExit as error:
        return int(error.code or 0)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`segpose bench` in a process of its own: it confines itself to some cores."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "segpose_kernels", "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file of made-up results: one case is three times as fast as eager, one slower."""
    fast = result({"segpose": 1e-3, "eager": 3e-3, "openvino": 2e-3}, name="fast")
    slow = result({"segpose": 4e-3, "eager": 1e-3}, name="slow")
    path = tmp_path / "run.json"
    run_of(fast, slow).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--mode", "guessing"), "invalid choice: 'guessing'"),
        (("--only", "nothing-like-it"), "no case matches; 'segpose bench --list' shows all"),
        (("--threads", "0"), "--threads: asked for 0 threads"),
        (("--threads", "100000"), "--threads: asked for 100000 threads, this process has"),
        (("--seconds", "0"), "--seconds must be above 0, got 0.0"),
        (("--evict", "-1"), "--evict must not be negative, got -1"),
        (("--from", "not-there.json"), "cannot read not-there.json: No such file"),
        (("--from", "pyproject.toml"), "holds no results of segpose bench"),
        (("--readme", "README.md"), "--readme needs --report DIR"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_an_unknown_contender_is_named() -> None:
    done = command(*TINY, "--contenders", "abacus")
    assert done.returncode == 2
    assert "unknown contender 'abacus'; there are " in done.stderr


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == [case.id for case in CASES if case.tier != "extra"]
    assert exit_code("--list", "--quick", "--dtype", "float32") == 0
    quick = capsys.readouterr().out.splitlines()
    assert set(quick) < set(listed)
    assert all("float32" in name for name in quick)


def test_help_names_groups_and_contenders(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    for word in ("--quick", "--report", "--gpu", "cpm-layers", "eager-cl", "OpenVINO"):
        assert word in shown


def test_a_measurement_from_start_to_end(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = ("--contenders", "eager,eager-cl", "--seconds", "0.1", "--json", str(path))
    done = command(*TINY, *options, "--details")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in ("segnet-decoder2", "geometric mean", "1 cases in", "peak MiB"):
        assert words in done.stdout
    found = Run.load(path)
    assert found.machine["threads"] == 1
    assert "--only segnet-decoder2" in found.machine["command"]
    (case,) = found.cases
    assert case.measurements.keys() == {"segpose", "eager", "eager-cl"}
    assert len(case.measurements["segpose"].samples) >= 3
    assert all(1e-6 < sample < 1 for sample in case.measurements["segpose"].samples)


@pytest.mark.skipif("avx2" not in isas(), reason="no AVX2")
def test_everyone_is_held_to_an_instruction_set(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = ("--contenders", "eager,jax,onnxruntime", "--seconds", "0.1", "--json", str(path))
    done = command(*TINY, *options, "--isa", "avx2")
    assert done.returncode == 0, done.stderr
    found = Run.load(path)
    assert found.machine["isa"] == "avx2"
    assert found.cases[0].measurements.keys() == {"segpose", "eager"}
    assert found.limits is not None
    assert "avx2" in found.limits["source"]
    assert "512" not in found.limits["source"]


def test_stored_results_are_printed_and_reported(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "report"
    assert exit_code("--from", str(stored), "--report", str(folder), "--goals") == 0
    printed = capsys.readouterr().out
    assert "2.00x" in printed
    assert "CPM2DPose forward " in printed
    names = {path.name for path in folder.iterdir()}
    assert names == {"plots", "report.md", "report.html", "results.json"}
    assert Run.load(folder / "results.json") == Run.load(stored)


def test_the_gate(
    stored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        gate, "ratios_path", lambda isa, threads: tmp_path / f"{isa}-{threads}.json"
    )
    assert exit_code("--from", str(stored), "--gate") == 2
    assert "no ratios are stored for avx512 with 2 threads" in capsys.readouterr().err
    assert exit_code("--from", str(stored), "--store-ratios") == 0
    assert "2 ratios stored" in capsys.readouterr().out
    assert exit_code("--from", str(stored), "--gate") == 0
    assert "2 cases compared: 0 slower than before" in capsys.readouterr().out
    lost = result({"segpose": 2e-3, "eager": 3e-3}, name="fast")
    run_of(lost).save(stored)
    assert exit_code("--from", str(stored), "--gate") == 1
    printed = capsys.readouterr().out
    assert "1 cases compared: 1 slower than before" in printed
    assert "fast float32 inference: 1.50x torch eager, was 3.00x, 50% lost" in printed


def test_sweeps_with_one_thread_run_in_a_process_of_their_own(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def child(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        Path(command[command.index("--json") + 1]).write_text(stored.read_text())
        return subprocess.CompletedProcess(command, len(commands) - 1)

    monkeypatch.setattr(run.subprocess, "run", child)
    arguments = parser().parse_args(["--report", "--contenders", "eager", "--evict", "3"])
    assert run._sweeps_with_one_thread(arguments) == [Run.load(stored)]
    text = " ".join(commands[0])
    assert "bench --only scaling --threads 1 --json" in text
    assert text.endswith("--contenders eager --evict 3")
    assert run._sweeps_with_one_thread(arguments) == []  # the child failed, and said why
    assert "the sweeps with one thread" in capsys.readouterr().out


def test_the_gpu_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if __import__("torch").cuda.is_available():
        pytest.skip("with a GPU the command measures")
    assert exit_code("--gpu") == 0
    printed = capsys.readouterr()
    assert "(static)" in printed.out
    assert "no CUDA device here" in printed.err
    pytest.importorskip("matplotlib")
    assert exit_code("--gpu", "--report", str(tmp_path / "gpu")) == 0
    assert {path.name for path in (tmp_path / "gpu").iterdir()} == {"plots", "gpu.md", "gpu.html"}
    assert exit_code("--gpu", "--list") == 0


@pytest.mark.slow
def test_through_pytest_benchmark(tmp_path: Path) -> None:
    """The samples that pytest-benchmark reports are those that were taken in turns."""
    path = tmp_path / "run.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks/bench_transposed.py", "--quick", "-q"),
            *("--threads", "1", "-k", "segnet-2", "--benchmark-json", str(path)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())["benchmarks"]
    assert {"segpose", "eager", "eager-cl"} <= {entry["params"]["contender"] for entry in found}
    for entry in found:
        samples = entry["extra_info"]["segpose"]["measurement"]["samples"]
        assert entry["stats"]["rounds"] == len(samples)
        assert entry["stats"]["median"] == pytest.approx(statistics.median(samples))
        assert entry["stats"]["max"] == pytest.approx(max(samples))
    (case,) = Run.load(path).cases
    assert case.ratio is not None
    assert case.floor is not None
