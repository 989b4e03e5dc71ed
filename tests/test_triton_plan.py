# SPDX-License-Identifier: BSD-3-Clause
"""Plans of the Triton kernels, without running any: phases, folding, padding, tiles, grids."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import tritonsim

from segpose_kernels import _plan
from segpose_kernels.testing.plans import problem_of
from segpose_kernels.testing.problems import GEOMETRIES
from segpose_kernels.testing.spec import ConvSpec
from segpose_kernels.triton.device import Device, device_of, float32_precision
from segpose_kernels.triton.plan import Choice, Epilogue, Operands, padded_channels
from segpose_kernels.triton.plan_gather import plan_gather
from segpose_kernels.triton.plan_pointwise import mask_first, plan_mask
from segpose_kernels.triton.plan_wgrad import plan_wgrad
from segpose_kernels.triton.problem import ConvProblem
from segpose_kernels.triton.tiles import Demands, Tile, gather_candidates, wgrad_candidates

A100, H100 = tritonsim.device(80), replace(tritonsim.device(90), multiprocessors=132)
HALF = Operands(torch.float16, "tf32", A100)
PLAIN = Epilogue()


def problem(spec: ConvSpec) -> ConvProblem:
    x, y = spec.input_shape, spec.output_shape
    if spec.transposed:
        x, y = y, x
    return ConvProblem.of(
        x, y, spec.weight_shape, spec.stride, spec.padding, spec.dilation, spec.groups
    )


# Phases --------------------------------------------------------------------------------------


def phase_of_axis(
    index: int, extent: int, kernel: int, stride: int, pad: int, dilation: int
) -> tuple[int, int, set[tuple[int, int]]]:
    """What geometry.phase_of_axis computes on the device for a transposed axis, in Python."""
    gcd = math.gcd(stride, dilation)
    tap_step = stride // gcd
    empty_class, tap_start = divmod(index, tap_step)
    start = (tap_start * dilation + empty_class - pad) % stride
    count = max(extent - start + stride - 1, 0) // stride
    reached = empty_class == 0 and tap_start < kernel
    taps = (kernel - tap_start + tap_step - 1) // tap_step if reached else 0
    source = (start + pad - tap_start * dilation) // stride
    return (
        start,
        count,
        {(tap_start + t * tap_step, source - t * (dilation // gcd)) for t in range(taps)},
    )


@pytest.mark.parametrize("spec", [s for s in GEOMETRIES if s.n], ids=str)
def test_phases_are_those_of_the_other_backends(spec: ConvSpec) -> None:
    """The closed form on the device and the tables of the C++ plans name the same taps."""
    p = problem(spec)
    expected = {
        (phase.oh, phase.ow): (phase.rows, phase.cols, {tuple(tap) for tap in phase.taps})
        for phase in _plan.phases(problem_of(spec))
    }
    found = {}
    weights = []
    for i, j in itertools.product(range(p.stride[0]), range(p.stride[1])):
        oh, rows, taps_h = phase_of_axis(i, p.h, p.r, p.stride[0], p.padding[0], p.dilation[0])
        ow, columns, taps_w = phase_of_axis(j, p.w, p.s, p.stride[1], p.padding[1], p.dilation[1])
        weights.append(len(taps_h) * len(taps_w))
        if rows and columns:
            taps = {(r, s, dh, dw) for (r, dh), (s, dw) in itertools.product(taps_h, taps_w)}
            found[oh, ow] = rows, columns, taps
    assert found == expected
    assert weights[0] == max(weights), "the heaviest phase must start first"


# Folding and padding -------------------------------------------------------------------------


def test_kernel_equal_to_stride_loses_its_columns() -> None:
    p = ConvProblem(2, 8, 6, 16, 4, 3, 24, 2, 2, (2, 2))
    folded = p.folded()
    assert (folded.h, folded.w, folded.c) == (8, 3, 32)
    assert (folded.r, folded.s, folded.stride) == (2, 1, (2, 1))
    assert (folded.x_size, folded.y_size, folded.w_size) == (p.x_size, p.y_size, p.w_size)
    assert folded.flops == p.flops


def test_filter_as_large_as_the_image_is_a_matrix_product() -> None:
    p = ConvProblem(5, 7, 7, 32, 1, 1, 64, 7, 7)
    folded = p.folded()
    assert (folded.h, folded.w, folded.c, folded.r, folded.s) == (1, 1, 7 * 7 * 32, 1, 1)
    assert folded.flops == p.flops


@pytest.mark.parametrize(
    "change",
    [
        {"padding": (0, 1)},
        {"dilation": (1, 2)},
        {"w": 7},
        {"stride": (2, 3)},
        {"groups": 2},
    ],
    ids=str,
)
def test_what_does_not_tile_the_image_is_not_folded(change: dict[str, object]) -> None:
    p = replace(ConvProblem(2, 8, 6, 16, 4, 3, 24, 2, 2, (2, 2)), **change)  # type: ignore[arg-type]
    assert p.folded() == p


@pytest.mark.parametrize(
    ("channels", "itemsize", "expected"),
    [(1, 2, 1), (2, 2, 2), (3, 2, 4), (3, 4, 4), (5, 2, 8), (5, 4, 8), (8, 2, 8), (149, 2, 152)],
)
def test_channels_are_brought_to_whole_vectors(channels: int, itemsize: int, expected: int) -> None:
    assert padded_channels(channels, itemsize) == expected


def test_padding_changes_the_source_only() -> None:
    p = ConvProblem(1, 9, 9, 149, 9, 9, 21, 3, 3, padding=(1, 1))
    fprop = plan_gather(p, "fprop", HALF, PLAIN)
    assert (fprop.channels, fprop.problem.c, fprop.problem.k) == (152, 152, 21)
    assert (fprop.constants["RED_ALIGN"], fprop.constants["COLS_ALIGN"]) == (8, 1)
    dgrad = plan_gather(p, "dgrad", HALF, PLAIN)
    assert (dgrad.channels, dgrad.problem.c, dgrad.problem.k) == (24, 149, 24)
    assert dgrad.reduced_last, "odd rows of columns have no vectors"
    wgrad = plan_wgrad(p, HALF)
    assert (wgrad.y_channels, wgrad.x_channels) == (24, 152)


# Tiles ---------------------------------------------------------------------------------------


def conv(c: int, k: int, extent: int, n: int = 1, r: int = 3) -> ConvProblem:
    return ConvProblem(n, extent, extent, c, extent, extent, k, r, r, padding=(r // 2, r // 2))


def test_large_problems_get_large_tiles_and_small_ones_fill_the_device() -> None:
    large = plan_gather(conv(256, 256, 64, 16), "fprop", HALF, PLAIN)
    small = plan_gather(conv(256, 256, 14), "fprop", HALF, PLAIN)
    assert large.tile is not None
    assert small.tile is not None
    assert large.tile.m * large.tile.n >= 128 * 64
    assert small.tile.m * small.tile.n < 128 * 64
    assert small.grid > large.tile.m // 8
    hopper = plan_gather(conv(256, 256, 64, 16), "fprop", HALF._replace(device=H100), PLAIN)
    assert hopper.tile is not None
    assert hopper.tile.m * hopper.tile.n >= 128 * 256


def test_narrow_outputs_get_narrow_tiles() -> None:
    plan = plan_gather(conv(128, 21, 32), "fprop", HALF, PLAIN)
    assert plan.tile is not None
    assert plan.tile.n == 32
    assert plan.tile.accumulators <= 32


def test_wgrad_splits_pixels_until_the_device_is_busy() -> None:
    few = plan_wgrad(conv(64, 64, 64, 8), HALF)
    assert few.splits > 4
    assert few.grid >= 0.9 * A100.multiprocessors
    chunk = few.integers["chunk"]
    assert chunk % few.tile.k == 0  # type: ignore[union-attr]
    assert few.splits * chunk >= few.integers["pixels"]
    many = plan_wgrad(conv(512, 512, 16), HALF)
    assert many.splits == 1


@pytest.mark.parametrize("shared_kib", [48, 99, 163, 227])
def test_candidates_fit_into_shared_memory(shared_kib: int) -> None:
    for cc, itemsize, masked in itertools.product((80, 90, 120), (2, 4), (False, True)):
        device = replace(tritonsim.device(cc), shared_bytes=shared_kib << 10)
        demands = Demands(itemsize, "tf32", device, masked=masked, accumulators=64)
        candidates = [
            *gather_candidates(256, 256, demands),
            *wgrad_candidates(256, 2304, demands),
        ]
        assert candidates
        for tile in candidates:
            assert tile.shared_bytes(itemsize, masked) <= shared_kib << 10
            assert tile.accumulators <= demands.accumulators


def test_twelve_uses_the_tiles_of_eight() -> None:
    """12.0 has mma.sync and 99 KiB of shared memory, not wgmma."""
    tiles = {
        cc: set(gather_candidates(256, 256, Demands(2, "tf32", tritonsim.device(cc))))
        for cc in (80, 90, 100, 120)
    }
    assert tiles[120] == tiles[80]
    assert tiles[100] == tiles[90]
    assert tiles[90] != tiles[80]


def test_a_choice_overrules_the_cost_model() -> None:
    tile = Tile(64, 16, 32, 4, 2)
    gather = plan_gather(conv(64, 64, 32), "dgrad", HALF, PLAIN, Choice("igemm", tile))
    assert gather.tile == tile
    assert gather.grid == math.ceil(32 * 32 / 64) * 4
    wgrad = plan_wgrad(conv(64, 64, 32), HALF, choice=Choice("igemm", tile, 3))
    assert (wgrad.tile, wgrad.splits) == (tile, 3)
    assert plan_wgrad(conv(64, 64, 32), HALF, choice=Choice("library")).kernel == "library"


def test_offsets_are_64_bits_only_where_needed() -> None:
    for n, wide in ((1, False), (2**11, False), (2**12, True)):
        plan = plan_gather(conv(64, 64, 96, n), "fprop", HALF, PLAIN)
        assert plan.constants["WIDE"] is wide, n
        assert plan_wgrad(conv(64, 64, 96, n), HALF).constants["WIDE"] is wide
        mask = plan_mask(n * 96 * 96, 64, HALF, 0.0, store=True, sums=True)
        assert mask.constants["WIDE"] is wide


def test_groups_too_narrow_for_tiles_and_float64_run_directly() -> None:
    grouped = replace(conv(64, 64, 16), groups=8)
    assert plan_gather(grouped, "fprop", HALF, PLAIN).kernel == "direct"
    assert plan_wgrad(grouped, HALF).kernel == "direct"
    wide = replace(conv(64, 64, 16), groups=2)
    assert plan_gather(wide, "fprop", HALF, PLAIN).kernel == "igemm"
    double = HALF._replace(dtype=torch.float64)
    assert plan_gather(conv(64, 64, 16), "dgrad", double, PLAIN).kernel == "direct"
    assert plan_wgrad(conv(64, 64, 16), double).kernel == "direct"


def test_phases_of_equal_weight_are_neighbours() -> None:
    """So that programs which read the same source pixels run together; else heavy phases first."""
    for kernel, inside in ((4, 1), (3, 0)):
        p = ConvProblem(1, 16, 16, 32, 8, 8, 32, kernel, kernel, (2, 2), (1, 1))
        plan = plan_gather(p, "dgrad", HALF, PLAIN)
        assert plan.integers["phases"] == 4
        assert plan.integers["phases_inside"] == inside


def test_gradients_read_often_are_masked_first() -> None:
    needs = {"need_input": True, "need_weight": True, "need_bias": True}
    assert mask_first(conv(64, 64, 32), transposed=False, **needs)
    assert not mask_first(conv(64, 64, 32, r=1), transposed=False, **needs)
    nothing_twice = needs | {"need_weight": False, "need_bias": False}
    assert not mask_first(conv(64, 64, 32, r=1), transposed=True, **nothing_twice)


def test_plans_print_themselves() -> None:
    text = str(plan_gather(conv(64, 64, 32), "fprop", HALF, PLAIN))
    assert "fprop igemm" in text
    assert "x 1x32x32x64" in text
    assert "splits" in str(plan_wgrad(conv(64, 64, 32), HALF))


def test_float32_follows_torchs_switch() -> None:
    settings = torch.backends.cudnn
    before = settings.allow_tf32
    try:
        settings.allow_tf32 = True
        assert float32_precision() == "tf32"
        settings.allow_tf32 = False
        assert float32_precision() == "ieee"
    finally:
        settings.allow_tf32 = before


def test_generic_devices() -> None:
    assert Device.generic((8, 0)).shared_bytes == 163 << 10
    assert Device.generic((8, 6)).shared_bytes == 99 << 10
    assert Device.generic((9, 0)).shared_bytes == 227 << 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_device_that_is_not_there_is_the_oldest_supported_one(name: str) -> None:
    """Fake tensors may lie on it, with an index or without."""
    assert device_of(torch.device(name)).capability == (8, 0)
