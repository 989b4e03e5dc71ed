# SPDX-License-Identifier: BSD-3-Clause
"""Builds the kernels: `_C` (torch ops on the LibTorch stable ABI), `_C_cuda` (their CUDA kernels,
where nvcc and a CUDA build of torch are), `_plan` (host-only bindings), `_limits` (what the
machine computes at most), `_checks` (whether a model has changed) and `_calls` (sequences of
prepared steps on torch's tensors).

Environment:
    SEGPOSE_CUDA=0|1       without the CUDA kernels, or fail when they cannot be built; by default
                           they are left out with a reason that `segpose info` shows
    TORCH_CUDA_ARCH_LIST   as for torch, e.g. "8.0;8.6;8.9;9.0;10.0;12.0+PTX" for every GPU; by
                           default the visible GPUs, or "8.0;9.0+PTX" where there is none
    SEGPOSE_EXTENSIONS     names of those to build, with commas between them; by default all
    SEGPOSE_WERROR=1       warnings are errors (CI)
    SEGPOSE_SANITIZE=1     address and undefined-behaviour sanitizers (CI); run with their libraries
                           preloaded
    SEGPOSE_EMULATE=1      AVX-512 and AMX in software, for tests on a machine that has neither (CI)
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

SANITIZERS = ["-fsanitize=address,undefined"]


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "off", "false", "no")


def find_cuda_home() -> Path | None:
    """Root of a CUDA toolkit: CUDA_HOME, where nvcc on PATH really lies, or the pip packages."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc:
        # nvcc may be a script that calls another one; it tells its own place.
        tried = subprocess.run(
            [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
        )
        top = re.search(r"^#\$ TOP=(.*)$", tried.stderr, re.M)
        if top:
            return Path(top.group(1).strip()).resolve()
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or [] if wheels else []:
        for candidate in sorted(Path(folder).glob("cu*"), reverse=True):
            if (candidate / "bin" / "nvcc").exists():
                return candidate
    return None


# torch reads CUDA_HOME when cpp_extension is imported, and looks in fewer places.
CUDA_HOME = find_cuda_home()
if CUDA_HOME is not None:
    os.environ["CUDA_HOME"] = str(CUDA_HOME)

import torch  # noqa: E402
from pybind11 import get_include  # noqa: E402
from setuptools import Extension, setup  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths  # noqa: E402

# The lowest torch the library loads into: 2.13, as the stable ABI writes it.
TORCH_TARGET_VERSION = "0x020d000000000000"
# Ampere's binary serves 8.x, Hopper's 9.0, and newer GPUs compile Hopper's PTX when they first load
# it.
DEFAULT_ARCHS = "8.0;9.0+PTX"

PLAN_SOURCES = [
    "csrc/common/phases.cpp",
    "csrc/cpu/costs.cpp",
    "csrc/cpu/cpu_features.cpp",
    "csrc/cpu/panels.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/planar_plan.cpp",
    "csrc/cpu/planes.cpp",
    "csrc/cpu/rows_plan.cpp",
    "csrc/cpu/split_plan.cpp",
    "csrc/cpu/transform_plan.cpp",
    "csrc/cpu/transforms_amx.cpp",
    "csrc/cpu/transforms_avx2.cpp",
    "csrc/cpu/transforms_avx512.cpp",
    "csrc/cpu/transforms_generic.cpp",
    "csrc/cpu/ukernels_amx.cpp",
    "csrc/cpu/ukernels_generic.cpp",
    "csrc/cpu/ukernels_avx2.cpp",
    "csrc/cpu/ukernels_avx512.cpp",
]
KERNEL_SOURCES = [
    "csrc/registration.cpp",
    "csrc/cpu/backward_blocks.cpp",
    "csrc/cpu/chain.cpp",
    "csrc/cpu/conv.cpp",
    "csrc/cpu/depthwise.cpp",
    "csrc/cpu/depthwise_blocks.cpp",
    "csrc/cpu/depthwise_wgrad.cpp",
    "csrc/cpu/formats.cpp",
    "csrc/cpu/igemm.cpp",
    "csrc/cpu/layout.cpp",
    "csrc/cpu/packing.cpp",
    "csrc/cpu/passes.cpp",
    "csrc/cpu/planar.cpp",
    "csrc/cpu/planar_wgrad.cpp",
    "csrc/cpu/pool.cpp",
    "csrc/cpu/prepared.cpp",
    "csrc/cpu/results.cpp",
    "csrc/cpu/rows_conv.cpp",
    "csrc/cpu/sequence.cpp",
    "csrc/cpu/split_conv.cpp",
    "csrc/cpu/split_pack.cpp",
    "csrc/cpu/split_wgrad.cpp",
    "csrc/cpu/staging.cpp",
    "csrc/cpu/tile_reader.cpp",
    "csrc/cpu/transform_conv.cpp",
    "csrc/cpu/transform_filter.cpp",
    "csrc/cpu/transform_wgrad.cpp",
    "csrc/cpu/wgrad.cpp",
]
CUDA_PLAN_SOURCES = [
    "csrc/cuda/plan.cpp",
    "csrc/cuda/plan_gather.cpp",
    "csrc/cuda/plan_parts.cpp",
    "csrc/cuda/plan_text.cpp",
    "csrc/cuda/plan_wgrad.cpp",
]
BINDING_SOURCES = [
    *CUDA_PLAN_SOURCES,
    "csrc/plan_bindings.cpp",
    "csrc/cuda/plan_bindings.cpp",
]
CUDA_SOURCES = [
    *CUDA_PLAN_SOURCES,
    "csrc/common/phases.cpp",
    "csrc/cuda/conv.cpp",
    "csrc/cuda/passes.cpp",
    "csrc/cuda/kernels_f16.cu",
    "csrc/cuda/kernels_bf16.cu",
    "csrc/cuda/kernels_f32.cu",
    "csrc/cuda/kernels_f64.cu",
]


def compile_flags() -> list[str]:
    flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
    # Vectors are passed between inlined functions only, so their ABI does not matter.
    flags.append("-Wno-psabi")
    # GCC 12 warns of its own AVX-512 intrinsics, whose undefined operands are meant to be.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    if flag("SEGPOSE_WERROR"):
        # A directory that is also a system one loses its -I: torch's warnings are not ours.
        system = [*include_paths(), get_include()]
        flags += ["-Werror", *(f"-isystem{path}" for path in system)]
    if flag("SEGPOSE_EMULATE"):
        # -O1: vectors wider than the registers take minutes to optimise.
        flags += ["-DSEGPOSE_EMULATE", "-O1"]
    if flag("SEGPOSE_SANITIZE"):
        # -O1: with the checks in them, the unrolled microkernels take minutes to optimise.
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
        flags.append("-fno-sanitize-recover=undefined")
    return flags


def link_flags() -> list[str]:
    return SANITIZERS if flag("SEGPOSE_SANITIZE") else []


def no_cuda_reason() -> str | None:
    """Why the CUDA kernels are not built; None when they can be."""
    choice = os.environ.get("SEGPOSE_CUDA", "auto").lower()
    if choice in ("0", "off", "false", "no"):
        return f"SEGPOSE_CUDA={choice}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if CUDA_HOME is None:
        return "no nvcc: set CUDA_HOME, put it on PATH, or pip install 'cuda-toolkit[nvcc,cccl]'"
    version = nvcc_version(CUDA_HOME)
    if version is None:
        return f"{CUDA_HOME / 'bin' / 'nvcc'} does not run"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {version} does not fit torch's CUDA {torch.version.cuda}"
    return None


def nvcc_version(home: Path) -> str | None:
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return None
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", shown)
    return release.group(1) if release else None


NO_CUDA_REASON = no_cuda_reason()


def cuda_archs() -> str:
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHS
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "the visible GPUs")


def cuda_extension(home: Path) -> Extension:
    # The runtime is linked statically: another CUDA in the process is none of its business.
    library = next(home.glob("lib*/libcudart_static.a"), home / "lib64" / "libcudart_static.a")
    extension = CppExtension(
        "segpose_kernels._C_cuda",
        CUDA_SOURCES,
        py_limited_api=True,
        include_dirs=[str(home / "include")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": compile_flags(), "nvcc": ["-O3", "-std=c++17"]},
        extra_link_args=[*link_flags(), str(library), "-lrt", "-ldl", "-lpthread"],
    )
    extension.optional = not flag("SEGPOSE_CUDA")
    return extension


def plain_extension(
    name: str, sources: list[str], *, includes: list[str], py_limited_api: bool = False
) -> Extension:
    """An extension that links nothing of torch; `includes` are all that it sees."""
    extension = CppExtension(
        f"segpose_kernels.{name}",
        sources,
        py_limited_api=py_limited_api,
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=link_flags(),
    )
    extension.include_dirs, extension.libraries, extension.library_dirs = includes, [], []
    return extension


def extensions() -> list[Extension]:
    kernels = CppExtension(
        "segpose_kernels._C",
        PLAN_SOURCES + KERNEL_SOURCES,
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=link_flags(),
    )
    pybind = [get_include()]
    found = [
        kernels,
        plain_extension("_plan", [*PLAN_SOURCES, *BINDING_SOURCES], includes=pybind),
        plain_extension("_limits", ["csrc/bench/limits.cpp"], includes=pybind),
        plain_extension("_checks", ["csrc/checks.cpp"], includes=[], py_limited_api=True),
        # torch's include directories for one header of plain C.
        plain_extension(
            "_calls", ["csrc/calls.cpp"], includes=include_paths(), py_limited_api=True
        ),
    ]
    if CUDA_HOME is not None and NO_CUDA_REASON is None:
        found.append(cuda_extension(CUDA_HOME))
    names = os.environ.get("SEGPOSE_EXTENSIONS")
    if not names:
        return found
    wanted = {f"segpose_kernels.{name}" for name in names.split(",")}
    unknown = wanted - {extension.name for extension in found}
    if unknown:
        raise ValueError(f"SEGPOSE_EXTENSIONS={names}: no {', '.join(sorted(unknown))} here")
    return [extension for extension in found if extension.name in wanted]


class BuildKernels(BuildExtension):
    """Builds what can be built; a CUDA build that fails leaves its reason, not a failed install."""

    def run(self) -> None:
        self.reason = NO_CUDA_REASON
        if self.reason is not None and flag("SEGPOSE_CUDA"):
            raise RuntimeError(f"SEGPOSE_CUDA asks for the CUDA kernels: {self.reason}")
        archs = cuda_archs() if self.reason is None else None
        super().run()
        nvcc = nvcc_version(CUDA_HOME) if CUDA_HOME is not None else None
        record = {"reason": self.reason, "nvcc": nvcc, "archs": archs}
        folder = Path(self.get_ext_fullpath("segpose_kernels._C_cuda")).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_cuda_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def build_extension(self, extension: Extension) -> None:
        try:
            super().build_extension(extension)
        except Exception as error:
            if not extension.optional:
                raise
            self.reason = f"the build failed: {str(error).strip().splitlines()[-1]}"
            self.warn(f"{extension.name}: {self.reason}")


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
