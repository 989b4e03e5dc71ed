# SPDX-License-Identifier: BSD-3-Clause
"""Plans and phases, checked without running a kernel: every pixel once, every tap once."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest

from segpose_kernels import _plan
from segpose_kernels.testing.plans import problem_of
from segpose_kernels.testing.problems import (
    AUTOENCODER,
    CPM2DPOSE,
    KERNEL_PROBLEMS,
    SEGNET,
    TRANSPOSED,
    ConvSpec,
    by_name,
)
from segpose_kernels.testing.spec import Pair

ALL = tuple(dict.fromkeys((*KERNEL_PROBLEMS, *AUTOENCODER, *SEGNET, *CPM2DPOSE, *TRANSPOSED)))
OPS = ("fprop", "dgrad", "wgrad")
DTYPES = ("float32", "float64", "bfloat16", "float16")
ALGORITHMS = ("depthwise", "split", "winograd", "fourier", "rows", "gathered", "igemm")


def assert_phases_partition_dgrad(
    problem: Any, stride: Pair, padding: Pair, dilation: Pair
) -> list[Any]:
    """Brute force over destination pixels and taps; returns the phases.

    Destination row h is reached by tap r exactly when h + pad - r * dilation is a multiple of the
    stride, and then reads source row (h + pad - r * dilation) / stride. The same for columns.
    """
    phases = _plan.phases(problem)
    pixels: Counter[Pair] = Counter()
    products: Counter[tuple[int, int, int, int]] = Counter()
    for phase in phases:
        assert len({(r, s) for r, s, _, _ in phase.taps}) == len(phase.taps), "a tap twice"
        for row, col in itertools.product(range(phase.rows), range(phase.cols)):
            h = phase.oh + row * stride[0]
            w = phase.ow + col * stride[1]
            pixels[h, w] += 1
            for r, s, off_h, off_w in phase.taps:
                assert (row + off_h) * stride[0] == h + padding[0] - r * dilation[0]
                assert (col + off_w) * stride[1] == w + padding[1] - s * dilation[1]
                products[h, w, r, s] += 1
    every_pixel = set(itertools.product(range(problem.h), range(problem.w)))
    assert pixels == dict.fromkeys(every_pixel, 1), "each pixel belongs to one phase"
    for h, w in every_pixel:
        for r, s in itertools.product(range(problem.r), range(problem.s)):
            lands = (h + padding[0] - r * dilation[0]) % stride[0] == 0
            lands = lands and (w + padding[1] - s * dilation[1]) % stride[1] == 0
            # A tap whose source lies outside for the whole phase may be left out.
            if lands and products[h, w, r, s] == 0:
                p = (h + padding[0] - r * dilation[0]) // stride[0]
                q = (w + padding[1] - s * dilation[1]) // stride[1]
                assert not (0 <= p < problem.p and 0 <= q < problem.q), (h, w, r, s)
            else:
                assert products[h, w, r, s] == int(lands), (h, w, r, s)
    return list(phases)


@pytest.mark.parametrize("spec", [s for s in KERNEL_PROBLEMS if s.n], ids=str)
def test_phases_of_named_problems(spec: ConvSpec) -> None:
    assert_phases_partition_dgrad(problem_of(spec), spec.stride, spec.padding, spec.dilation)


def test_phases_of_random_problems() -> None:
    """Strides and dilations with and without a common divisor, in both views."""
    random.seed(7)
    empty = common = 0
    for _ in range(400):
        kernel, stride, dilation = (
            (random.randint(1, top), random.randint(1, top)) for top in (5, 5, 6)
        )
        padding = (random.randint(0, 6), random.randint(0, 6))
        p, q = random.randint(1, 5), random.randint(1, 5)
        output_padding = tuple(
            random.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)
        )
        spans = [
            (e - 1) * s - 2 * pad + d * (k - 1) + op + 1
            for e, s, pad, d, k, op in zip(
                (p, q), stride, padding, dilation, kernel, output_padding, strict=True
            )
        ]
        if min(spans) < 1:
            continue
        problem = _plan.ConvProblem.for_conv_transpose2d(
            (1, 2, p, q), (2, 3, *kernel), stride, padding, output_padding, 1, dilation
        )
        assert (problem.h, problem.w) == tuple(spans)
        assert (problem.p, problem.q, problem.k, problem.c) == (p, q, 2, 3)
        phases = assert_phases_partition_dgrad(problem, stride, padding, dilation)
        empty += any(not phase.taps and phase.rows * phase.cols for phase in phases)
        common += any(math.gcd(s, d) > 1 for s, d in zip(stride, dilation, strict=True))
    assert min(empty, common) > 50, "the draw must contain empty phases and common divisors"


def test_stride_over_kernel_leaves_phases_without_taps() -> None:
    """Kernel 2, stride 3: of nine phases four have a tap; the rest still own their pixels."""
    spec = by_name("transposed-k2s3")
    phases = _plan.phases(problem_of(spec))
    taps = sorted(len(phase.taps) for phase in phases)
    assert taps == [0] * 5 + [1] * 4
    assert sum(phase.rows * phase.cols for phase in phases) == math.prod(spec.output_shape[2:])


def test_equal_kernel_and_stride_is_one_tap_a_phase() -> None:
    phases = _plan.phases(problem_of(by_name("transposed-unet-up")))
    assert [len(phase.taps) for phase in phases] == [1, 1, 1, 1]


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_flops_follow_the_formula(spec: ConvSpec) -> None:
    """Counted over input positions for a transposed convolution, output positions otherwise."""
    problem = problem_of(spec)
    assert problem.flops == spec.flops
    for op in OPS:
        assert _plan.plan(problem, op).flops == spec.flops


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_problem_has_the_extents_of_the_call(spec: ConvSpec) -> None:
    problem = problem_of(spec)
    activation, output = spec.input_shape, spec.output_shape
    if spec.transposed:
        activation, output = output, activation
    assert (problem.n, problem.c, problem.h, problem.w) == activation
    assert (problem.n, problem.k, problem.p, problem.q) == output
    assert (problem.r, problem.s, problem.groups) == (*spec.kernel, spec.groups)


@pytest.mark.parametrize("isa", _plan.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_problem_has_a_plan(op: str, dtype: str, isa: str) -> None:
    """Each says in one line what runs: the pass, the algorithm, the dtype and the ISA."""
    for spec in ALL:
        plan = _plan.plan(problem_of(spec), op, dtype, isa)
        line = str(plan)
        assert "\n" not in line
        for word in (op, plan.algorithm, dtype, isa):
            assert word in line
        assert (plan.isa, plan.dtype, plan.op) == (isa, dtype, op)
        assert plan.algorithm
        assert plan.bytes >= 0
        if spec.n:
            assert plan.block_m > 0
            assert plan.k_chunk > 0
            assert len(plan.tile) == 2
            assert plan.bytes > 0


@pytest.mark.parametrize("isa", _plan.isas())
@pytest.mark.parametrize("op", OPS)
def test_forced_algorithms_reach_the_small_problems(op: str, isa: str) -> None:
    """What the models at full size run, a test can ask for where a problem is small."""
    names = {_plan.plan(problem_of(spec), op, isa=isa).algorithm for spec in ALL}
    small = {
        _plan.plan(problem_of(spec), op, isa=isa, algorithm=name).algorithm
        for spec in KERNEL_PROBLEMS
        for name in ALGORITHMS
    }
    assert names <= small
    assert {"depthwise", "winograd", "fourier", "gathered", "igemm", "rows"} <= small
    assert ("split" in small) == (isa == "amx")


def test_choice_does_not_depend_on_threads() -> None:
    """Results are the same for any number: only how the work is cut may differ."""
    for spec in ALL:
        for op in OPS:
            plans = [_plan.plan(problem_of(spec), op, threads=threads) for threads in (1, 2, 7)]
            assert len({plan.algorithm for plan in plans}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_exact_sums_directly(op: str, dtype: str) -> None:
    direct = {"depthwise", "gathered", "igemm", "rows"} | (
        {"split"} if dtype == "bfloat16" else set()
    )
    for spec in ALL:
        assert _plan.plan(problem_of(spec), op, dtype, precision="exact").algorithm in direct


def test_plan_is_a_pure_function() -> None:
    problem = problem_of(by_name("cpm-conv6_1"))
    assert len({str(_plan.plan(problem, "fprop")) for _ in range(5)}) == 1


def test_depthwise_is_not_a_gemm() -> None:
    """One channel on both sides of each group has nothing to multiply as a matrix."""
    dense = _plan.plan(problem_of(by_name("cpm-conv4_1")))
    for name in ("conv-depthwise", "transposed-depthwise"):
        assert _plan.plan(problem_of(by_name(name))).algorithm != dense.algorithm


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("backward", "float32"), "fprop, dgrad or wgrad"),
        (("fprop", "int8"), "float32, float64, bfloat16 or float16"),
        (("fprop", "float32", None, "low"), "exact, highest, high or medium, got 'low'"),
        (("fprop", "float32", None, "high", "karatsuba"), "split, winograd.*got 'karatsuba'"),
    ],
)
def test_bad_names_raise(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _plan.plan(problem_of(by_name("conv-k3s1")), *arguments)


def test_bad_isa_raises() -> None:
    with pytest.raises((ValueError, RuntimeError), match="sparc9"):
        _plan.plan(problem_of(by_name("conv-k3s1")), isa="sparc9")


@pytest.mark.parametrize(
    "attributes", [{"stride": (0, 1)}, {"dilation": (1, 0)}, {"groups": 0}, {"groups": 3}], ids=str
)
def test_bad_problems_raise(attributes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive"):
        _plan.ConvProblem(n=1, h=5, w=5, c=4, k=4, r=3, s=3, **attributes)


def test_features_agree_with_the_instruction_sets() -> None:
    features, isas = _plan.cpu_features(), _plan.isas()
    assert isas[0] == "generic"
    assert _plan.selected_isa() in isas
    assert all(isinstance(present, bool) for present in features.values())
    assert ("avx2" in isas) <= (features.get("avx2", False) and features.get("fma", False))
    assert ("avx512" in isas) <= features.get("avx512f", False)


def test_planes_are_planned_where_groups_are_small() -> None:
    """They show in the plan, and are expected to take less than the direct pass they replace."""
    small = {"n": 2, "h": 56, "w": 56, "c": 128, "k": 128, "r": 3, "s": 3, "padding": (1, 1)}
    for groups, planned in ((128, True), (32, True), (16, True), (8, False), (1, False)):
        for op in OPS:
            plan = _plan.plan(_plan.ConvProblem(**small, groups=groups), op, isa="generic")
            assert ("planes" in str(plan)) == planned, (groups, op)
    pairs = _plan.ConvProblem(**small, groups=64)
    halves = _plan.plan(pairs, "fprop", "bfloat16", isa="generic")
    floats = _plan.plan(pairs, "fprop", "float32", isa="generic")
    assert "planes" not in str(halves)
    assert floats.cycles < halves.cycles


@pytest.mark.parametrize("size", [3, 6])
def test_no_planes_of_few_pixels(size: int) -> None:
    """Vectors along the rows would be empty for the most part."""
    problem = _plan.ConvProblem(n=2, h=size, w=size, c=8, k=8, r=3, s=3, padding=(1, 1), groups=4)
    for isa in _plan.isas():
        for op in ("fprop", "dgrad"):
            assert "planes" not in str(_plan.plan(problem, op, isa=isa))
