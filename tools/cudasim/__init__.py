# SPDX-License-Identifier: BSD-3-Clause
"""Runs the cuda backend without a GPU: real host code and launches, PTX executed by ptxsim.

    with cudasim.simulated(multiprocessors=4) as simulator:
        conv2d_act(x, w, b, backend="cuda")        # CPU tensors as device memory

The sources of the backend are built as a library of their own, on a fake CUDA runtime whose
launches ptxsim runs, and its operators are registered for CPU tensors as `segpose_simulated::*`.
Inside the block the backend "cuda" takes CPU tensors and runs those operators. A launch that ptxsim
reports on, or that leaves an element of an output unwritten, raises at the end of the block.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ptxsim import Counters, PtxSimError, Report, cudart, toolchain
from torch.utils import cpp_extension

from segpose_kernels import autograd, backends, functional

from .names import kernel_name

__all__ = [
    "KERNELS",
    "SOURCES",
    "Simulator",
    "configure",
    "have_nvcc",
    "kernel_name",
    "library",
    "operators",
    "simulated",
]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
KERNELS = tuple(f"cuda/kernels_{dtype}.cu" for dtype in ("f16", "bf16", "f32", "f64"))
PLANS = tuple(f"cuda/plan{part}.cpp" for part in ("", "_gather", "_parts", "_text", "_wgrad"))
HOST = ("cuda/conv.cpp", "cuda/passes.cpp", *PLANS, "common/phases.cpp")
NAMESPACE = "segpose_simulated"
TORCH_TARGET_VERSION = "0x020d000000000000"  # as in setup.py


def have_nvcc() -> bool:
    """Whether there is an nvcc, on PATH or from the pip packages of the toolkit."""
    try:
        toolchain.nvcc_path()
    except PtxSimError:
        return False
    return True


def _toolkit_include() -> Path:
    """Headers of the toolkit that nvcc belongs to."""
    command = [toolchain.nvcc_path(), "--dryrun", "-c", "x.cu"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    top = next(line for line in printed.splitlines() if line.startswith("#$ TOP="))
    return Path(top.partition("=")[2].strip()) / "include"


def _compile_host(source: Path, headers: Sequence[str]) -> Path:
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DSEGPOSE_SIMULATED"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    flags += [f"-isystem{path}" for path in headers]

    def build(target: str) -> None:
        toolchain.run_tool(["g++", *flags, "-c", str(source), "-o", target])

    return toolchain.cached_build(source, ".o", build, flags, None, torch.__version__)


# Where the library comes from; `configure` changes it.
_sources = SOURCES
_kernels = tuple(SOURCES / name for name in KERNELS)


def configure(sources: Path, kernels: Sequence[Path]) -> None:
    """Build from other host sources and other kernels, before the first use."""
    global _sources, _kernels
    assert library.cache_info().currsize == 0, "the library has been built already"
    _sources, _kernels = sources, tuple(kernels)


@cache
def library(arch: str = "sm_80") -> cudart.HostLibrary:
    """The simulated library; compiled files are cached by content."""
    headers = [*cpp_extension.include_paths(), str(_toolkit_include())]
    objects = [_compile_host(_sources / name, headers) for name in HOST]
    torch_library = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_library}", f"-Wl,-rpath,{torch_library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    built = cudart.compile_library(_kernels, arch, objects=objects, link_flags=link)
    # Half a million objects of parsed instructions live to the end: keep the collector off them.
    gc.collect()
    gc.freeze()
    return built


@cache
def operators() -> tuple[torch.library.Library, dict[str, autograd.NativeOp]]:
    """The simulated operators by label, registered once, and what keeps them registered."""
    built = library()
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in backends.SCHEMAS.items():
        definitions.define(f"{name}{schema}")
    torch.ops.load_library(built.path)
    return definitions, autograd.make_ops(NAMESPACE)


@dataclass
class Simulator:
    """What ran in a block: findings, the kernels in order, and counters by kernel if asked for."""

    report: Report
    library: cudart.HostLibrary
    by_kernel: dict[str, Counters] = field(default_factory=dict)

    @property
    def launched(self) -> list[str]:
        return [kernel_name(name) for name in self.library.launched]

    @property
    def counters(self) -> dict[str, Counters]:
        return {kernel_name(name): counters for name, counters in self.by_kernel.items()}


@contextlib.contextmanager
def simulated(
    multiprocessors: int = 4, cc: int = 80, *, count: bool = False, **options: Any
) -> Iterator[Simulator]:
    """Route backend="cuda" on CPU tensors through the simulator.

    multiprocessors: decides what the plans choose; with few of them large tiles pay even for small
    problems.
    count: keep counters of each kernel.
    options: those of ptxsim.launch, such as schedule (the seed of another order of the warps).

    Raises ptxsim.KernelFault for findings.
    """
    _, ops = operators()
    built = library()
    built.set_device(cc // 10, cc % 10, multiprocessors)
    cuda = backends.Backend("cuda", frozenset({"cpu"}), backends.NATIVE_DTYPES, None)
    by_kernel: dict[str, Counters] = {}
    if count:
        options["counters"] = by_kernel
    with contextlib.ExitStack() as stack:
        for operator in (functional._CONV2D, functional._CONV_TRANSPOSE2D):
            stack.enter_context(mock.patch.dict(operator.runners, {"cuda": ops[operator.label]}))
        stack.enter_context(mock.patch.dict(backends._BY_NAME, {"cuda": cuda}))
        stack.enter_context(mock.patch.dict(backends._selected, clear=True))
        report = stack.enter_context(built.watch(**options))
        yield Simulator(report, built, by_kernel)
    report.raise_if_any()
