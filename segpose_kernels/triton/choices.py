# SPDX-License-Identifier: BSD-3-Clause
"""What tuning has found for the Triton kernels, by device; kept by stored_choices.py."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from ..stored_choices import Store
from .device import Device
from .plan import Choice, Direction, Epilogue, Operands
from .problem import ConvProblem
from .tiles import Tile

__all__ = ["gather_key", "generation", "recall", "remember", "store_of", "wgrad_key"]

_SOURCES = (
    *("geometry", "kernels", "direct", "pointwise", "tiles", "tile_costs"),
    *("plan", "plan_gather", "plan_wgrad", "plan_pointwise"),
)


@functools.lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """Everything that may change which kernel is fastest."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((folder / f"{name}.py").read_bytes())
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton.__version__,
        "kernels": digest.hexdigest()[:16],
    }


class ChoiceStore:
    """Choices for one device."""

    def __init__(self, device: Device) -> None:
        about = {"device": asdict(device)}
        self._store = Store(f"triton-{device.name}", _versions(), about)

    @property
    def path(self) -> Path:
        return self._store.path

    def get(self, key: str) -> Choice | None:
        entry = self._store.get(key)
        try:
            return None if entry is None else _decode(entry)
        except (KeyError, TypeError):
            return None  # no choice of ours: it is measured again

    def put(self, key: str, choice: Choice) -> None:
        self._store.put(key, asdict(choice))

    def __len__(self) -> int:
        return len(self._store)


def _decode(entry: Mapping[str, Any]) -> Choice:
    tile = entry["tile"]
    return Choice(entry["kernel"], None if tile is None else Tile(**tile), entry["splits"])


_stores: dict[Device, ChoiceStore] = {}
_stores_lock = threading.Lock()
_generation = 0


def store_of(device: Device) -> ChoiceStore:
    with _stores_lock:
        return _stores.setdefault(device, ChoiceStore(device))


def generation() -> int:
    """Grows whenever a choice changes: what was planned before is then out of date."""
    return _generation


def recall(operands: Operands, key: str) -> Choice | None:
    """What tuning chose, or None."""
    return store_of(operands.device).get(key)


def remember(operands: Operands, key: str, choice: Choice) -> None:
    global _generation
    store_of(operands.device).put(key, choice)
    with _stores_lock:
        _generation += 1


def forget_loaded() -> None:
    """Drop what is in memory; files are read again when needed."""
    global _generation
    with _stores_lock:
        _stores.clear()
        _generation += 1


def _arithmetic(operands: Operands) -> str:
    name = str(operands.dtype).removeprefix("torch.")
    return operands.precision if name == "float32" else name


def gather_key(
    problem: ConvProblem, direction: Direction, operands: Operands, epilogue: Epilogue
) -> str:
    """What a choice for fprop or dgrad depends on, readable in the file."""
    variant = " masked" if epilogue.mask_slope != 1 else ""
    variant += " fused" if epilogue.bias or epilogue.slope != 1 else ""
    return f"{direction} {_arithmetic(operands)}{variant}: {problem}"


def wgrad_key(problem: ConvProblem, operands: Operands, masked: bool) -> str:
    variant = " masked" if masked else ""
    return f"wgrad {_arithmetic(operands)}{variant}: {problem}"
