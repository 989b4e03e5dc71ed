# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of a few channels a group on the CPU kernels, which run in planes from and to both
memory formats or, depthwise, in blocks of channels: csrc/cpu/planar.h, depthwise_blocks.h.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segpose_kernels import functional
from segpose_kernels.backends import LIBRARY
from segpose_kernels.testing.forced import forced
from segpose_kernels.testing.numerics import relative_l2

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not LIBRARY.loaded, reason="the C++ library is not built"),
]

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}
FORMATS = (torch.channels_last, torch.contiguous_format)


def compare(
    channels: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    groups: int,
    kernel: tuple[int, int],
    images: int = 2,
    transposed: bool = False,
    **options: Any,
) -> None:
    """Output and every gradient against float64; input, weight and gradient in both formats.

    `channels` are those of a group.
    """
    inner, outer = channels
    sides = (groups * inner, outer) if transposed else (groups * outer, inner)
    operands = [
        torch.randn(images, groups * inner, *size).to(dtype),
        torch.randn(*sides, *kernel).to(dtype),
        torch.randn(groups * outer).to(dtype),
    ]
    exact = [t.double().clone().requires_grad_() for t in operands]
    plain = F.conv_transpose2d if transposed else F.conv2d
    fused = functional.conv_transpose2d_act if transposed else functional.conv2d_act
    expected = F.leaky_relu(plain(*exact, groups=groups, **options), 0.1)
    grad = torch.randn_like(expected).to(dtype)
    expected.backward(grad.double())
    for of_input in FORMATS:
        for of_weight in FORMATS:
            given: list[Tensor] = [t.clone() for t in operands]
            given[0] = given[0].contiguous(memory_format=of_input)
            given[1] = given[1].contiguous(memory_format=of_weight)
            for tensor in given:
                tensor.requires_grad_()
            y = fused(*given, groups=groups, activation="leaky_relu", negative_slope=0.1, **options)
            y.backward(grad.contiguous(memory_format=of_weight))
            for name, value, reference in zip(
                ("output", "input", "weight", "bias"),
                [y, *(t.grad for t in given)],
                [expected, *(t.grad for t in exact)],
                strict=True,
            ):
                assert value is not None
                assert relative_l2(value.detach(), reference.detach()) < TOLERANCES[dtype], name


@pytest.mark.parametrize("algorithm", ["igemm", "rows", "winograd"])
@pytest.mark.parametrize(
    "channels", [(1, 2), (2, 1), (3, 5), (4, 4), (5, 19), (8, 8), (9, 3)], ids=str
)
def test_channels_of_a_group(channels: tuple[int, int], algorithm: str) -> None:
    """Fewer than a tile, ragged tiles and panels, bundles of groups that fill no cache line, and
    more channels than planes are read of.
    """
    with forced(algorithm):
        for groups in (2, 3, 7):
            compare(channels, (11, 21), groups=groups, kernel=(3, 3), padding=1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels", [(1, 3), (4, 6), (8, 5)], ids=str)
def test_geometry(dtype: torch.dtype, channels: tuple[int, int]) -> None:
    """Residue classes of strides, some without a tap; images smaller than a vector, a tile or the
    filter; dilation; rows in several bands and columns in several blocks.
    """
    for size, options in (
        ((8, 8), {"kernel": (1, 1)}),
        ((9, 7), {"kernel": (3, 3), "padding": 1}),
        ((7, 30), {"kernel": (3, 3), "padding": 1}),
        ((23, 41), {"kernel": (3, 3), "padding": 1, "stride": 2}),
        ((40, 37), {"kernel": (2, 1), "stride": (3, 4)}),
        ((29, 70), {"kernel": (5, 3), "padding": (2, 4), "dilation": (1, 3)}),
        ((19, 45), {"kernel": (7, 7), "padding": 3, "stride": (1, 2)}),
        ((70, 20), {"kernel": (3, 5), "padding": (0, 2), "stride": (2, 1)}),
        ((10, 330), {"kernel": (3, 3), "padding": 1}),
        ((12, 12), {"kernel": (13, 13), "padding": 6}),
    ):
        compare(channels, size, dtype, groups=3, **options)


@pytest.mark.parametrize("groups", [16, 21, 40])
def test_depthwise_blocks(groups: int) -> None:
    """A cache line of channels at a time: rows in several bands, columns in several blocks of which
    the last begins early, tiles of every width, strides, and the phases of a transposed one.
    """
    for size, options in (
        ((6, 645), {"kernel": (3, 3), "padding": 1}),
        ((13, 519), {"kernel": (7, 7), "padding": 3}),
        ((60, 58), {"kernel": (5, 5), "padding": 2}),
        ((5, 4), {"kernel": (3, 3), "padding": 1}),
        ((9, 7), {"kernel": (2, 3), "padding": (0, 1)}),
        ((14, 14), {"kernel": (3, 3), "padding": 2, "dilation": 2}),
        ((29, 31), {"kernel": (5, 3), "padding": (2, 1), "stride": (2, 3)}),
        ((16, 15), {"kernel": (4, 4), "padding": 1, "stride": 2, "transposed": True}),
        ((10, 11), {"kernel": (3, 3), "padding": 1, "stride": 2, "transposed": True}),
    ):
        compare((1, 1), size, groups=groups, images=1, **options)


@pytest.mark.parametrize("channels", [(1, 1), (2, 3), (4, 4), (8, 2)], ids=str)
def test_transposed(channels: tuple[int, int]) -> None:
    """Phases that fill rows together: of a stride of two in pairs, of others one by one; of extents
    that are no multiple of the stride, and phases without a tap.
    """
    for size, options in (
        ((10, 18), {"kernel": (4, 4), "padding": 1, "stride": 2}),
        ((12, 17), {"kernel": (3, 3), "padding": 1, "stride": 2}),
        ((12, 17), {"kernel": (3, 3), "padding": 1, "stride": 2, "output_padding": 1}),
        ((9, 40), {"kernel": (2, 5), "stride": 3}),
        ((20, 16), {"kernel": (1, 1), "stride": (1, 2)}),
        ((11, 70), {"kernel": (3, 4), "padding": (0, 2), "stride": (2, 1)}),
    ):
        compare(channels, size, groups=5, transposed=True, **options)


@pytest.mark.parametrize("outer", [1, 3, 4, 10, 33])
def test_one_channel(outer: int) -> None:
    """The only channel of an image is a plane in both formats."""
    for size, options in (
        ((28, 28), {"kernel": (3, 3), "padding": 1, "stride": 2}),
        ((17, 130), {"kernel": (5, 5), "padding": 2}),
        ((64, 9), {"kernel": (3, 3)}),
    ):
        compare((1, outer), size, groups=1, images=3, **options)


@pytest.mark.parametrize("groups", [3, 8])
def test_slices(groups: int) -> None:
    """Channels of a larger tensor, every second row of one, NaN all around."""
    wide = torch.full((2, 6 * groups, 30, 50), float("nan"))
    inside = wide[:, 3 : 3 + 2 * groups, 2:29:2, 1:41]
    inside.copy_(torch.randn(inside.shape))
    weight, bias = torch.randn(5 * groups, 2, 3, 3), torch.randn(5 * groups)
    expected = F.relu(F.conv2d(inside.double(), weight.double(), bias.double(), groups=groups))
    for memory_format in FORMATS:
        x = wide.contiguous(memory_format=memory_format)[:, 3 : 3 + 2 * groups, 2:29:2, 1:41]
        y = functional.conv2d_act(x, weight, bias, groups=groups, activation="relu")
        assert relative_l2(y, expected) < 2e-6


@pytest.mark.parametrize("channels", [(1, 1), (2, 4)], ids=str)
def test_gradient_is_a_slice(channels: tuple[int, int]) -> None:
    """Gradient and input lie in larger tensors with NaN around them."""
    inner, outer = channels
    groups = 6
    weight = torch.randn(groups * outer, inner, 3, 3, requires_grad=True)
    bias = torch.randn(groups * outer, requires_grad=True)
    for memory_format in FORMATS:

        def sliced(channels: int, memory_format: torch.memory_format = memory_format) -> Tensor:
            wide = torch.full((2, channels + 5, 20, 60), float("nan"))
            wide[:, 2:-3, 3:17, 5:35] = torch.randn(2, channels, 14, 30)
            return wide.contiguous(memory_format=memory_format)[:, 2:-3, 3:17, 5:35]

        x, grad = sliced(groups * inner).requires_grad_(), sliced(groups * outer)
        y = functional.conv2d_act(x, weight, bias, padding=1, groups=groups, activation="relu")
        exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        expected = F.relu(F.conv2d(*exact, padding=1, groups=groups))
        for value, reference in zip(
            torch.autograd.grad(y, (x, weight, bias), grad),
            torch.autograd.grad(expected, exact, grad.double()),
            strict=True,
        ):
            assert relative_l2(value, reference) < 2e-6


@pytest.mark.parametrize("channels", [(1, 1), (1, 2), (4, 4), (3, 40), (9, 2)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_every_subset_of_gradients(
    channels: tuple[int, int], memory_format: torch.memory_format
) -> None:
    """Bitwise those of the full backward, whichever passes read planes."""
    inner, outer = channels
    operands = [
        torch.randn(2, 4 * inner, 13, 20).contiguous(memory_format=memory_format),
        torch.randn(4 * outer, inner, 3, 3),
        torch.randn(4 * outer),
    ]
    grad = torch.randn(2, 4 * outer, 13, 20).contiguous(memory_format=memory_format)

    def gradients(wanted: tuple[bool, bool, bool]) -> list[Tensor | None]:
        given = [t.clone().requires_grad_(want) for t, want in zip(operands, wanted, strict=True)]
        functional.conv2d_act(*given, padding=1, groups=4, activation="relu").backward(grad)
        return [t.grad for t in given]

    full = gradients((True, True, True))
    for wanted in itertools.product((False, True), repeat=3):
        if not any(wanted):
            continue
        for value, expected, want in zip(gradients(wanted), full, wanted, strict=True):
            assert (value is not None) == want
            if value is not None and expected is not None:
                assert torch.equal(value, expected)


def test_threads_do_not_change_results() -> None:
    for memory_format, (inner, outer) in itertools.product(FORMATS, ((4, 4), (1, 2), (1, 1))):
        x = torch.randn(1, 16 * inner, 61, 67).contiguous(memory_format=memory_format)
        weight, bias = torch.randn(16 * outer, inner, 3, 3), torch.randn(16 * outer)
        grad = torch.randn(1, 16 * outer, 61, 67).contiguous(memory_format=memory_format)
        given = [t.requires_grad_() for t in (x, weight, bias)]
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y = functional.conv2d_act(*given, padding=1, groups=16)
                results.append([y, *torch.autograd.grad(y, given, grad)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
