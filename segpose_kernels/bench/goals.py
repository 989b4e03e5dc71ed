# SPDX-License-Identifier: BSD-3-Clause
"""How fast this package means to be: goals as data, and how far a run is from each.

A ratio is to the *fastest* alternative of the same run, not to torch eager. "Must" is what a
release is held to, "aim" is where it is going.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..swap.report import format_table
from .cases import Case
from .catalogue import CASES
from .results import CaseResult
from .statistics import geometric_mean

__all__ = ["GOALS", "Goal", "goal_cases", "goals_table"]


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        name: what it is about.
        cases: ids of cases; or a group, dtype and mode as one word each, for all of them.
        must, aim: ratio to the fastest alternative, a geometric mean over the cases; for memory the
            share of torch eager's, where less is better.
        each: the least ratio of any single case.
        memory: whether it is about peak memory.
    """

    name: str
    cases: tuple[str, ...]
    must: float
    aim: float
    each: float | None = None
    memory: bool = False

    def takes(self, case: Case | CaseResult) -> bool:
        """Whether a case belongs to it."""
        dtype = case.dtype if isinstance(case, CaseResult) else case.id.split()[1]
        return case.id in self.cases or f"{case.group}/{dtype}/{case.mode}" in self.cases

    def reached(self, value: float, limit: float) -> bool:
        """Whether a measured value satisfies a limit, `must` or `aim`."""
        return value <= limit if self.memory else value >= limit

    def on_avx2(self) -> Goal:
        """The same on a processor without AVX-512, where registers are half as long and half as
        many, and fewer multiplications gain less.
        """
        return Goal(self.name, self.cases, 1.5, 2.5, self.each)


GOALS = (
    Goal("CPM2DPose forward", ("cpm2dpose-1x3x256x256 float32 inference",), 3.0, 4.0),
    Goal("CPM2DPose forward, bf16", ("cpm2dpose-1x3x256x256 bfloat16 inference",), 1.3, 2.0),
    Goal("CPM2DPose training step", ("cpm2dpose-4x3x256x256 float32 training",), 2.5, 3.5),
    Goal("CPM2DPose training step, bf16", ("cpm2dpose-4x3x256x256 bfloat16 training",), 1.5, 2.5),
    Goal("SegNet forward", ("segnet-64x1x28x28 float32 inference",), 2.5, 4.0),
    Goal("SegNet training step", ("segnet-64x1x28x28 float32 training",), 2.5, 4.0),
    Goal("transposed convolutions", ("transposed/float32/inference",), 2.0, 3.0, each=1.0),
    Goal("transposed convolutions, bf16", ("transposed/bfloat16/inference",), 2.5, 4.0),
    Goal(
        "memory of a CPM2DPose training step",
        ("cpm2dpose-4x3x256x256 float32 training",),
        0.6,
        0.5,
        memory=True,
    ),
)


def goal_cases() -> list[Case]:
    """Every case that a goal is about."""
    return [case for case in CASES if any(goal.takes(case) for goal in GOALS)]


def goals_table(results: Iterable[CaseResult], isa: str | None) -> str:
    """Goals with what was measured beside them; goals of bfloat16 are for AMX, and not on AVX2."""
    found = list(results)
    rows = []
    for goal in GOALS:
        bfloat16 = any("bfloat16" in name for name in goal.cases)
        if isa == "avx2" and not goal.memory:
            if bfloat16:
                continue
            goal = goal.on_avx2()
        rows.append(_row(goal, [case for case in found if goal.takes(case)]))
    return format_table(("goal", "measured", "must", "aim", "", "worst case"), rows)


def _row(goal: Goal, cases: Sequence[CaseResult]) -> tuple[str, ...]:
    sign, unit = ("<=", " of eager") if goal.memory else (">=", "x")
    wanted = (f"{sign} {goal.must:g}{unit}", f"{sign} {goal.aim:g}{unit}")
    values = {
        case.name: value
        for case in cases
        if (value := _share_of_eager_memory(case) if goal.memory else _ratio(case)) is not None
    }
    if not values:
        return (goal.name, "not measured", *wanted, "", "")
    mean = geometric_mean(values.values())
    worst = min(values, key=values.__getitem__)
    if not goal.reached(mean, goal.must) or values[worst] < (goal.each or 0.0):
        verdict = "MISSED"
    else:
        verdict = "aim reached" if goal.reached(mean, goal.aim) else "reached"
    total = sum(goal.takes(case) for case in CASES)
    if len(values) < total:
        verdict = f"{len(values)} of {total} cases"
    shown = f"{values[worst]:.2f}x {worst}" if len(values) > 1 else ""
    return (goal.name, f"{mean:.2f}{unit}", *wanted, verdict, shown)


def _ratio(case: CaseResult) -> float | None:
    return None if case.ratio is None else case.ratio.value


def _share_of_eager_memory(case: CaseResult) -> float | None:
    ours, eager = case.ours, case.fastest_eager
    if ours is None or eager is None or not ours.peak_bytes or not eager.peak_bytes:
        return None
    return ours.peak_bytes / eager.peak_bytes
