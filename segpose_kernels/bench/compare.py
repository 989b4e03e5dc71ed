# SPDX-License-Identifier: BSD-3-Clause
"""Two runs beside one another: how well ratios repeat, or what a change has done to them."""

from __future__ import annotations

from ..swap.report import format_table
from .results import NOISY, CaseResult, Run

__all__ = ["comparison"]

SHORT = 1e-3
"""Below this many seconds a call, ratios are shown but not expected to repeat."""


def comparison(run: Run, other: Run) -> str:
    """A row for each case of both, the largest difference first, and a count at the end.

    A case repeats if its ratios to the fastest alternative differ by at most 10%. Cases that either
    run marked as noisy, and calls below a millisecond, are not counted.
    """
    by_id = {case.id: case for case in other.cases}
    rows = []
    counted = repeated = 0
    for case in run.cases:
        now, then = case.ratio, by_id[case.id].ratio if case.id in by_id else None
        if now is None or then is None:
            continue
        change = now.value / then.value - 1
        remark = _remark(case, by_id[case.id])
        if not remark:
            counted += 1
            repeated += abs(change) <= NOISY
            remark = "" if abs(change) <= NOISY else "differs"
        values = (f"{now.value:.2f}x", f"{then.value:.2f}x", f"{change:+.0%}", remark)
        rows.append((abs(change), (case.id, *values)))
    if not rows:
        return "the two runs have no case in common"
    rows.sort(reverse=True)
    text = format_table(("case", "ratio", "other", "", ""), [row for _, row in rows])
    return f"{text}\n\n{repeated} of {counted} cases above 1 ms and not noisy are within 10%"


def _remark(case: CaseResult, other: CaseResult) -> str:
    if case.noisy or other.noisy:
        return "noisy"
    ours = case.ours
    return "short" if ours is not None and ours.time.value < SHORT else ""
