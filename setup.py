# SPDX-License-Identifier: BSD-3-Clause
"""Builds the kernels: `_C` (torch ops on the LibTorch stable ABI), `_plan` (host-only bindings) and
`_limits` (what the machine computes at most).

Environment:
    SEGPOSE_WERROR=1     warnings are errors (CI)
    SEGPOSE_SANITIZE=1   address and undefined-behaviour sanitizers (CI); run with their libraries
                         preloaded
"""

import os

from pybind11 import get_include
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

# The lowest torch the library loads into: 2.13, as the stable ABI writes it.
TORCH_TARGET_VERSION = "0x020d000000000000"

SANITIZERS = ["-fsanitize=address,undefined"]

PLAN_SOURCES = [
    "csrc/common/phases.cpp",
    "csrc/cpu/cpu_features.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/ukernels_generic.cpp",
    "csrc/cpu/ukernels_avx2.cpp",
    "csrc/cpu/ukernels_avx512.cpp",
]
KERNEL_SOURCES = [
    "csrc/registration.cpp",
    "csrc/cpu/conv.cpp",
    "csrc/cpu/igemm.cpp",
    "csrc/cpu/packing.cpp",
    "csrc/cpu/passes.cpp",
    "csrc/cpu/staging.cpp",
    "csrc/cpu/wgrad.cpp",
    "csrc/cpu/winograd.cpp",
]


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "off", "false", "no")


def compile_flags() -> list[str]:
    flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
    # Vectors are passed between inlined functions only, so their ABI does not matter.
    flags.append("-Wno-psabi")
    if flag("SEGPOSE_WERROR"):
        # A directory that is also a system one loses its -I: torch's warnings are not ours.
        system = [*include_paths(), get_include()]
        flags += ["-Werror", *(f"-isystem{path}" for path in system)]
    if flag("SEGPOSE_SANITIZE"):
        # -O1: with the checks in them, the unrolled microkernels take minutes to optimise.
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
        flags.append("-fno-sanitize-recover=undefined")
    return flags


def link_flags() -> list[str]:
    return SANITIZERS if flag("SEGPOSE_SANITIZE") else []


def extensions() -> list[Extension]:
    kernels = CppExtension(
        "segpose_kernels._C",
        PLAN_SOURCES + KERNEL_SOURCES,
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=link_flags(),
    )
    plan = CppExtension(
        "segpose_kernels._plan",
        [*PLAN_SOURCES, "csrc/plan_bindings.cpp"],
        include_dirs=[get_include()],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=link_flags(),
    )
    limits = CppExtension(
        "segpose_kernels._limits",
        ["csrc/bench/limits.cpp"],
        include_dirs=[get_include()],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=link_flags(),
    )
    for module in (plan, limits):
        # Nothing of torch is used here: plain includes and libraries keep it so.
        module.include_dirs, module.libraries, module.library_dirs = [get_include()], [], []
    return [kernels, plan, limits]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
