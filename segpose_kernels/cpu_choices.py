# SPDX-License-Identifier: BSD-3-Clause
"""Algorithms that measurements have chosen for passes on the CPU; kept by stored_choices.py.

What is on disk for this processor and this build holds from the first call on, whether or not
anything is measured in this process. Without an entry the kernels take the algorithm whose
predicted time is shortest.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from .backends import LIBRARY
from .stored_choices import Store

__all__ = ["PassKey", "apply_stored", "choose", "forget", "recall", "remember", "store"]


@dataclass(frozen=True)
class PassKey:
    """One pass of a convolution problem, as the kernels tell passes apart."""

    numbers: tuple[int, ...]  # of the problem, in the order of ConvProblem (csrc/common)
    op: str  # "fprop", "dgrad" or "wgrad"
    dtype: str
    precision: str
    prepared: bool  # the filter is packed once

    def __str__(self) -> str:
        words = [self.op, self.dtype, self.precision, *(["prepared"] if self.prepared else [])]
        return f"{' '.join(words)}: {' '.join(map(str, self.numbers))}"

    @staticmethod
    def parse(text: str) -> PassKey:
        """The inverse of str(); raises ValueError for anything else."""
        words, _, numbers = text.partition(": ")
        op, dtype, precision, *prepared = words.split()
        return PassKey(tuple(map(int, numbers.split())), op, dtype, precision, bool(prepared))


@functools.lru_cache(maxsize=1)
def store() -> Store:
    """The choices for this processor, instruction set and build of the library."""
    built = LIBRARY.path.stat() if LIBRARY.loaded and LIBRARY.path is not None else None
    versions = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "library": "none" if built is None else f"{built.st_size} {built.st_mtime_ns}",
        "isa": os.environ.get("SEGPOSE_CPU_ISA", ""),  # the processor decides where it is not set
    }
    return Store(f"cpu-{_processor()}", versions)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(names, "unknown")
    except OSError:
        return "unknown"


def choose(key: PassKey, algorithm: str) -> None:
    """Let the kernels take an algorithm for a pass, or with "" the predicted one, in this process.

    Raises ValueError or RuntimeError for a key or an algorithm that the library does not know.
    """
    torch.ops.segpose.choose_algorithm(
        list(key.numbers), key.op, key.dtype, key.precision, key.prepared, algorithm
    )


def recall(key: PassKey) -> str | None:
    """What measuring has chosen, or None."""
    found = store().get(str(key))
    return found if isinstance(found, str) else None


def remember(key: PassKey, algorithm: str) -> None:
    """Choose it here, and in processes to come."""
    choose(key, algorithm)
    store().put(str(key), algorithm)


def apply_stored() -> None:
    """Choose everything that is on disk; entries that the library does not know are left out."""
    if not LIBRARY.has_kernels_for("CPU"):
        return
    for text, algorithm in store().items():
        try:
            choose(PassKey.parse(text), algorithm)
        except (RuntimeError, ValueError, TypeError):
            continue


def forget() -> None:
    """Drop every choice, here and on disk; other processes keep theirs until they end."""
    for text, _ in store().items():
        try:
            choose(PassKey.parse(text), "")
        except (RuntimeError, ValueError, TypeError):
            continue
    store().clear()
