# SPDX-License-Identifier: BSD-3-Clause
"""precision() and release_workspace()."""

import pytest
import torch
import torch.nn.functional as F

import segpose_kernels
from segpose_kernels import _plan
from segpose_kernels.backends import LIBRARY

needs_library = pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not loaded")


def winograd_case() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 64, 40, 41), torch.randn(64, 64, 3, 3) / 24


def error_against_float64(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> float:
    reference = F.conv2d(x.double(), w.double(), padding=1)
    return float((y.double() - reference).norm() / reference.norm())


@needs_library
def test_precision_leaves_out_winograd_and_comes_back() -> None:
    x, w = winograd_case()
    problem = _plan.ConvProblem.for_conv2d(x.shape, w.shape, padding=(1, 1))
    assert _plan.plan(problem).algorithm == "winograd"
    assert _plan.plan(problem, exact=True).algorithm == "igemm"

    def run() -> torch.Tensor:
        return segpose_kernels.conv2d_act(x, w, padding=1, activation="none", backend="cpu")

    default = run()
    with segpose_kernels.precision("exact"):
        exact = run()
    assert torch.equal(run(), default)
    torch_error = error_against_float64(x, w, F.conv2d(x, w, padding=1))
    assert error_against_float64(x, w, exact) <= 2 * torch_error
    assert error_against_float64(x, w, default) <= 1e-5
    assert not torch.equal(exact, default)


@needs_library
def test_exact_keeps_a_nan_to_its_own_outputs() -> None:
    x, w = winograd_case()
    x[0, 3, 20, 20] = float("nan")
    with segpose_kernels.precision("exact"):
        y = segpose_kernels.conv2d_act(x, w, padding=1, activation="none", backend="cpu")
    expected = torch.zeros(40, 41, dtype=torch.bool)
    expected[19:22, 19:22] = True
    assert torch.equal(y.isnan().all(1)[0], expected)
    assert torch.equal(y.isnan().any(1)[0], expected)


def test_precision_names_its_modes() -> None:
    with pytest.raises(ValueError, match="'default' or 'exact', got 'fast'"):
        segpose_kernels.precision("fast")  # type: ignore[arg-type]


@needs_library
def test_release_workspace_frees_what_a_call_kept() -> None:
    x, w = winograd_case()
    segpose_kernels.conv2d_act(x, w, padding=1, backend="cpu")
    assert segpose_kernels.release_workspace() > 0
    assert segpose_kernels.release_workspace() == 0
