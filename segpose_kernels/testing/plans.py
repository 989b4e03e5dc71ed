# SPDX-License-Identifier: BSD-3-Clause
"""From a named problem to the host-only view of the kernels."""

from __future__ import annotations

from .. import _plan
from .spec import ConvSpec

__all__ = ["problem_of"]


def problem_of(spec: ConvSpec) -> _plan.ConvProblem:
    """The convolution view of a named problem."""
    if spec.transposed:
        return _plan.ConvProblem.for_conv_transpose2d(
            spec.input_shape,
            spec.weight_shape,
            spec.stride,
            spec.padding,
            spec.output_padding,
            spec.groups,
            spec.dilation,
        )
    return _plan.ConvProblem.for_conv2d(
        spec.input_shape, spec.weight_shape, spec.stride, spec.padding, spec.dilation, spec.groups
    )
