# SPDX-License-Identifier: BSD-3-Clause
"""`backend="cuda"` on CPU tensors: the library's host code and compiled kernels, executed by ptxsim.

The sources of the CUDA backend are built as a library of their own, on a fake CUDA runtime whose
launches ptxsim runs, and its operators are registered for CPU tensors as `segpose_simulated::*`.
`simulated_cuda` puts them where the backend "cuda" has its operators.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ptxsim
import pytest
import torch
from ptxsim import cudart, toolchain
from torch.utils import cpp_extension

from segpose_kernels import autograd, backends, functional

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
KERNELS = tuple(SOURCES / f"kernels_{dtype}.cu" for dtype in ("f16", "bf16", "f32", "f64"))
HOST = ("cuda/conv.cpp", "cuda/passes.cpp", "cuda/plan.cpp", "common/phases.cpp")
NAMESPACE = "segpose_simulated"
TORCH_TARGET_VERSION = "0x020d000000000000"  # as in setup.py


def _toolkit_include() -> Path:
    """Headers of the toolkit that nvcc belongs to."""
    nvcc = toolchain.nvcc_path()
    printed = subprocess.run(
        [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=True
    ).stderr
    top = next(line for line in printed.splitlines() if line.startswith("#$ TOP="))
    return Path(top.partition("=")[2]) / "include"


def _compile_host(source: Path, headers: list[str]) -> Path:
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DSEGPOSE_SIMULATED"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    flags += [f"-isystem{path}" for path in headers]

    def build(target: str) -> None:
        toolchain.run_tool(["g++", *flags, "-c", str(source), "-o", target])

    return toolchain.cached_build(source, ".o", build, flags, None, torch.__version__)


def have_nvcc() -> bool:
    try:
        toolchain.nvcc_path()
    except ptxsim.PtxSimError:
        return False
    return True


@cache
def library(kernels: tuple[Path, ...] = KERNELS, arch: str = "sm_80") -> cudart.HostLibrary:
    """The simulated library; compiled files are cached by content."""
    headers = [*cpp_extension.include_paths(), str(_toolkit_include())]
    objects = [_compile_host(ROOT / "csrc" / name, headers) for name in HOST]
    torch_lib = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return cudart.compile_library(kernels, arch, objects=objects, link_flags=link)


def _definitions() -> torch.library.Library:
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in backends.SCHEMAS.items():
        definitions.define(f"{name}{schema}")
    return definitions


@cache
def operators() -> dict[str, autograd.NativeOp]:
    """The simulated operators by label, registered once."""
    simulated = library()
    operators.definitions = _definitions()  # type: ignore[attr-defined]
    torch.ops.load_library(simulated.path)
    return {
        "conv2d": autograd.NativeOp("conv2d", transposed=False, namespace=NAMESPACE),
        "conv_transpose2d": autograd.NativeOp(
            "conv_transpose2d", transposed=True, namespace=NAMESPACE
        ),
    }


@contextlib.contextmanager
def simulated_cuda(
    multiprocessors: int = 4, capability: int = 80, **options: Any
) -> Iterator[ptxsim.Report]:
    """Inside, backend="cuda" takes CPU tensors and runs in the simulator; findings raise at the end.

    `multiprocessors` decides what the plans choose: few of them make large tiles pay even for small
    problems. Options are those of ptxsim.launch: counters, schedule, ...
    """
    ops = operators()
    simulated = library()
    simulated.set_device(capability // 10, capability % 10, multiprocessors)
    with pytest.MonkeyPatch.context() as patch:
        for operator in (functional._CONV2D, functional._CONV_TRANSPOSE2D):
            patch.setitem(operator.runners, "cuda", ops[operator.label])
        cuda = backends.Backend("cuda", frozenset({"cpu"}), backends.NATIVE_DTYPES, None)
        patch.setattr(backends, "_selected", {})
        patch.setitem(backends._BY_NAME, "cuda", cuda)
        with simulated.watch(**options) as report:
            yield report
    report.raise_if_any()
