# SPDX-License-Identifier: BSD-3-Clause
"""Where a run took place: processor, caches, versions, commit and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..info import collect

__all__ = ["HELD_TO", "available_cores", "confine", "describe", "facts"]

_PACKAGES = ("torch", "triton", "onnxruntime", "openvino", "jax", "onnx", "nvidia-cudnn-frontend")


HELD_TO = {
    "avx2": {
        "SEGPOSE_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
}
"""Environment that holds this package, oneDNN (torch's and OpenVINO's) and torch's own kernels to
an instruction set, as if the machine had no newer one. It has to be set before they load.
"""

NOT_HELD = ("onnxruntime", "jax")
"""Contenders that no setting holds to an instruction set."""


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def confine(threads: int) -> None:
    """Give this process `threads` cores and torch as many threads.

    Every pool started afterwards sees these cores only, so that nobody takes more than asked for.

    Raises:
        ValueError: if the process has fewer cores, or for less than one.
    """
    available = available_cores()
    if not 1 <= threads <= available:
        raise ValueError(f"asked for {threads} threads, this process has {available} cores")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def facts(device: str, threads: int, command: Sequence[str]) -> dict[str, Any]:
    """Plain data for a report.

    Keys: "date", "command", "commit", "processor", "cores", "threads", "isa", "caches" (bytes by
    level, of one core or shared), "memory" (bytes), "platform", "versions", "device", "gpu" (name
    or None).
    """
    info = collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(command),
        "commit": commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": info["cpu"]["isa"],
        "features": [name for name, there in info["cpu"]["features"].items() if there],
        "caches": _caches(),
        "memory": _memory(),
        "platform": info["platform"],
        "python": info["python"],
        "versions": {"segpose_kernels": info["segpose_kernels"], **_versions(_PACKAGES)},
        "backends": {b["name"]: b["reason"] or "available" for b in info["backends"]},
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def describe(machine: dict[str, Any]) -> str:
    """One line: processor, instruction set, threads, versions, commit."""
    cores = f"{machine['threads']} of {machine['cores']} cores"
    where = machine["gpu"] or f"{machine['processor']}, {machine['isa']}, {cores}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{where}; {versions}; commit {machine['commit']}"


def commit() -> str:
    """Short commit of the source this package runs from, with + if files differ; or "unknown"."""
    folder = Path(__file__).resolve().parents[2]
    head = _git(folder, "rev-parse", "--short=10", "HEAD")
    if not head or not (folder / "segpose_kernels").is_dir():
        return "unknown"
    return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        ):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> dict[str, int]:
    """Bytes of the first core's data caches by level, as Linux tells them."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = (
                (index / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            caches[f"L{level}"] = int(size.rstrip("K")) * 1024
    return caches


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
