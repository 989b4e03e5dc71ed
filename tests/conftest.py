# SPDX-License-Identifier: BSD-3-Clause
"""Fixed seeds, poisoned memory and the marks shared by all tests."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Before the package is imported: what this machine's user has tuned decides no test.
os.environ["SEGPOSE_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"segpose-{os.getpid()}")

from segpose_kernels.testing.poison import poisoned_memory

SEED = 20240607

MARKS = (
    "cuda: needs a CUDA device; skipped by name where there is none",
    "mutation: plants a fault and expects the checks to find it; runs with -m mutation only",
    "slow: more than a few seconds; runs with --slow or SEGPOSE_SLOW=1",
    "compact: the subset that is repeated for every instruction set",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    # Small problems on a busy machine wait for a second thread longer than they compute. What
    # threads change is compared with one thread, bit by bit, in test_threads.py.
    torch.set_num_threads(int(os.environ.get("SEGPOSE_TEST_THREADS", "1")))
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Marks, not keywords: an id such as "cuda" is a keyword, too.
    def marked(item: pytest.Item, mark: str) -> bool:
        return item.get_closest_marker(mark) is not None

    slow = config.getoption("--slow") or os.environ.get("SEGPOSE_SLOW", "0") not in ("", "0")
    no_cuda = None if torch.cuda.is_available() else pytest.mark.skip(reason="no CUDA device")
    chosen = config.getoption("-m") or ""
    left_out = [] if "mutation" in chosen else [i for i in items if marked(i, "mutation")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not marked(item, "mutation")]
    for item in items:
        if no_cuda is not None and marked(item, "cuda"):
            item.add_marker(no_cuda)
        if not slow and marked(item, "slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow or SEGPOSE_SLOW=1"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test draws the same numbers whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory reads as NaN during the test."""
    with poisoned_memory():
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the test's own for what tuning finds."""
    from segpose_kernels import cpu_choices
    from segpose_kernels.triton import choices

    monkeypatch.setenv("SEGPOSE_CACHE_DIR", str(tmp_path / "cache"))
    choices.forget_loaded()
    cpu_choices.store.cache_clear()
    yield tmp_path / "cache"
    choices.forget_loaded()
    cpu_choices.forget()
    cpu_choices.store.cache_clear()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two intra-op threads during the test, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
