# SPDX-License-Identifier: BSD-3-Clause
"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from segpose_kernels import __version__, extras
from segpose_kernels.__main__ import COMMANDS, main


def exit_code(*arguments: str) -> int:
    """Exit code of a run in this process, argparse's own exits included."""
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("--nonsense",),
        ("demo", "--nonsense"),
        ("demo", "--output"),
        ("demo", "stray"),
        ("info", "--nonsense"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "error: " in printed.err


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("matplotlib", "mlxtend", "skimage"):
        pytest.importorskip(module)
    file = tmp_path / "taken"
    file.touch()
    assert exit_code("demo", "--output", str(file)) == 2
    printed = capsys.readouterr()
    assert printed.err == f"segpose demo: error: cannot write to {file}: File exists\n"


def test_a_missing_extra_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert exit_code("demo") == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "pip install segpose_kernels[demo]" in printed.err
    assert issubclass(extras.MissingExtraError, ImportError)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"{name} " in shown
        assert command.summary in shown
    assert exit_code("demo", "--help") == 0
    assert "--output DIR" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"segpose_kernels {__version__}\n"


def test_info_as_json_in_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "segpose_kernels", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["segpose_kernels"] == __version__
    assert done.stderr == ""
