# SPDX-License-Identifier: BSD-3-Clause
"""precision() and release_workspace()."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

import segpose_kernels
from segpose_kernels import _plan, backends
from segpose_kernels.backends import LIBRARY

needs_library = pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not loaded")


# Relative L2 errors that the modes promise in float32.
LIMITS = {"highest": 1e-5, "high": 2e-4, "medium": 1e-2}


def tiled_case() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 64, 40, 41), torch.randn(64, 64, 3, 3) / 24


def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return segpose_kernels.conv2d_act(x, w, padding=1, activation="none", backend="cpu")


def error_against_float64(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> float:
    reference = F.conv2d(x.double(), w.double(), padding=1)
    return float((y.double() - reference).norm() / reference.norm())


@pytest.fixture
def torch_switches() -> Iterator[None]:
    """Puts torch's precision switches back."""
    yield
    torch.backends.mkldnn.conv.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")


@needs_library
def test_exact_sums_directly_and_comes_back() -> None:
    x, w = tiled_case()
    problem = _plan.ConvProblem.for_conv2d(x.shape, w.shape, padding=(1, 1))
    assert _plan.plan(problem).algorithm in ("winograd", "split")
    assert _plan.plan(problem, precision="exact").algorithm in ("igemm", "rows")
    default = run(x, w)
    with segpose_kernels.precision("exact"):
        exact = run(x, w)
    assert torch.equal(run(x, w), default)
    torch_error = error_against_float64(x, w, F.conv2d(x, w, padding=1))
    assert error_against_float64(x, w, exact) <= 2 * torch_error
    assert not torch.equal(exact, default)


@needs_library
@pytest.mark.parametrize("mode", LIMITS)
def test_errors_of_modes(mode: Literal["highest", "high", "medium"]) -> None:
    x, w = tiled_case()
    with segpose_kernels.precision(mode):
        assert error_against_float64(x, w, run(x, w)) <= LIMITS[mode]


@needs_library
@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize(
    ("switch", "matmul", "mode"),
    [
        ("none", "highest", "highest"),
        ("none", "high", "high"),
        ("none", "medium", "medium"),
        ("ieee", "medium", "highest"),
        ("tf32", "highest", "high"),
        ("bf16", "highest", "medium"),
    ],
)
def test_default_follows_torchs_switches(
    switch: str, matmul: str, mode: Literal["highest", "high", "medium"]
) -> None:
    """torch.backends.mkldnn.conv.fp32_precision, or else the precision of matrix products."""
    x, w = tiled_case()
    expected = {}
    for name in LIMITS:
        with segpose_kernels.precision(name):  # type: ignore[arg-type]
            expected[name] = run(x, w)
    torch.set_float32_matmul_precision(matmul)
    torch.backends.mkldnn.conv.fp32_precision = switch  # type: ignore[attr-defined]
    assert backends.cpu_float32_precision() == mode
    assert torch.equal(run(x, w), expected[mode])
    if _plan.selected_isa() == "amx":
        assert not torch.equal(expected["medium"], expected["highest"])


@needs_library
@pytest.mark.usefixtures("torch_switches")
def test_a_mode_wins_over_torchs_switches() -> None:
    x, w = tiled_case()
    expected = run(x, w)
    torch.set_float32_matmul_precision("medium")
    with segpose_kernels.precision("highest"):
        assert torch.equal(run(x, w), expected)


@needs_library
def test_exact_keeps_a_nan_to_its_own_outputs() -> None:
    x, w = tiled_case()
    x[0, 3, 20, 20] = float("nan")
    with segpose_kernels.precision("exact"):
        y = segpose_kernels.conv2d_act(x, w, padding=1, activation="none", backend="cpu")
    expected = torch.zeros(40, 41, dtype=torch.bool)
    expected[19:22, 19:22] = True
    assert torch.equal(y.isnan().all(1)[0], expected)
    assert torch.equal(y.isnan().any(1)[0], expected)


def test_precision_names_its_modes() -> None:
    with pytest.raises(ValueError, match=r"'default', 'exact', .*got 'fast'"):
        segpose_kernels.precision("fast")  # type: ignore[arg-type]


@needs_library
def test_release_workspace_frees_what_a_call_kept() -> None:
    x, w = tiled_case()
    segpose_kernels.conv2d_act(x, w, padding=1, backend="cpu")
    assert segpose_kernels.release_workspace() > 0
    assert segpose_kernels.release_workspace() == 0
