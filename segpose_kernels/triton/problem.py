# SPDX-License-Identifier: BSD-3-Clause
"""One convolution as the kernels see it, and the rewriting that makes it a simpler one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["ConvProblem", "Pair", "concrete"]

Pair = tuple[int, int]


def concrete(*sizes: int) -> bool:
    """Whether every size is a plain integer; while tracing some may be symbols."""
    return set(map(type, sizes)) <= {int}


@dataclass(frozen=True)
class ConvProblem:
    """The convolution view of both operators.

    x [N, H, W, C], w [K, R, S, C/groups], y [N, P, Q, K];
    y = fprop(x, w), dx = dgrad(dy, w), dw = wgrad(dy, x). A transposed convolution is the dgrad of
    this problem: its input is y-shaped, its output x-shaped.
    """

    n: int
    h: int
    w: int
    c: int
    p: int
    q: int
    k: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @staticmethod
    def of(
        x_shape: Sequence[int],  # [N, C, H, W]
        y_shape: Sequence[int],  # [N, K, P, Q]
        w_shape: Sequence[int],  # [K, C/groups, R, S]
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> ConvProblem:
        """The problem of tensors in torch's order of dimensions."""
        n, c, h, w = x_shape
        _, k, p, q = y_shape
        r, s = w_shape[2:]
        return ConvProblem(n, h, w, c, p, q, k, r, s, stride, padding, dilation, groups)

    @property
    def is_concrete(self) -> bool:
        """Whether no extent is a symbol."""
        return concrete(self.n, self.h, self.w, self.p, self.q)

    @property
    def c_per_group(self) -> int:
        return self.c // self.groups

    @property
    def k_per_group(self) -> int:
        return self.k // self.groups

    @property
    def x_size(self) -> int:
        return self.n * self.h * self.w * self.c

    @property
    def y_size(self) -> int:
        return self.n * self.p * self.q * self.k

    @property
    def w_size(self) -> int:
        return self.k * self.r * self.s * self.c_per_group

    @property
    def flops(self) -> int:
        """2 per multiply-add at every position of y; fprop, dgrad and wgrad share the figure."""
        return 2 * self.n * self.p * self.q * self.w_size

    def folded(self) -> ConvProblem:
        """The same problem with filter taps turned into channels where memory allows it.

        Where the filter's columns tile the rows of x without overlap, gap or padding, x [.., W, C]
        is read as [.., W/S, S*C] and w [.., S, C] as [.., 1, S*C]: the same bytes. Filter rows
        follow when the width is gone. A kernel equal to its stride thus loses a loop over taps
        (and, transposed, phases), and a filter as large as the image becomes a matrix product.
        """
        problem = self
        if self.groups != 1 or not concrete(self.h, self.w, self.p, self.q, self.r, self.s, self.c):
            return problem
        # A stride is never taken where there is one position.
        stride_w = self.s if self.q == 1 else self.stride[1]
        if (stride_w, self.padding[1], self.dilation[1], self.w) == (self.s, 0, 1, self.q * self.s):
            problem = replace(problem, w=self.q, s=1, c=self.s * self.c, stride=(self.stride[0], 1))
        if problem.w != 1 or problem.q != 1 or problem.s != 1:
            return problem
        stride_h = self.r if self.p == 1 else self.stride[0]
        if (stride_h, self.padding[0], self.dilation[0], self.h) == (self.r, 0, 1, self.p * self.r):
            problem = replace(problem, h=self.p, r=1, c=self.r * problem.c, stride=(1, 1))
        return problem

    def __str__(self) -> str:
        parts = [
            f"x {self.n}x{self.h}x{self.w}x{self.c}",
            f"w {self.k}x{self.r}x{self.s}x{self.c_per_group}",
            f"y {self.n}x{self.p}x{self.q}x{self.k}",
            f"stride {self.stride[0]}x{self.stride[1]}",
            f"padding {self.padding[0]}x{self.padding[1]}",
            f"dilation {self.dilation[0]}x{self.dilation[1]}",
            f"groups {self.groups}",
        ]
        return ", ".join(parts)
