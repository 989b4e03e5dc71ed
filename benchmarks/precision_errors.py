# SPDX-License-Identifier: BSD-3-Clause
"""Relative L2 error of every CPU algorithm and precision mode, as a Markdown table.

    python benchmarks/precision_errors.py > docs/precision.md

The reference is torch in float64. Inputs are standard normal, weights normal with the variance of
torch's own initialisation; the figure is ||y - reference|| / ||reference|| over output, input
gradient and weight gradient, the largest of the three.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import segpose_kernels
from segpose_kernels import _plan
from segpose_kernels.testing.forced import forced

LAYERS = (
    ("3x3, 64 to 64, 64x64", (1, 64, 64, 64), (64, 64, 3, 3)),
    ("3x3, 256 to 256, 32x32", (1, 256, 32, 32), (256, 256, 3, 3)),
    ("7x7, 128 to 128, 32x32", (1, 128, 32, 32), (128, 128, 7, 7)),
    ("1x1, 128 to 512, 32x32", (1, 128, 32, 32), (512, 128, 1, 1)),
)
ALGORITHMS = ("rows", "igemm", "split", "winograd", "fourier")
MODES = ("exact", "highest", "high", "medium")

HEAD = """# Precision of the CPU kernels

Relative L2 error against float64, the largest of output, input gradient and weight gradient, on
standard normal inputs; instruction set: {isa}. `segpose_kernels.precision(mode)` or torch's own
switches choose the mode. A dash: the algorithm does not run there. Made by
`python benchmarks/precision_errors.py`.
"""


def passes(function: object, x: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
    assert callable(function)
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    return [y.detach(), *torch.autograd.grad(y, (x, w), grad)]


def largest_error(actual: list[Tensor], reference: list[Tensor]) -> float:
    return max(
        float((a.double() - r).norm() / r.norm()) for a, r in zip(actual, reference, strict=True)
    )


def rows_of(dtype: torch.dtype) -> Iterator[str]:
    name = str(dtype).removeprefix("torch.")
    for label, input_shape, weight_shape in LAYERS:
        pad = weight_shape[2] // 2
        x = torch.randn(input_shape).to(dtype)
        w = (torch.randn(weight_shape) / (weight_shape[1] * weight_shape[2] ** 2) ** 0.5).to(dtype)
        grad = torch.randn(input_shape[0], weight_shape[0], *input_shape[2:]).to(dtype)
        reference = passes(
            lambda a, b, pad=pad: F.conv2d(a, b, padding=pad), x.double(), w.double(), grad.double()
        )
        eager = passes(lambda a, b, pad=pad: F.conv2d(a, b, padding=pad), x, w, grad)
        yield (
            f"| {label} | torch | "
            + " | ".join([f"{largest_error(eager, reference):.1e}"] * 4)
            + " |"
        )
        problem = _plan.ConvProblem.for_conv2d(input_shape, weight_shape, padding=(pad, pad))
        for algorithm in ALGORITHMS:
            cells = []
            for mode in MODES:
                plan = _plan.plan(problem, "fprop", name, None, mode, algorithm)
                if plan.algorithm != algorithm:
                    cells.append("-")
                    continue
                with forced(algorithm), segpose_kernels.precision(mode):  # type: ignore[arg-type]
                    ours = passes(
                        lambda a, b, pad=pad: segpose_kernels.conv2d_act(
                            a, b, padding=pad, activation="none", backend="cpu"
                        ),
                        x,
                        w,
                        grad,
                    )
                cells.append(f"{largest_error(ours, reference):.1e}")
            if set(cells) != {"-"}:
                yield f"| {label} | {algorithm} | " + " | ".join(cells) + " |"


def main() -> None:
    torch.manual_seed(0)
    print(HEAD.format(isa=_plan.selected_isa()))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(f"## {str(dtype).removeprefix('torch.')}\n")
        print("| layer | algorithm | " + " | ".join(MODES) + " |\n|---|---|" + "---|" * len(MODES))
        for row in rows_of(dtype):
            print(row)
        print()


if __name__ == "__main__":
    main()
