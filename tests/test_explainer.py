# SPDX-License-Identifier: BSD-3-Clause
"""The matrix C of a convolution, and what makes the transposed convolution transposed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from segpose_kernels import conv2d_act, conv_transpose2d_act
from segpose_kernels.explainer import LECTURE_SETTINGS, convolution_matrix, draw_matrices

SETTINGS = [
    *LECTURE_SETTINGS,
    {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)},
    {"stride": 3, "padding": 2, "groups": 2},
]


@pytest.fixture(params=SETTINGS, ids=str)
def case(request: pytest.FixtureRequest) -> dict[str, object]:
    """Keyword arguments of a convolution, a weight [K, C/groups, R, S] and an input of it."""
    setting = dict(request.param)
    groups = setting.get("groups", 1)
    weight = torch.randn(6, 4 // groups, 2, 3, dtype=torch.float64)
    activation = torch.randn(4, 7, 9, dtype=torch.float64)
    return {"setting": setting, "weight": weight, "activation": activation}


def test_convolution_is_multiplication_by_c(case: dict[str, object]) -> None:
    setting, weight, activation = case["setting"], case["weight"], case["activation"]
    matrix = convolution_matrix(weight, (7, 9), **setting)
    output = F.conv2d(activation[None], weight, **setting)[0]
    torch.testing.assert_close((matrix @ activation.flatten()).view_as(output), output)
    ours = conv2d_act(activation[None], weight, **setting, activation="none")[0]
    torch.testing.assert_close((matrix @ activation.flatten()).view_as(ours), ours)


def test_transposed_convolution_is_multiplication_by_c_transposed(case: dict[str, object]) -> None:
    setting, weight, activation = case["setting"], case["weight"], case["activation"]
    matrix = convolution_matrix(weight, (7, 9), **setting)
    small = torch.randn_like(F.conv2d(activation[None], weight, **setting))
    plain = F.conv_transpose2d(small, weight, **setting).shape[2:]
    # Where the stride does not divide, several sizes shrink to one: output_padding says which.
    output_padding = (7 - plain[0], 9 - plain[1])
    for function, extra in (
        (F.conv_transpose2d, {}),
        (conv_transpose2d_act, {"activation": "none"}),
    ):
        output = function(small, weight, output_padding=output_padding, **setting, **extra)[0]
        product = matrix.t() @ small.flatten()
        torch.testing.assert_close(product.view_as(output), output)


def test_inner_products_agree(case: dict[str, object]) -> None:
    setting, weight, a = case["setting"], case["weight"], case["activation"]
    convolved = conv2d_act(a[None], weight, **setting, activation="none")
    b = torch.randn_like(convolved)
    plain = F.conv_transpose2d(b, weight, **setting).shape[2:]
    transposed = conv_transpose2d_act(
        b, weight, output_padding=(7 - plain[0], 9 - plain[1]), **setting, activation="none"
    )
    torch.testing.assert_close((convolved * b).sum(), (a[None] * transposed).sum())


def test_a_matrix_written_out() -> None:
    weight = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    matrix = convolution_matrix(weight, (2, 3))
    assert matrix.is_sparse
    assert matrix.to_dense().tolist() == [[1, 2, 0, 3, 4, 0], [0, 1, 2, 0, 3, 4]]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"weight must be 4-D .* got \[3, 3\]"):
        convolution_matrix(torch.zeros(3, 3), (4, 4))
    with pytest.raises(ValueError, match="groups must divide the filter count 3, got groups=2"):
        convolution_matrix(torch.zeros(3, 1, 2, 2), (4, 4), groups=2)
    with pytest.raises(ValueError, match="an input of 2x2 gives an empty output"):
        convolution_matrix(torch.zeros(1, 1, 3, 3), (2, 2))


def test_drawing() -> None:
    pytest.importorskip("matplotlib")
    figure = draw_matrices()
    # C and C^T for three settings, and the filter.
    assert len(figure.axes) == 7
    assert [axis.images[0].get_array().shape for axis in figure.axes[:2]] == [(9, 16), (16, 9)]
    assert len(draw_matrices([{"stride": 2}], kernel_size=3, small_size=(2, 2)).axes) == 3
    with pytest.raises(ValueError, match="256 rows and columns at most, got 1024"):
        draw_matrices([{"stride": 2}], small_size=(16, 16))
