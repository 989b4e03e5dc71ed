# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA backend on what the compiler emits: host code and kernels run in the simulator.

Every launch is checked for bounds, alignment, races, barriers and missing waits, outputs for
elements that were never written, and values against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_scenarios import DTYPES, SCENARIOS, Scenario, check_infinite_pixel

from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.gpu_problems import GPU_LAYERS, GPU_PROBLEMS
from segpose_kernels.testing.numerics import TF32, assert_results_match
from segpose_kernels.testing.problems import LAYOUTS, ConvSpec, by_name
from segpose_kernels.testing.spec import ConvTensors

cudasim = pytest.importorskip("cudasim")

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not cudasim.have_nvcc(), reason="no nvcc to compile the kernels with"),
]

CASES = [
    pytest.param(scenario, dtype, id=f"{scenario}-{dtype}")
    for scenario in SCENARIOS
    for dtype in scenario.dtypes
]


@pytest.fixture
def float32_precision() -> Iterator[Callable[[str], None]]:
    """Sets torch's switch for float32 convolutions on CUDA by the name of a way to compute."""
    before = torch.backends.cudnn.allow_tf32

    def choose(dtype: str) -> None:
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"

    yield choose
    torch.backends.cudnn.allow_tf32 = before


def draw(
    spec: ConvSpec, dtype: str, generator: torch.Generator, layout: str = "channels_last"
) -> ConvTensors:
    return spec.make_tensors(
        DTYPES[dtype],
        generator=generator,
        input_layout=layout,
        weight_layout=layout,
        grad_layout=layout,
    )


def check(spec: ConvSpec, tensors: ConvTensors, dtype: str, results: dict[str, Any]) -> None:
    assert_results_match(spec, tensors, results, rule=TF32 if dtype == "tf32" else None)


@pytest.mark.parametrize(("scenario", "dtype"), CASES)
def test_each_kernel(
    scenario: Scenario, dtype: str, generator: torch.Generator, float32_precision: Any
) -> None:
    """The plan reaches the kernels that the scenario is for, and they are right."""
    float32_precision(dtype)
    tensors = draw(scenario.spec, dtype, generator, scenario.layout)
    wanted = ("input", "weight", "bias") if scenario.backward else ()
    with cudasim.simulated(scenario.multiprocessors) as simulator:
        results = run_fused(scenario.spec, tensors, backend="cuda", requires_grad=wanted)
    check(scenario.spec, tensors, dtype, results)
    for name in scenario.expected(dtype):
        assert any(known.startswith(name) for known in simulator.launched), (
            name,
            simulator.launched,
        )


def test_scenarios_reach_every_instantiation() -> None:
    """A kernel that is added to the library needs a scenario."""
    compiled = {
        cudasim.kernel_name(kernel)
        for module in cudasim.library().modules
        for kernel in module.kernels
    }
    named = {name for s in SCENARIOS for dtype in s.dtypes for name in s.expected(dtype)}
    without_tile = {name for name in compiled if "_fma_" in name}
    assert {name for name in compiled - without_tile if name not in named} == set()
    assert {name.rpartition("_")[0] for name in without_tile} <= named
    assert {name for name in named if not any(k.startswith(name) for k in compiled)} == set()


PROBLEMS = [
    *(pytest.param(spec, "f16", id=f"{spec}-f16") for spec in (*GPU_PROBLEMS, *GPU_LAYERS)),
    *(
        pytest.param(spec, dtype, id=f"{spec}-{dtype}")
        for dtype, start in (("bf16", 0), ("tf32", 1), ("f32", 2), ("f64", 3))
        for spec in GPU_PROBLEMS[start::4]
    ),
]


@pytest.mark.parametrize(("spec", "dtype"), PROBLEMS)
def test_problems_match_float64(
    spec: ConvSpec, dtype: str, generator: torch.Generator, float32_precision: Any
) -> None:
    """Output and the three gradients, every geometry and the layers of the models."""
    float32_precision(dtype)
    tensors = draw(spec, dtype, generator)
    with cudasim.simulated():
        results = run_fused(spec, tensors, backend="cuda")
    check(spec, tensors, dtype, results)


LAYOUT_PROBLEMS = (by_name("conv-k3s2"), by_name("transposed-k4s2"))
WIDE = replace(by_name("conv-k3s1"), name="conv-k3s1-wide", c_in=24, c_out=40)


@pytest.mark.parametrize("operand", ["input", "weight", "grad"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_any_strides(layout: str, operand: str, generator: torch.Generator) -> None:
    """Slices, offsets, stride 0 and meaningless strides of one operand; the neighbours are NaN."""
    for spec in (WIDE, LAYOUT_PROBLEMS[LAYOUTS.index(layout) % 2]):
        layouts: dict[str, Any] = {f"{operand}_layout": layout}
        tensors = spec.make_tensors(torch.float16, generator=generator, **layouts)
        with cudasim.simulated():
            results = run_fused(spec, tensors, backend="cuda")
        assert_results_match(spec, tensors, results)


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("dtype", ["f16", "tf32"])
def test_channels_last_off_a_16_byte_boundary(
    dtype: str, offset: int, generator: torch.Generator, float32_precision: Any
) -> None:
    """Rows of channels that begin anywhere: copied or read by element, never as vectors."""
    float32_precision(dtype)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        n, c, h, w = tensor.shape
        storage = tensor.new_full((tensor.numel() + offset,), float("nan"))
        rows = storage[offset:].view(n, h, w, c).permute(0, 3, 1, 2)
        return rows.copy_(tensor)

    tensors = draw(WIDE, dtype, generator)
    tensors = replace(
        tensors,
        input=shifted(tensors.input),
        weight=shifted(tensors.weight),
        grad_output=shifted(tensors.grad_output),
    )
    with cudasim.simulated():
        results = run_fused(WIDE, tensors, backend="cuda")
    check(WIDE, tensors, dtype, results)


@pytest.mark.parametrize(
    "scenario",
    [
        s
        for s in SCENARIOS
        if s.spec.name in ("tile-128x64", "wgrad-128x128", "split-k", "rows-any")
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_order_of_warps(
    scenario: Scenario, generator: torch.Generator
) -> None:
    """Bitwise: no sum depends on who comes first."""
    tensors = draw(scenario.spec, "f16", generator, scenario.layout)
    runs = []
    for seed in (None, 1):
        with cudasim.simulated(scenario.multiprocessors, schedule=seed):
            wanted = ("weight", "bias") if scenario.backward else ()
            runs.append(run_fused(scenario.spec, tensors, backend="cuda", requires_grad=wanted))
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


def test_more_phases_than_one_launch_holds(generator: torch.Generator) -> None:
    """Stride 9 has 81 phases; most of them have a single tap, some none."""
    spec = ConvSpec(
        "transposed-s9", "conv_transpose2d", 1, 8, 3, 2, 3, (8, 9), stride=(9, 9), padding=(1, 2)
    )
    tensors = draw(spec, "f16", generator)
    with cudasim.simulated() as simulator:
        results = run_fused(spec, tensors, backend="cuda", requires_grad=())
    assert len([name for name in simulator.launched if not name.startswith("pack")]) == 2
    assert_results_match(spec, tensors, results)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("channels", [24, 5])
def test_one_tap_for_each_pixel_is_one_gemm(
    kernel: tuple[int, int], channels: int, generator: torch.Generator
) -> None:
    """Kernel equals stride: a single phase whose columns are (tap, channel)."""
    spec = ConvSpec(
        "shuffle", "conv_transpose2d", 2, 72, channels, 5, 7, kernel, stride=kernel, groups=1
    )
    for problem in (spec, replace(spec, h=1, w=1, kernel=(4, 4), stride=(1, 3))):
        tensors = draw(problem, "f16", generator)
        with cudasim.simulated():
            results = run_fused(problem, tensors, backend="cuda")
        assert_results_match(problem, tensors, results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
def test_activation_edges(activation: Any, value: float, generator: torch.Generator) -> None:
    """As torch: relu(NaN) is NaN, relu(-inf) is 0, and the gradient's mask likewise."""
    spec = replace(WIDE, activation=activation, kernel=(1, 1), padding=(0, 0), c_in=40)
    tensors = draw(spec, "f32", generator)
    weight = torch.zeros(spec.weight_shape)
    weight[:, :, 0, 0] = torch.eye(40)
    tensors.input[0, 3, 2, 1] = value
    for few in (False, True):  # tensor cores, and a kernel for few channels
        x = tensors.input[:, :8].contiguous() if few else tensors.input
        w = weight[:8, :8].contiguous() if few else weight
        case = replace(spec, c_in=8, c_out=8) if few else spec
        grad = tensors.grad_output[:, :8].contiguous() if few else tensors.grad_output
        with cudasim.simulated():
            got = run_fused(case, ConvTensors(x, w, None, grad), backend="cuda")
        expected = run_fused(case, ConvTensors(x, w, None, grad), backend="aten")
        # A pixel with a value that is not finite spoils its sums alike.
        for name in ("output", "grad_bias", "grad_input"):
            if name in expected:
                torch.testing.assert_close(
                    got[name], expected[name], rtol=2e-3, atol=2e-3, equal_nan=True
                )


@pytest.mark.parametrize("name", ["tile-64x64", "narrow-128x32-c3"])
def test_an_infinite_pixel_stays_in_its_windows(name: str, generator: torch.Generator) -> None:
    (scenario,) = (s for s in SCENARIOS if s.spec.name == name)
    with cudasim.simulated(scenario.multiprocessors):
        check_infinite_pixel(scenario.spec, draw(scenario.spec, "f16", generator))


def test_names_are_those_of_this_library() -> None:
    with pytest.raises(ValueError, match="not a kernel"):
        cudasim.kernel_name("_Z4copyPfS_")
