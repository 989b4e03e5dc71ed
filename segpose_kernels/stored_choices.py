# SPDX-License-Identifier: BSD-3-Clause
"""What measurements have chosen, in memory and on disk: one JSON file for each machine and version.

The folder is $SEGPOSE_CACHE_DIR, or segpose_kernels in the user's cache folder. A file is replaced
in one step, so a reader never sees half of one; two processes that tune at the same time may lose
an entry of each other, which is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Store", "cache_folder"]


def cache_folder() -> Path:
    """Where results are kept between processes."""
    chosen = os.environ.get("SEGPOSE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "segpose_kernels"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "segpose_kernels"


class Store:
    """Entries of plain data by key. Reading and writing are safe from several threads.

    Args:
        name: of the machine they were measured on.
        versions: everything that may change which choice is best.
        about: what else the file shall say.
    """

    def __init__(
        self, name: str, versions: Mapping[str, str], about: Mapping[str, Any] | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._name = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
        self._versions = dict(versions)
        self._about = dict(about or {})
        self._entries: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self._versions, sort_keys=True).encode()).hexdigest()
        return cache_folder() / f"{self._name}-{digest[:12]}.json"

    def _loaded(self) -> dict[str, Any]:
        if self._entries is None:
            self._entries = self._read()
        return self._entries

    def get(self, key: str) -> Any:
        """The entry of a key, or None."""
        with self._lock:
            return self._loaded().get(key)

    def items(self) -> list[tuple[str, Any]]:
        with self._lock:
            return list(self._loaded().items())

    def put(self, key: str, entry: Any) -> None:
        """Remember an entry, on disk too where the folder can be written."""
        with self._lock:
            # What other processes have found meanwhile is kept.
            self._entries = {**self._read(), **self._loaded(), key: entry}
            self._write(self._entries)

    def clear(self) -> None:
        """Forget every entry, on disk too."""
        with self._lock:
            self._entries = {}
            with contextlib.suppress(OSError):
                self.path.unlink()

    def __len__(self) -> int:
        with self._lock:
            return len(self._loaded())

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["entries"]
        except (OSError, ValueError, KeyError, TypeError):
            # Missing or unreadable: what it held is measured again.
            return {}
        return dict(entries) if isinstance(entries, dict) else {}

    def _write(self, entries: Mapping[str, Any]) -> None:
        content = {
            **self._about,
            "versions": self._versions,
            "entries": dict(sorted(entries.items())),
        }
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(
                dir=path.parent, prefix=path.stem, suffix=".partial"
            )
        except OSError:
            return  # a read-only cache folder: the choice holds for this process
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
