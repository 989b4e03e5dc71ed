# SPDX-License-Identifier: BSD-3-Clause
"""What tuning has found, in memory and on disk: one JSON file for each GPU and set of versions.

The folder is $SEGPOSE_CACHE_DIR, or segpose_kernels in the user's cache folder. A file is replaced
in one step, so a reader never sees half of one; two processes that tune at the same time may lose
an entry of each other, which is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from .device import Device
from .plan import Choice, Direction, Epilogue, Operands
from .problem import ConvProblem
from .tiles import Tile

__all__ = ["gather_key", "generation", "recall", "remember", "store_of", "wgrad_key"]

_SOURCES = (
    *("geometry", "kernels", "direct", "pointwise", "tiles", "tile_costs"),
    *("plan", "plan_gather", "plan_wgrad", "plan_pointwise"),
)


def cache_folder() -> Path:
    """Where results are kept between processes."""
    chosen = os.environ.get("SEGPOSE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "segpose_kernels"


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


class Store:
    """Choices for one device. Reading and writing are safe from several threads."""

    def __init__(self, device: Device) -> None:
        self._lock = threading.Lock()
        self._device = device
        self._entries: dict[str, Choice] | None = None

    @property
    def path(self) -> Path:
        versions = hashlib.sha256(json.dumps(_versions(), sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^A-Za-z0-9]+", "-", self._device.name).strip("-")
        return cache_folder() / f"triton-{name}-{versions[:12]}.json"

    def _loaded(self) -> dict[str, Choice]:
        if self._entries is None:
            self._entries = _read(self.path)
        return self._entries

    def get(self, key: str) -> Choice | None:
        with self._lock:
            return self._loaded().get(key)

    def put(self, key: str, choice: Choice) -> None:
        """Remember a choice, on disk too where the folder can be written."""
        with self._lock:
            # What other processes have found meanwhile is kept.
            entries = {**_read(self.path), **self._loaded(), key: choice}
            self._entries = entries
            _write(self.path, self._device, entries)

    def __len__(self) -> int:
        with self._lock:
            return len(self._loaded())


def _decode(entry: Mapping[str, Any]) -> Choice:
    tile = entry["tile"]
    return Choice(entry["kernel"], None if tile is None else Tile(**tile), entry["splits"])


def _read(path: Path) -> dict[str, Choice]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: _decode(entry) for key, entry in content["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        # Missing or unreadable: what it held is measured again.
        return {}


def _write(path: Path, device: Device, entries: Mapping[str, Choice]) -> None:
    content = {
        "device": asdict(device),
        "versions": _versions(),
        "entries": {key: asdict(choice) for key, choice in sorted(entries.items())},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    except OSError:
        return  # a read-only cache folder: the choice holds for this process
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(name, path)


_stores: dict[Device, Store] = {}
_stores_lock = threading.Lock()
_generation = 0


def store_of(device: Device) -> Store:
    with _stores_lock:
        return _stores.setdefault(device, Store(device))


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
