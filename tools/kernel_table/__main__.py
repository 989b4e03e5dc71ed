# SPDX-License-Identifier: BSD-3-Clause
"""Makes the table that `segpose kernels` prints: python tools/kernel_table [--only BACKEND].

One module a backend has `produce() -> Facts`. What it returns replaces that backend's entry in
segpose_kernels/kernel_facts.json, and the whole table goes into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "ptxsim")]

from segpose_kernels import kernel_facts  # noqa: E402

# Backend and module; another one is another line here and in kernel_facts.SOURCES.
PRODUCERS = {"cuda": "cuda_kernels", "triton": "triton_kernels"}
DOCUMENT = ROOT / "docs" / "kernels.md"


def dump(table: dict[str, Any]) -> str:
    """JSON with one kernel a line."""
    entries = []
    for backend, entry in table.items():
        rows = ",\n".join(json.dumps(kernel) for kernel in entry["kernels"])
        others = {key: value for key, value in entry.items() if key != "kernels"}
        before = json.dumps(others)[:-1]
        entries.append(f'{json.dumps(backend)}: {before}, "kernels": [\n{rows}\n]}}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/kernel_table", description=__doc__)
    parser.add_argument("--only", choices=list(PRODUCERS), help="only this backend's entry")
    arguments = parser.parse_args(argv)
    table = kernel_facts.load() if kernel_facts.DATA.exists() else {}
    for backend, module in PRODUCERS.items():
        if arguments.only not in (None, backend):
            continue
        facts = importlib.import_module(module).produce()
        table[backend] = {
            "sources": kernel_facts.source_hash(backend),
            "compiler": facts.compiler,
            "kernels": facts.kernels,
        }
        # At once, so that what follows may fail.
        kernel_facts.DATA.write_text(dump(table), encoding="utf-8")
    rewrite = importlib.import_module("document").rewrite
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
