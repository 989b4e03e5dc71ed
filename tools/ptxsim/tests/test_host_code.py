# SPDX-License-Identifier: BSD-3-Clause
"""Host code that allocates by itself and notes its memory; several objects in one library."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from conftest import KERNELS, have_nvcc

import ptxsim
from ptxsim import Out, toolchain
from ptxsim import report as R

pytestmark = pytest.mark.skipif(not have_nvcc(), reason="nvcc not available")

NONE, UNKNOWN_INPUT, SHORT_OUTPUT, UNWRITTEN_SCRATCH, FILLED_TAIL = range(5)


@pytest.fixture(scope="module")
def library():
    from ptxsim import cudart

    def build(target):
        toolchain.run_tool(["gcc", "-O1", "-fPIC", "-c", str(KERNELS / "host.c"), "-o", target])

    host = toolchain.cached_build(KERNELS / "host.c", ".o", build, [], None)
    return cudart.compile_library([KERNELS / "scale.cu", KERNELS / "gemm.cu"], objects=[host])


def call(library, fault, n=100, **options):
    x, y = np.arange(n, dtype=np.float32), np.full(n, np.nan, np.float32)
    with library.watch(**options) as report:
        address = (ctypes.c_void_p(array.ctypes.data) for array in (x, y))
        library.library.six_times(*address, n, fault, None)
    return x, y, report


def test_values_and_launches(library):
    x, y, report = call(library, NONE)
    report.raise_if_any()
    np.testing.assert_array_equal(y, 6 * x)
    assert [name for name in library.launched if "scale" in name] == library.launched
    assert len(library.launched) == 2
    assert "gemm" in library.kernel("gemm").name  # of the second source


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(UNKNOWN_INPUT, R.OUT_OF_BOUNDS), (SHORT_OUTPUT, R.UNWRITTEN), (UNWRITTEN_SCRATCH, R.UNINITIALISED)],
)
def test_faults_are_found(library, fault, kind):
    _, _, report = call(library, fault)
    assert report.kinds() == {kind}


def test_memory_filled_by_other_means_is_written(library):
    x, y, report = call(library, FILLED_TAIL)
    report.raise_if_any()
    assert y[-1] == 6


def test_counters_of_each_kernel(library):
    counters = {}
    call(library, NONE, counters=counters)
    (only,) = counters.values()
    assert only.launched_warps == 2 * 2 * 2  # two launches of two blocks of two warps


def test_launches_outside_are_refused(library):
    x = np.zeros(64, np.float32)
    library.library.launch_scale(ctypes.c_void_p(x.ctypes.data), None, 64, ctypes.c_float(1), None)
    with pytest.raises(ptxsim.PtxSimError, match="outside"):
        raise library._error


def test_exceptions_of_host_code_name_the_finding(library):
    with pytest.raises(ptxsim.KernelFault, match="out of bounds"):
        with library.watch():
            x = np.zeros(64, np.float32)
            status = library.library.launch_scale(
                ctypes.c_void_p(x.ctypes.data), None, 64, ctypes.c_float(1), None
            )
            raise RuntimeError(f"status {status}")


def test_shared_addresses_wrap_around(library):
    """The compiler takes n - 1 - i apart: part of it is negative in the register."""
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    library.call("launch_reversed", x, Out(y), 64).raise_if_any()
    np.testing.assert_array_equal(y, x[::-1])


def test_negative_register_and_positive_offset():
    """[register + offset] with a 32-bit register is computed modulo 2^32."""
    kernel = ptxsim.Module(
        """.version 8.0
        .target sm_80
        .address_size 64
        .visible .entry wrap(.param .u64 out) {
          .reg .b32 %r<3>; .reg .b64 %rd<2>;
          .shared .align 4 .b8 buffer[64];
          ld.param.u64 %rd1, [out];
          mov.u32 %r1, -16;
          mov.u32 %r2, 7;
          st.shared.u32 [%r1+16], %r2;
          ld.shared.u32 %r2, [buffer];
          st.global.u32 [%rd1], %r2;
          ret;
        }"""
    )["wrap"]
    out = np.zeros(1, np.uint32)
    ptxsim.launch(kernel, 1, 1, [Out(out)]).raise_if_any()
    assert out[0] == 7
