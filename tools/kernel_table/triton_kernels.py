# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of the Triton backend at their default configurations: compiled for each
architecture, and for two of them counted in the simulator.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import tritonsim
from counting import difference, figures, totals
from facts import GOAL_PER_MMA, GOAL_SECTORS, Facts, ctas_per_sm, row, sass_groups
from ptxsim import Counters, toolchain
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton_cases import Case, cases

from segpose_kernels.triton.launch import launch_gather, launch_wgrad
from segpose_kernels.triton.plan import Choice, Epilogue, Operands
from segpose_kernels.triton.plan_gather import GatherPlan, plan_gather
from segpose_kernels.triton.plan_wgrad import WgradPlan, plan_wgrad
from segpose_kernels.triton.problem import ConvProblem

ARCHS = (80, 90, 100, 120)
SIMULATED = (80, 90)  # what the simulator executes; the others are compiled
SHORT, LONG = 6, 10  # steps of the K loop, both more than any pipeline has stages

_WGMMA = "one wgmma does the work of many mma.sync, so the ratio of instructions is no cost"
_TF32_WGRAD = (
    "both operands lie across the reduction: words are loaded one by one from shared memory"
)
_SMALL = "a small tile has few products for each address, predicate and fragment of a step"
_ADDRESSES = (
    "the compiler keeps an address and a predicate for every vector that a thread copies, and "
    "moves each of them on in every step"
)
_IEEE = (
    "float32 without tensor cores: the threads of a warp read rows of shared memory that lie in "
    "the same banks; such calls run on the CUDA kernels where those are built"
)
_SPILLS = (
    "on 10.0 and 12.0 the compiler keeps a few registers in local memory: the tiles were sized for "
    "8.0 and 9.0"
)
_SECTORS = "elements of a warp's vectors are apart in memory"


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _count_gather(case: Case, plan: GatherPlan, cc: int, depth: int) -> tuple[Counters, int, str]:
    """Counters of two row tiles of a 1x1 convolution, the bytes it must move, and the problem."""
    dtype, tile = case.pointers["out_ptr"], plan.tile
    assert dtype is not None
    assert tile is not None
    rows, red = tile.m // 8, depth * tile.k
    channels = (tile.n, red) if plan.direction == "dgrad" else (red, tile.n)
    problem = ConvProblem(1, rows, 16, channels[0], rows, 16, channels[1], 1, 1)
    operands = Operands(dtype, str(plan.constants["PRECISION"]), tritonsim.device(cc))
    chosen = plan_gather(
        problem, plan.direction, operands, Epilogue(True, 0.01), Choice("igemm", tile)
    )
    source, w = _draw(dtype, 1, red, rows, 16), _draw(dtype, problem.k, problem.c, 1, 1)
    bias, target = torch.randn(tile.n).to(dtype), _draw(dtype, 1, tile.n, rows, 16)
    counters = Counters()
    with set_wrap_triton_enabled(False), tritonsim.simulated(cc, counters=counters):
        launch_gather(chosen, source, None, w, bias, target)
    return counters, sum(t.nbytes for t in (source, w, bias, target)), str(problem)


def _count_wgrad(case: Case, plan: WgradPlan, cc: int, depth: int) -> tuple[Counters, int, str]:
    """The same for one tile of a filter gradient."""
    dtype, tile = case.pointers["y_ptr"], plan.tile
    assert dtype is not None
    assert tile is not None
    rows = depth * tile.k // 16
    problem = ConvProblem(1, rows, 16, tile.n, rows, 16, tile.m, 1, 1)
    operands = Operands(dtype, str(plan.constants["PRECISION"]), tritonsim.device(cc))
    chosen = plan_wgrad(problem, operands, choice=Choice("igemm", tile, 1))
    y, x = _draw(dtype, 1, tile.m, rows, 16), _draw(dtype, 1, tile.n, rows, 16)
    target = _draw(dtype, tile.m, tile.n, 1, 1)
    counters = Counters()
    with set_wrap_triton_enabled(False), tritonsim.simulated(cc, counters=counters):
        launch_wgrad(chosen, y, x, None, target)
    return counters, sum(t.nbytes for t in (y, x, target)), str(problem)


def steady(case: Case, cc: int) -> tuple[dict[str, float], str]:
    """Figures of a kernel's K loop, what a longer reduction executes more, and the problem."""
    plan = case.plan
    runs = []
    for depth in (SHORT, LONG):
        if isinstance(plan, GatherPlan):
            runs.append(_count_gather(case, plan, cc, depth))
        else:
            assert isinstance(plan, WgradPlan)
            runs.append(_count_wgrad(case, plan, cc, depth))
    (short, _, _), (long, least, problem) = runs
    # Moves only name registers, which the assembler resolves.
    found = figures(difference(totals(long), totals(short)), without=("mov",))
    moved = long.unique_bytes() + long.unique_bytes(write=True)
    found["dram_over_minimum"] = round(moved / least, 3)
    return found, problem


def note(name: str, facts: dict[str, Any], simulated: dict[str, float]) -> str | None:
    """Why figures fall short of their goals."""
    if facts["spill_bytes"]:
        return _SPILLS
    if simulated.get("wavefronts_ld_shared", 1) > 1:
        return _IEEE
    if simulated.get("instructions_per_mma", 0) > GOAL_PER_MMA:
        if facts["sass"].get("HGMMA"):
            return _WGMMA
        if name.startswith("wgrad_tf32"):
            return _TF32_WGRAD
        m, n, _ = name.split("_")[2].split("x")
        return _SMALL if int(m) * int(n) < 128 * 64 else _ADDRESSES
    return None if simulated.get("sector_efficiency", 1) >= GOAL_SECTORS else _SECTORS


def static(case: Case, cc: int, simulator: tritonsim.Simulator) -> dict[str, Any]:
    """Compile a case and read off what the compiler and the disassembler say."""
    tensors = {
        name: None if dtype is None else torch.empty(16, dtype=dtype)
        for name, dtype in case.pointers.items()
    }
    options = {"num_warps": case.plan.warps, "num_stages": case.plan.stages}
    arguments = {**case.plan.integers, **case.plan.constants, **options}
    kernel, _ = simulator.compile(case.kernel, tensors, arguments)
    name, cubin = kernel.metadata.name, kernel.asm["cubin"]
    usage = toolchain.cubin_resources(cubin, sass=False)[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = sass_groups(toolchain.sass_summary(path)[name])
    shared = kernel.metadata.shared
    return {
        "registers": usage.registers,
        # Triton keeps no log of ptxas: loads and stores of local memory, four bytes each.
        "spill_bytes": 4 * sass["local"],
        "stack_bytes": usage.stack_bytes,
        "shared_bytes": shared,
        "ctas_per_sm": ctas_per_sm(usage.registers, kernel.threads, shared, f"sm_{cc}"),
        "sass": sass,
    }


def produce() -> Facts:
    """Compile, disassemble, execute; about fifteen minutes on one core."""
    torch.manual_seed(7)
    kernels: list[dict[str, Any]] = []
    for cc in ARCHS:
        simulator = tritonsim.Simulator(cc)
        for case in cases(cc):
            if not case.listed:
                continue
            print(f"{case.name} for sm_{cc}", file=sys.stderr)
            facts = static(case, cc, simulator)
            simulated, problem = {}, None
            if case.simulated and cc in SIMULATED:
                simulated, problem = steady(case, cc)
            kernels.append(
                row(
                    case.name,
                    "triton",
                    f"sm_{cc}",
                    **facts,
                    simulated=simulated,
                    problem=problem,
                    note=note(case.name, facts, simulated),
                )
            )
    return Facts(f"Triton {triton.__version__}", kernels)
