# SPDX-License-Identifier: BSD-3-Clause
"""Planted faults in the CUDA backend: the simulator or the values must show every one.

Not part of the default run: pytest -m mutation (about ten minutes on one core).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cuda_mutants import MUTANTS, Mutant, write

cudasim = pytest.importorskip("cudasim")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_fault_can_be_planted(mutant: Mutant) -> None:
    """The code that a mutant changes is still there, once."""
    with tempfile.TemporaryDirectory() as folder:
        write(mutant, Path(folder))


def test_there_are_enough_faults_of_every_kind() -> None:
    assert len(MUTANTS) >= 25
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.mutation
@pytest.mark.skipif(not cudasim.have_nvcc(), reason="no nvcc to compile the kernels with")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_fault_is_caught(mutant: Mutant) -> None:
    script = Path(__file__).with_name("cuda_mutants.py")
    done = subprocess.run(
        [sys.executable, str(script), mutant.name],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    # A script that fails exits with 1 too, but names no problem.
    assert done.returncode == 1, f"{mutant.name} survived\n{done.stdout}{done.stderr}"
    # A mutant that does not compile, or a script that fails, is not a fault that was caught.
    assert done.stdout.strip(), done.stderr
    found = done.stdout.splitlines()[0]
    assert not any(compiler in found for compiler in ("nvcc", "g++")), done.stdout
