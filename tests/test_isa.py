# SPDX-License-Identifier: BSD-3-Clause
"""The kernels once for each instruction set of this machine, forced by SEGPOSE_CPU_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from segpose_kernels import _plan

TESTS = Path(__file__).resolve().parent
COMPACT = (
    "test_kernels.py",
    "test_activation.py",
    "test_few_columns.py",
    "test_backward_blocks.py",
    "test_packed_wgrad.py",
)
KNOWN = ("generic", "avx2", "avx512", "amx")


def run_python(arguments: list[str], isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "SEGPOSE_CPU_ISA"}
    if isa is not None:
        environment["SEGPOSE_CPU_ISA"] = isa
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("isa", KNOWN)
def test_compact_suite(isa: str) -> None:
    """Output and gradients of the compact problems in every dtype, with each kernel set."""
    if isa not in _plan.isas():
        pytest.skip(f"this machine or build has no {isa}")
    if isa == _plan.selected_isa():
        pytest.skip(f"{isa} is what the tests of this process run")
    files = [str(TESTS / name) for name in COMPACT]
    done = run_python(
        ["-m", "pytest", "-q", "-m", "compact", "-p", "no:cacheprovider", *files], isa
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", [*KNOWN, None])
def test_selection_respects_the_environment(isa: str | None) -> None:
    """The forced set is the one in use; without the variable it is the widest there is."""
    if isa is not None and isa not in _plan.isas():
        pytest.skip(f"this machine or build has no {isa}")
    code = (
        "from segpose_kernels import _plan;"
        "p = _plan.ConvProblem(n=1, h=9, w=9, c=32, k=32, r=3, s=3);"
        "print(_plan.selected_isa(), _plan.plan(p).isa)"
    )
    done = run_python(["-c", code], isa)
    expected = _plan.isas()[-1] if isa is None else isa
    assert done.stdout.split() == [expected, expected], done.stderr[-2000:]


CALL = (
    "import torch, segpose_kernels as s\n"
    "try:\n"
    "    s.conv2d_act(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), backend='cpu')\n"
    "except RuntimeError as error:\n"
    "    print('RuntimeError:', error)\n"
)


def unavailable_isa() -> str:
    missing = [name for name in KNOWN if name not in _plan.isas()]
    return missing[0] if missing else "neon"


@pytest.mark.parametrize("isa", ["pentium", "AVX2", unavailable_isa()])
def test_unknown_isa_is_one_clear_error(isa: str) -> None:
    """The import works, and the first call names the variable, the value and the choices."""
    done = run_python(["-c", CALL], isa)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("RuntimeError:")
    for word in ("SEGPOSE_CPU_ISA", repr(isa), "generic"):
        assert word in done.stdout
