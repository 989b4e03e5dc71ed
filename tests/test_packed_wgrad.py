# SPDX-License-Identifier: BSD-3-Clause
"""The weight gradient by igemm where tiles read copies of the pixels: ragged panels and filters,
several blocks of pixels, filters and panels, groups, strides, dilation, single pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from segpose_kernels import _plan, functional
from segpose_kernels.backends import LIBRARY
from segpose_kernels.testing.forced import forced
from segpose_kernels.testing.numerics import relative_l2
from segpose_kernels.testing.spec import ConvSpec

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
    pytest.mark.compact,
]

LAYERS = (
    ConvSpec("panels", "conv2d", 2, 131, 70, 7, 9, (3, 3), padding=(1, 1)),
    ConvSpec("blocks-of-filters", "conv2d", 1, 64, 299, 3, 5, (1, 1)),
    ConvSpec("blocks-of-pixels", "conv2d", 3, 128, 65, 17, 23, (1, 2), stride=(1, 2)),
    ConvSpec("groups", "conv2d", 2, 130, 134, 6, 5, (3, 1), dilation=(2, 1), groups=2),
    ConvSpec("up", "conv_transpose2d", 2, 72, 129, 5, 4, (2, 2), stride=(2, 2)),
    ConvSpec(
        "up-ragged", "conv_transpose2d", 1, 128, 67, 6, 5, (4, 3), (2, 3), (1, 0), (0, 1), (1, 2)
    ),
    ConvSpec("single-pixels", "conv_transpose2d", 5, 130, 66, 1, 1, (3, 3)),
)
# What sums of so many products may differ by, beside the rounding of the result.
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def igemm() -> Iterator[None]:
    with forced("igemm"):
        yield


def wgrad_plan(spec: ConvSpec, dtype: torch.dtype) -> str:
    geometry = (spec.stride, spec.padding)
    if spec.transposed:
        problem = _plan.ConvProblem.for_conv_transpose2d(
            spec.input_shape,
            spec.weight_shape,
            *geometry,
            spec.output_padding,
            spec.groups,
            spec.dilation,
        )
    else:
        problem = _plan.ConvProblem.for_conv2d(
            spec.input_shape, spec.weight_shape, *geometry, spec.dilation, spec.groups
        )
    name = str(dtype).removeprefix("torch.")
    return str(_plan.plan(problem, "wgrad", name, _plan.selected_isa(), algorithm="igemm"))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_gradients(spec: ConvSpec, dtype: torch.dtype) -> None:
    assert " packed" in wgrad_plan(spec, dtype)
    fused = functional.conv_transpose2d_act if spec.transposed else functional.conv2d_act
    plain = F.conv_transpose2d if spec.transposed else F.conv2d
    for layout in ("channels_last", "contiguous"):
        drawn = spec.make_tensors(dtype, input_layout=layout, grad_layout=layout)
        w = drawn.weight.requires_grad_()
        y = fused(drawn.input, w, drawn.bias, activation="none", **spec.attributes)
        (grad,) = torch.autograd.grad(y, w, drawn.grad_output)
        exact = drawn.weight.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(
            plain(drawn.input.double(), exact, None, **spec.attributes),
            exact,
            drawn.grad_output.double(),
        )
        assert relative_l2(grad, expected) < TOLERANCES[dtype], layout
