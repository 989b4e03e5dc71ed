# SPDX-License-Identifier: BSD-3-Clause
"""What runs here: versions, processor, backends, and why one is missing.

`python -m segpose_kernels info` prints it, `--json` in a form for programs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch

from . import __version__, cpu_choices
from .backends import BACKENDS, DEFAULT_BACKEND, LIBRARY

__all__ = ["collect", "main", "render"]


def _plan_module() -> tuple[ModuleType | None, str | None]:
    """The module of plans and processor features, or why it is not there."""
    try:
        return importlib.import_module("._plan", __package__), None
    except ImportError as error:
        return None, f"segpose_kernels._plan: {error}; build it with `pip install -e .`"


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    plan, reason = _plan_module()
    cpu: dict[str, Any] = {
        "architecture": platform.machine(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": None,
        "isas": [],
        "features": {},
        "missing": reason,
    }
    if plan is not None:
        try:
            cpu["isa"] = plan.selected_isa()
        except (RuntimeError, ValueError) as error:  # SEGPOSE_CPU_ISA names one that is not there
            cpu["missing"] = str(error)
        cpu["isas"] = list(plan.isas())
        cpu["features"] = dict(plan.cpu_features())
    return cpu


def collect() -> dict[str, Any]:
    """Everything `info` knows, as plain data.

    Keys: "segpose_kernels", "python", "platform", "torch" (version, cuda, git), "triton",
    "compiler", "library" (path, missing), "cpu" (isa, isas, features, threads, ...), "backends" (a
    list of name, available, reason in the order they are tried), "default_backend", "tuned_on_cpu"
    (passes whose algorithm was measured, and the file that holds them), "environment" (the
    SEGPOSE_* variables that are set). A version is None where there is none.
    """
    plan, _ = _plan_module()
    compiler = getattr(plan, "compiler", None)
    return {
        "segpose_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "git": torch.version.git_version,
        },
        "triton": _version_of("triton"),
        "compiler": compiler() if callable(compiler) else compiler,
        "library": {
            "path": None if LIBRARY.path is None else str(LIBRARY.path),
            "missing": LIBRARY.missing,
        },
        "cpu": _cpu(),
        "backends": [
            {"name": b.name, "available": b.missing is None, "reason": b.missing} for b in BACKENDS
        ],
        "default_backend": DEFAULT_BACKEND,
        "tuned_on_cpu": {
            "passes": len(cpu_choices.store()),
            "path": str(cpu_choices.store().path),
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("SEGPOSE_")},
    }


def render(facts: dict[str, Any]) -> str:
    """`facts` of `collect` as lines of plain text."""
    cpu, torch_facts = facts["cpu"], facts["torch"]
    features = [name for name, present in cpu["features"].items() if present]
    rows = [
        ("segpose_kernels", facts["segpose_kernels"]),
        ("python", facts["python"]),
        ("platform", facts["platform"]),
        ("torch", f"{torch_facts['version']} (CUDA {torch_facts['cuda'] or 'not built in'})"),
        ("triton", facts["triton"] or "not installed"),
        ("compiler", facts["compiler"] or "unknown"),
        ("library", facts["library"]["missing"] or facts["library"]["path"]),
        ("cpu ISA", cpu["isa"] or f"unknown: {cpu['missing']}"),
        ("cpu ISAs", ", ".join(cpu["isas"]) or "unknown"),
        ("cpu features", ", ".join(features) or "unknown"),
        ("threads", f"{cpu['threads']} of {cpu['logical_cores']} logical cores"),
        ("default backend", facts["default_backend"]),
        ("tuned on CPU", "{passes} passes, {path}".format(**facts["tuned_on_cpu"])),
    ]
    for name, value in facts["environment"].items():
        rows.append((name, value))
    for backend in facts["backends"]:
        state = "available" if backend["available"] else f"missing: {backend['reason']}"
        rows.append((f"backend {backend['name']}", state))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the exit code stays argparse's 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Print what runs here; the command line of `python -m segpose_kernels info`."""
    parser = _Parser(prog="python -m segpose_kernels info", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
