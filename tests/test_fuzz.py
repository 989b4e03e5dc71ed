# SPDX-License-Identifier: BSD-3-Clause
"""Random geometry, dtype and memory layout against torch in float64; and proof that aten runs none.

SEGPOSE_FUZZ_CASES sets the number of cases (1,000 by default, the same ones each time; any other
number draws new ones, and a failure prints how to repeat it).
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from segpose_kernels import _plan
from segpose_kernels.settings import release_workspace
from segpose_kernels.testing.counters import OperatorCounter
from segpose_kernels.testing.forced import forced
from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.numerics import TOLERANCES, assert_results_match
from segpose_kernels.testing.plans import problem_of
from segpose_kernels.testing.problems import LAYOUTS, ConvSpec
from segpose_kernels.testing.spec import Op, Pair

pytestmark = pytest.mark.usefixtures("poison")

DEFAULT_CASES = 1000
CASES = int(os.environ.get("SEGPOSE_FUZZ_CASES", DEFAULT_CASES))
TILED_CASES = CASES // 20
FORCED_CASES = CASES // 5


@dataclass(frozen=True)
class Case:
    """A problem, how its operands lie in memory, and the seed of their values."""

    spec: ConvSpec
    dtype: torch.dtype
    layouts: tuple[str, str, str]  # input, weight, incoming gradient
    seed: int


CHANNELS = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 10, 16, 17, 21, 33, 65))


@st.composite
def channels(draw: st.DrawFn) -> tuple[int, int, int]:
    """C_in, C_out, groups: dense, grouped or depthwise with a multiplier."""
    kind = draw(st.sampled_from(("dense", "dense", "grouped", "depthwise")))
    if kind == "dense":
        return draw(CHANNELS), draw(CHANNELS), 1
    groups = draw(st.integers(2, 5 if kind == "grouped" else 20))
    per_group = st.integers(1, 7) if kind == "grouped" else st.just(1)
    multiplier = per_group if kind == "grouped" else st.integers(1, 3)
    return groups * draw(per_group), groups * draw(multiplier), groups


@st.composite
def axis(draw: st.DrawFn, op: Op) -> tuple[int, int, int, int, int, int]:
    """Extent, kernel, stride, padding, output_padding, dilation that torch accepts together."""
    kernel = draw(st.integers(1, 7))
    stride = draw(st.integers(1, 5))
    dilation = draw(st.integers(1, 4))
    padding = draw(st.integers(0, 7))
    output_padding = 0
    effective = dilation * (kernel - 1) + 1
    if op == "conv2d":
        smallest = max(1, effective - 2 * padding)
    else:
        # torch's rule for each axis: less than stride or less than dilation.
        output_padding = draw(st.integers(0, max(stride, dilation) - 1))
        # Smallest extent with (extent - 1) * stride - 2 * padding + effective + op >= 1.
        missing = max(0, 1 + 2 * padding - effective - output_padding)
        smallest = 1 + -(-missing // stride)
    extent = smallest + draw(st.integers(0, 10))
    return extent, kernel, stride, padding, output_padding, dilation


@st.composite
def cases(draw: st.DrawFn, op: Op) -> Case:
    c_in, c_out, groups = draw(channels())
    rows, cols = draw(axis(op)), draw(axis(op))
    h_w, kernel, stride, padding, output_padding, dilation = zip(rows, cols, strict=True)
    spec = ConvSpec(
        name="fuzz",
        op=op,
        n=draw(st.sampled_from((1, 2, 3, 0, 5, 4, 8))),
        c_in=c_in,
        c_out=c_out,
        h=h_w[0],
        w=h_w[1],
        kernel=kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        activation=draw(st.sampled_from(("none", "relu", "leaky_relu"))),
        slope=draw(st.sampled_from((0.01, 0.3, 1.25))),
        bias=draw(st.booleans()),
    )
    layout = st.sampled_from(LAYOUTS)
    return Case(
        spec=spec,
        dtype=draw(st.sampled_from(tuple(TOLERANCES))),
        layouts=(draw(layout), draw(layout), draw(layout)),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def tiled_cases(draw: st.DrawFn) -> Case:
    """Maps and channels large enough that the plan may choose Winograd, tiles ragged or not."""
    op: Op = draw(st.sampled_from(("conv2d", "conv_transpose2d")))
    groups = draw(st.sampled_from((1, 1, 2)))
    kernel = draw(st.sampled_from((3, 3, 2)))
    per_group = st.integers(16, 40) if kernel == 3 else st.integers(40, 70)
    extent = st.integers(18, 30)
    padding = st.integers(0, 4)
    spec = ConvSpec(
        name="fuzz",
        op=op,
        n=draw(st.integers(1, 3)),
        c_in=groups * draw(per_group),
        c_out=groups * draw(per_group),
        h=draw(extent),
        w=draw(extent),
        kernel=(kernel, kernel),
        padding=(draw(padding), draw(padding)),
        groups=groups,
        activation=draw(st.sampled_from(("none", "relu", "leaky_relu"))),
        slope=draw(st.sampled_from((0.01, 0.3))),
        bias=draw(st.booleans()),
    )
    layout = st.sampled_from(LAYOUTS)
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    layouts = (draw(layout), draw(layout), draw(layout))
    return Case(spec, dtype, layouts, seed=draw(st.integers(0, 2**31)))


@st.composite
def square_cases(draw: st.DrawFn) -> Case:
    """Any kernel up to 9x9 at strides 1 and 2, on maps of any size: what the transforms cover."""
    op: Op = draw(st.sampled_from(("conv2d", "conv_transpose2d")))
    kernel, stride = draw(st.integers(1, 9)), draw(st.sampled_from((1, 1, 2)))
    extent = st.integers(kernel, kernel + 17)
    spec = ConvSpec(
        name="fuzz",
        op=op,
        n=draw(st.integers(1, 3)),
        c_in=draw(CHANNELS),
        c_out=draw(CHANNELS),
        h=draw(extent),
        w=draw(extent),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(draw(st.integers(0, kernel // 2)), draw(st.integers(0, kernel // 2))),
        activation=draw(st.sampled_from(("none", "relu", "leaky_relu"))),
        slope=draw(st.sampled_from((0.01, 0.3))),
        bias=draw(st.booleans()),
    )
    layout = st.sampled_from(LAYOUTS)
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    layouts = (draw(layout), draw(layout), draw(layout))
    return Case(spec, dtype, layouts, seed=draw(st.integers(0, 2**31)))


def fuzz_settings(cases: int) -> settings:
    return settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=CASES == DEFAULT_CASES,
        print_blob=True,
        # A failing case is shrunk, but not explained: explaining repeats it hundreds of times.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )


def check(case: Case) -> None:
    if case.seed % 2:
        release_workspace()  # half of the cases start on poisoned scratch memory, half on stale
    tensors = case.spec.make_tensors(
        case.dtype,
        generator=torch.Generator().manual_seed(case.seed),
        input_layout=case.layouts[0],
        weight_layout=case.layouts[1],
        grad_layout=case.layouts[2],
    )
    with OperatorCounter() as counter:
        results = run_fused(case.spec, tensors)
    assert counter.aten_compute == {}
    assert counter.of("segpose::conv") == {
        f"segpose::{case.spec.op}_act": 1,
        f"segpose::{case.spec.op}_act_backward": 1,
    }
    assert tuple(results["output"].shape) == case.spec.output_shape
    assert results["grad_input"].shape == tensors.input.shape
    assert results["grad_weight"].shape == tensors.weight.shape
    assert_results_match(case.spec, tensors, results)


@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_random_problems_agree_with_float64(op: Op) -> None:
    """Output and the three gradients, by the rule of each dtype, and not one call of aten's."""
    wanted = -(-CASES // 2)
    seen = 0

    @fuzz_settings(wanted)
    @given(cases(op))
    def run(case: Case) -> None:
        nonlocal seen
        seen += 1
        check(case)

    run()
    assert seen >= wanted


def test_random_tiled_problems_agree_with_float64() -> None:
    """The same for problems of the size at which sums are not the fastest."""
    algorithms: Counter[str] = Counter()

    @fuzz_settings(max(TILED_CASES, 1))
    @given(tiled_cases())
    def run(case: Case) -> None:
        for name in ("fprop", "dgrad"):
            algorithms[_plan.plan(problem_of(case.spec), name).algorithm] += 1
        check(case)

    run()
    if TILED_CASES > 20:
        fast = algorithms["winograd"] + algorithms["split"]
        assert fast > TILED_CASES // 2, dict(algorithms)


@pytest.mark.parametrize("algorithm", ["split", "winograd", "fourier", "rows", "igemm", "gathered"])
def test_every_algorithm_agrees_with_float64(algorithm: str) -> None:
    """Each runs wherever it can, whatever the plan would have chosen."""
    runs = 0

    @fuzz_settings(max(FORCED_CASES, 1))
    @given(st.one_of(square_cases(), tiled_cases()))
    def run(case: Case) -> None:
        nonlocal runs
        for name in ("fprop", "dgrad", "wgrad"):
            plan = _plan.plan(problem_of(case.spec), name, algorithm=algorithm)
            runs += plan.algorithm == algorithm
        with forced(algorithm):
            check(case)

    run()
    if FORCED_CASES > 100 and (algorithm != "split" or _plan.selected_isa() == "amx"):
        assert runs > FORCED_CASES // 16


@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_wide_filters_run_in_parts(op: Op, input_layout: str) -> None:
    """512 x 512 channels transformed are more than a pass keeps at once; their last part is ragged.

    Both passes that read the filter, bias and activation of every part included.
    """
    spec = ConvSpec(
        name="wide",
        op=op,
        n=1,
        c_in=500,
        c_out=500,
        h=9,
        w=10,
        kernel=(3, 3),
        padding=(1, 1),
        activation="leaky_relu",
        slope=0.1,
    )
    problem = problem_of(spec)
    assert _plan.plan(problem, "fprop", algorithm="winograd").algorithm == "winograd"
    tensors = spec.make_tensors(
        torch.float32,
        generator=torch.Generator().manual_seed(3),
        input_layout=input_layout,
        weight_layout=input_layout,
        grad_layout=input_layout,
    )
    with forced("winograd"):
        assert_results_match(spec, tensors, run_fused(spec, tensors))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(case=st.one_of(cases("conv2d"), cases("conv_transpose2d")))
def test_torch_accepts_what_the_fuzz_draws(case: Case) -> None:
    """The strategy stays inside torch's rules, and the shape formula of ConvSpec is torch's."""
    spec = case.spec
    function = F.conv_transpose2d if spec.transposed else F.conv2d
    attributes = dict(spec.attributes)
    y = function(torch.zeros(spec.input_shape), torch.zeros(spec.weight_shape), **attributes)
    assert tuple(y.shape) == spec.output_shape


def test_counter_sees_nested_aten() -> None:
    """Positive control: an operator that hands its work to aten inside its kernel is caught."""
    library = torch.library.Library("segpose_testing", "FRAGMENT")
    library.define("borrowed(Tensor x, Tensor w) -> Tensor")
    library.impl("borrowed", lambda x, w: F.relu(F.conv2d(x, w)), "CPU")
    library.define("borrowed_gemm(Tensor x, Tensor w) -> Tensor")
    library.impl("borrowed_gemm", lambda x, w: w.flatten(1) @ F.unfold(x, 3)[0], "CPU")
    x, w = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
    with OperatorCounter() as counter:
        torch.ops.segpose_testing.borrowed(x, w)
    assert counter.counts["segpose_testing::borrowed"] == 1
    assert {"aten::convolution", "aten::relu"} <= set(counter.aten_compute)
    with OperatorCounter() as counter:
        torch.ops.segpose_testing.borrowed_gemm(x, w)
    assert {"aten::im2col", "aten::mm"} <= set(counter.aten_compute)


@pytest.mark.parametrize("dtype", tuple(TOLERANCES), ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2)], ids=str)
def test_counter_sees_every_eager_convolution(
    dilation: Pair, transposed: bool, dtype: torch.dtype
) -> None:
    """Positive control: whichever kernel torch picks, forward and backward, it is counted."""
    x = torch.randn(1, 4, 8, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, dtype=dtype, requires_grad=True)
    function = F.conv_transpose2d if transposed else F.conv2d
    with OperatorCounter() as counter:
        function(x, w, dilation=dilation).sum().backward()
    seen = counter.aten_compute
    assert "aten::convolution" in seen
    assert "aten::convolution_backward" in seen
