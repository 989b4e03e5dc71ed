# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of the CUDA backend: compiled for the default architectures, counted in the
simulator.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cudasim
import torch
from counting import difference, figures, totals
from facts import GOAL_PER_MMA, GOAL_SECTORS, Facts, ctas_per_sm, row, sass_groups
from ptxsim import Counters, toolchain

from segpose_kernels import _plan
from segpose_kernels.testing.fused import run_fused
from segpose_kernels.testing.plans import problem_of
from segpose_kernels.testing.spec import ConvSpec

sys.path.append(str(cudasim.ROOT / "tests"))

from cuda_scenarios import DTYPES, SCENARIOS

ARCHS = ("sm_80", "sm_90")  # what setup.py builds where no GPU is seen
# One more channel block of the filter for each tap: a tap is left every second K block of two-byte
# elements, as in the narrowest layers that count as wide.
STEADY_CHANNELS = 64
# Kernels whose traffic is compared with that of the whole pass.
MAIN = ("gather", "direct", "depthwise", "wgrad")

_NARROW = "loads single elements, for channels that no 16-byte vector fits"
_DIRECT = (
    "a request of it uses a part of each sector, and later ones the rest, from L1: what DRAM moves "
    "is the last column"
)
_SMALL = "its warps have fewer products for each fragment, address and barrier than 64x64 ones"
_TF32_WGRAD = (
    "rounds both operands to tf32 in the loop, one conversion for each product: the tensor cores "
    "would cut the bits off, and every sum with them"
)
_TF32_SMALL = f"rounds one operand to tf32 in the loop, and {_SMALL}"


@dataclass
class Observed:
    """What running a kernel in the simulator showed."""

    threads: int
    dynamic_shared: int
    simulated: dict[str, float]
    problem: str


def run(
    spec: ConvSpec, dtype: str, multiprocessors: int, backward: bool, layout: str = "channels_last"
) -> tuple[dict[str, Counters], dict[str, tuple[int, int, int]]]:
    """Counters of the kernels that a problem launches; their threads, dynamic shared memory, and
    how often they start.
    """
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    tensors = spec.make_tensors(
        DTYPES[dtype],
        generator=torch.Generator().manual_seed(7),
        input_layout=layout,
        weight_layout=layout,
        grad_layout=layout,
    )
    wanted = ("input", "weight", "bias") if backward else ()
    with cudasim.simulated(multiprocessors, count=True) as simulator:
        run_fused(spec, tensors, backend="cuda", requires_grad=wanted)
        names = simulator.launched
        launches = {
            cudasim.kernel_name(launch.name): (
                launch.block[0],
                launch.shared_bytes,
                names.count(cudasim.kernel_name(launch.name)),
            )
            for launch in simulator.library.launches
        }
    return simulator.counters, launches


def observe_scenarios() -> dict[str, Observed]:
    """Every kernel on the problem that its scenario in the tests has."""
    observed: dict[str, Observed] = {}
    for scenario in SCENARIOS:
        for dtype in scenario.dtypes:
            print(f"counting {scenario} {dtype}", file=sys.stderr)
            counters, launches = run(
                scenario.spec, dtype, scenario.multiprocessors, scenario.backward, scenario.layout
            )
            expected = scenario.expected(dtype)
            for name, (threads, shared, launched) in launches.items():
                there_for = any(name.startswith(wanted) for wanted in expected)
                if name in observed and not there_for:
                    continue
                found = counters[name]
                simulated = figures(totals(found))
                simulated.pop("instructions_per_mma", None)  # of a whole run: prologue, epilogue
                # A kernel that a pass starts once reads its operands and writes its result.
                if launched == 1 and name.startswith(MAIN):
                    moved = found.unique_bytes() + found.unique_bytes(write=True)
                    least = scenario.spec.bytes(DTYPES[dtype])
                    simulated["dram_over_minimum"] = round(moved / least, 3)
                observed[name] = Observed(threads, shared, simulated, _describe(scenario.spec))
    return observed


def _describe(spec: ConvSpec) -> str:
    return (
        f"{'x'.join(map(str, spec.input_shape))} -> {spec.c_out}, {'x'.join(map(str, spec.kernel))}"
    )


# Steady state --------------------------------------------------------------------------------


def _gather_pairs() -> Iterator[tuple[ConvSpec, ConvSpec, int]]:
    """Problems of the same output whose reductions differ: 3x3 and 5x5 taps, without padding."""
    for (p, q), columns, sms in itertools.product(
        ((8, 16), (16, 16), (16, 24), (32, 24), (8, 8), (32, 32)), (128, 64, 32), (1, 2, 4)
    ):
        short, long = (
            ConvSpec("steady", "conv2d", 1, STEADY_CHANNELS, columns, p + k - 1, q + k - 1, (k, k))
            for k in (3, 5)
        )
        yield short, long, sms


def _wgrad_pairs() -> Iterator[tuple[ConvSpec, ConvSpec, int]]:
    """Problems of the same filter whose pixels differ: 128 more."""
    for filters, channels, k, rows, sms in itertools.product(
        (128, 64), (128, 64), (3, 1), (4, 8, 16), (1, 2, 4)
    ):
        short, long = (
            ConvSpec("steady", "conv2d", 1, channels, filters, n + k - 1, 16 + k - 1, (k, k))
            for n in (rows, rows + 8)
        )
        yield short, long, sms


def steady(name: str) -> tuple[dict[str, float], str] | None:
    """Figures of a tensor-core kernel's loop: what a longer reduction executes more."""
    match = re.fullmatch(r"(gather|wgrad)_mma_(\w+?)_(\d+x\d+)(_narrow)?", name)
    if match is None or match.group(4):
        return None
    kind, dtype = match.group(1), match.group(2)
    op = "fprop" if kind == "gather" else "wgrad"
    for short, long, sms in _gather_pairs() if kind == "gather" else _wgrad_pairs():
        plans = [
            _plan.cuda_plan(
                problem_of(spec),
                op,
                str(DTYPES[dtype]).removeprefix("torch."),
                tf32=dtype == "tf32",
                multiprocessors=sms,
            )
            for spec in (short, long)
        ]
        if all(name in plan.kernels and plan.splits == 1 for plan in plans):
            print(f"steady state of {name}", file=sys.stderr)
            runs = [totals(run(s, dtype, sms, kind == "wgrad")[0][name]) for s in (short, long)]
            return figures(difference(runs[1], runs[0])), f"{_describe(short)} to {_describe(long)}"
    raise RuntimeError(f"no problem leads to {name}: the search in _gather_pairs is too narrow")


def note(name: str, simulated: dict[str, float]) -> str | None:
    """Why figures fall short of their goals."""
    if name.endswith("_narrow"):
        return _NARROW
    if name.startswith(("direct", "depthwise")):
        return _DIRECT if simulated.get("sector_efficiency", 1) < GOAL_SECTORS else None
    if simulated.get("instructions_per_mma", 0) <= GOAL_PER_MMA:
        return None
    if "tf32" not in name:
        return _SMALL
    return _TF32_WGRAD if name.startswith("wgrad") else _TF32_SMALL


def produce() -> Facts:
    """Compile, disassemble, execute; about five minutes on one core."""
    observed = observe_scenarios()
    loops = {name: steady(name) for name in observed}
    version = toolchain.run_tool([toolchain.nvcc_path(), "--version"]).stdout
    release = re.search(r"V([\d.]+)", version)
    kernels: list[dict[str, Any]] = []
    for arch in ARCHS:
        rows = []
        for source in cudasim.KERNELS:
            print(f"compiling {source} for {arch}", file=sys.stderr)
            usage = toolchain.resource_usage(cudasim.SOURCES / source, arch, ["-O3"])
            for mangled, resources in usage.items():
                name = cudasim.kernel_name(mangled)
                seen = observed[name]
                simulated, problem = dict(seen.simulated), seen.problem
                if loops[name] is not None:
                    loop, problem = loops[name]
                    simulated |= loop
                shared = resources.shared_bytes + seen.dynamic_shared
                rows.append(
                    row(
                        name,
                        "cuda",
                        arch,
                        registers=resources.registers,
                        spill_bytes=resources.spill_store_bytes + resources.spill_load_bytes,
                        stack_bytes=resources.stack_bytes,
                        shared_bytes=shared,
                        ctas_per_sm=ctas_per_sm(resources.registers, seen.threads, shared, arch),
                        sass=sass_groups(resources.sass),
                        simulated=simulated,
                        problem=problem,
                        note=note(name, simulated),
                    )
                )
        kernels += sorted(rows, key=lambda r: r["name"])
    return Facts(f"nvcc {release.group(1) if release else 'unknown'}", kernels)
