# SPDX-License-Identifier: BSD-3-Clause
"""Faults planted in the Triton kernels, one at a time: the checks must find each of them.

`pytest -m mutation` runs them. A mutant is a copy of the kernels' sources with one text replaced;
its launches run in the simulator like those of the kernels themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import tritonsim
from ptxsim.report import PtxSimError

from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.gpu_problems import GPU_PROBLEMS
from segpose_kernels.testing.numerics import assert_results_match
from segpose_kernels.testing.spec import ConvSpec
from segpose_kernels.triton import launch

pytestmark = pytest.mark.usefixtures("poison")

SOURCES = Path(launch.__file__).parent
MODULES = ("geometry", "kernels", "direct", "pointwise")
KERNELS = {
    "kernels": ("igemm_kernel", "wgrad_kernel"),
    "direct": ("direct_kernel", "direct_wgrad_kernel"),
    "pointwise": (
        "mask_kernel",
        "reduce_kernel",
        "bias_activation_kernel",
        "reduced_last_kernel",
    ),
}

OWN = (
    ConvSpec("splits", "conv2d", 1, 16, 24, 40, 32, (3, 3), padding=(1, 1)),
    ConvSpec("1x1", "conv2d", 2, 24, 40, 5, 7, (1, 1), activation="relu"),
    ConvSpec("1x1-leaky", "conv2d", 2, 24, 40, 5, 7, (1, 1), slope=0.3),
    ConvSpec("1x1-wide", "conv2d", 1, 72, 40, 5, 7, (1, 1)),
    ConvSpec("3x2", "conv2d", 1, 16, 24, 7, 9, (3, 2), dilation=(1, 2)),
    ConvSpec("3x2-depthwise", "conv2d", 1, 24, 24, 8, 7, (3, 2), groups=24),
)
PROBLEMS = {spec.name: spec for spec in (*GPU_PROBLEMS, *OWN)}


@dataclass(frozen=True)
class Fault:
    """`old` in a module becomes `new`; running `problem` must then fail."""

    name: str
    module: str
    old: str
    new: str
    problem: str

    def __str__(self) -> str:
        return self.name


FAULTS = (
    # Index arithmetic.
    Fault(
        "division-without-correction",
        "geometry",
        "quotient = tl.where(short, quotient + 1, quotient)",
        "quotient = tl.where(short, quotient, quotient)",
        "conv-k3s1",
    ),
    Fault(
        "phase-loses-its-last-row",
        "geometry",
        "count = tl.maximum(extent - start + stride - 1, 0) // stride",
        "count = tl.maximum(extent - start, 0) // stride",
        "transposed-k3s2",
    ),
    Fault(
        "phase-walks-taps-backwards",
        "geometry",
        "tap_offset = -(dilation // stride_dilation_gcd)",
        "tap_offset = dilation // stride_dilation_gcd",
        "transposed-k4s2",
    ),
    Fault(
        "empty-phase-has-taps",
        "geometry",
        "reached = (empty_class == 0) & (tap_start < kernel)",
        "reached = tap_start < kernel",
        "transposed-d2s2",
    ),
    Fault(
        "padding-with-the-wrong-sign",
        "geometry",
        "source_start = -pad",
        "source_start = pad",
        "conv-k3s1",
    ),
    Fault(
        "no-test-against-zero",
        "geometry",
        "return tl.cast(position, tl.uint32) < tl.cast(extent, tl.uint32)",
        "return position < extent",
        "conv-k3s1",
    ),
    Fault(
        "filter-position-by-rows",
        "kernels",
        "position = (tap_h + t_h * tap_step_h) * kernel_w + tap_w + t_w * tap_step_w\n"
        "            if W_REDUCED_LAST:\n                b_offset = (w_base",
        "position = (tap_h + t_h * tap_step_h) * kernel_h + tap_w + t_w * tap_step_w\n"
        "            if W_REDUCED_LAST:\n                b_offset = (w_base",
        "3x2",
    ),
    Fault(
        "output-column-without-its-step",
        "kernels",
        "* dst_w + start_w + column * step_w",
        "* dst_w + start_w + column",
        "transposed-k3s2",
    ),
    Fault(
        "dilation-of-the-other-axis",
        "kernels",
        "dw = (tap % kernel_w) * dilation_w - pad_w",
        "dw = (tap % kernel_w) * dilation_h - pad_w",
        "3x2",
    ),
    Fault(
        "direct-taps-transposed",
        "direct",
        "t_h = tap // taps_w\n        t_w = tap % taps_w",
        "t_h = tap % taps_w\n        t_w = tap // taps_w",
        "3x2-depthwise",
    ),
    # The K loop.
    Fault(
        "channels-never-start-over",
        "kernels",
        "c = tl.where(last, 0, c)",
        "c = tl.where(last, c, c)",
        "conv-k3s1",
    ),
    Fault(
        "row-of-taps-never-ends",
        "kernels",
        "t_h = tl.where(last, t_h + 1, t_h)",
        "t_h = tl.where(last, t_h, t_h)",
        "conv-k3s1",
    ),
    Fault(
        "one-iteration-too-few",
        "kernels",
        "taps_h * taps_w * tl.cdiv(red, BLOCK_K)",
        "taps_h * taps_w * (red // BLOCK_K)",
        "1x1-wide",
    ),
    Fault(
        "splits-overlap",
        "kernels",
        "end = tl.minimum(begin + chunk, pixels)",
        "end = pixels",
        "splits",
    ),
    Fault(
        "pixels-stay-on-their-line",
        "kernels",
        "p = tl.where(carry, p + 1, p) + step_p",
        "p = p + step_p",
        "conv-k1s1",
    ),
    Fault(
        "lines-stay-in-their-image",
        "kernels",
        "image = tl.where(carry, image + 1, image) + step_image",
        "image = image + step_image",
        "conv-k1s1",
    ),
    Fault(
        "last-part-not-summed",
        "pointwise",
        "for split in range(splits):",
        "for split in range(splits - 1):",
        "splits",
    ),
    # Predicates.
    Fault(
        "rows-behind-the-tile-are-read",
        "kernels",
        "h = tl.where(in_m, h, -(1 << 30)).to(tl.int32)",
        "h = h.to(tl.int32)",
        "conv-k3s2",
    ),
    Fault(
        "channels-behind-the-last-are-read",
        "kernels",
        "a_mask &= (c + k < red)[None, :]",
        "a_mask &= (c + k < red + 8)[None, :]",
        "1x1-wide",
    ),
    Fault(
        "columns-behind-the-last-are-written",
        "kernels",
        "mask=in_m[:, None] & in_n[None, :])\n\n\n_WGRAD",
        "mask=in_m[:, None])\n\n\n_WGRAD",
        "1x1",
    ),
    Fault(
        "pixels-behind-the-chunk-are-read",
        "kernels",
        "h = tl.where(in_pixels, h, -(1 << 30))",
        "h = h",
        "conv-k3s1",
    ),
    # Epilogue, mask and bias.
    Fault(
        "bias-of-the-first-group",
        "kernels",
        "bias_ptr + (group * cols + n) % bias_period",
        "bias_ptr + n % bias_period",
        "conv-groups2",
    ),
    Fault(
        "folded-bias-does-not-repeat",
        "kernels",
        "bias_ptr + (group * cols + n) % bias_period",
        "bias_ptr + tl.minimum(group * cols + n, bias_period - 1)",
        "transposed-k2s2",
    ),
    Fault(
        "activation-upside-down",
        "geometry",
        "x = tl.where(x > 0, x, x * SLOPE)",
        "x = tl.where(x > 0, x * SLOPE, x)",
        "1x1-leaky",
    ),
    Fault(
        "relu-mask-passes-zero",
        "geometry",
        "grad = tl.where(output <= 0, tl.zeros_like(grad), grad)",
        "grad = tl.where(output < 0, tl.zeros_like(grad), grad)",
        "1x1",
    ),
    Fault(
        "bias-gradient-without-mask",
        "kernels",
        "if MASK_SLOPE != 1 and not MASK_X:",
        "if MASK_SLOPE != MASK_SLOPE:",
        "1x1",
    ),
    Fault(
        "mask-by-the-gradient-itself",
        "pointwise",
        "grad = mask_gradient(grad, saved, MASK_SLOPE)",
        "grad = mask_gradient(grad, grad, MASK_SLOPE)",
        "transposed-k3s2",
    ),
)


@contextlib.contextmanager
def planted(folder: Path, fault: Fault | None) -> Iterator[None]:
    """The launches start kernels from a copy of the sources, with a fault or without."""
    package = f"mutant_{folder.name}".replace("-", "_")
    copy = folder / package
    copy.mkdir()
    (copy / "__init__.py").touch()
    for name in MODULES:
        text = (SOURCES / f"{name}.py").read_text(encoding="utf-8")
        if fault is not None and fault.module == name:
            text = text.replace(fault.old, fault.new)
        (copy / f"{name}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        modules: dict[str, ModuleType] = {
            name: importlib.import_module(f"{package}.{name}") for name in KERNELS
        }
        with contextlib.ExitStack() as stack:
            for name, kernels in KERNELS.items():
                for kernel in kernels:
                    mutant = getattr(modules[name], kernel)
                    stack.enter_context(mock.patch.object(launch, kernel, mutant))
            yield
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            del sys.modules[name]


def run(problem: str, cc: int) -> None:
    spec = PROBLEMS[problem]
    tensors = spec.make_tensors(torch.float16, input_layout="channels_last")
    with tritonsim.simulated(cc):
        assert_results_match(spec, tensors, run_fused(spec, tensors, backend="triton"))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_can_be_planted(fault: Fault) -> None:
    """The code that a fault changes is still there, once."""
    text = (SOURCES / f"{fault.module}.py").read_text(encoding="utf-8")
    assert text.count(fault.old) == 1


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 10
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.mutation
@pytest.mark.parametrize("problem", sorted({fault.problem for fault in FAULTS}))
def test_copies_without_a_fault_pass(problem: str, tmp_path: Path) -> None:
    """What fails below fails because of the fault."""
    with planted(tmp_path, None):
        run(problem, 90)


@pytest.mark.mutation
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(fault: Fault, tmp_path: Path) -> None:
    with planted(tmp_path, fault), pytest.raises((AssertionError, PtxSimError)):
        run(fault.problem, 90 if len(fault.name) % 2 else 80)
