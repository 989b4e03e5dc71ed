# SPDX-License-Identifier: BSD-3-Clause
"""The plots of sweeps: time and memory against size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..extras import import_extra
from .charts import COLOURS, TITLES, Draw, Theme, log_ticks, present
from .results import OURS, CaseResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["scaling"]


def scaling(
    cases: Sequence[CaseResult], fewer_threads: Sequence[CaseResult], threads: tuple[int, int]
) -> Draw:
    """Time (above) and memory (below) of series of cases, a column a series.

    Args:
        cases: with a `sweep`, measured with all threads.
        fewer_threads: the same with fewer; may be empty.
        threads: of the two.
    """
    columns: dict[tuple[str, str], list[CaseResult]] = {}
    for case in cases:
        if case.sweep is not None:
            columns.setdefault(_series(case), []).append(case)

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(2, len(columns), squeeze=False, sharex="col")
        for column, ((subject, quantity), series) in enumerate(columns.items()):
            time, memory = panels[:, column]
            few = [case for case in fewer_threads if _series(case) == (subject, quantity)]
            _series_times(time, theme, series, few)
            for name in present(series):
                points = [
                    (case.sweep[1], case.measurements[name].peak_bytes)
                    for case in series
                    if case.sweep is not None and name in case.measurements
                ]
                known = [(x, peak / 2**20) for x, peak in points if peak]
                if known:
                    memory.plot(*zip(*known, strict=True), "o-", color=COLOURS[name], ms=3, lw=1.2)
            values = [case.sweep[1] for case in series if case.sweep is not None]
            for axes in (time, memory):
                axes.set(xscale="log", yscale="log")
                axes.set_xticks(values, [str(value) for value in values])
                _label_values(axes)
                axes.minorticks_off()
                axes.grid(visible=True, linewidth=0.4)
            time.set_title(f"{subject}: {quantity}")
            memory.set_xlabel(quantity)
        panels[0][0].set_ylabel("ms a call")
        panels[1][0].set_ylabel("peak MiB (torch's allocator)")
        _scaling_legend(figure, theme, present(cases), threads if fewer_threads else None)

    return draw


def _label_values(axes: Axes) -> None:
    """A decade at least: what hardly changes looks flat, and has more than one label."""
    low, high = axes.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        low, high = middle / 10**0.5, middle * 10**0.5
        axes.set_ylim(low, high)
    if high < 30 * low:
        ticks = log_ticks(low, high)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _series(case: CaseResult) -> tuple[str, str]:
    assert case.sweep is not None
    quantity = case.sweep[0]
    return case.name.partition(f"-{quantity}-")[0], quantity


def _series_times(
    axes: Axes, theme: Theme, series: Sequence[CaseResult], few: Sequence[CaseResult]
) -> None:
    def points(cases: Sequence[CaseResult], name: str) -> list[tuple[int, float]]:
        return [
            (case.sweep[1], case.measurements[name].time.value * 1e3)
            for case in cases
            if case.sweep is not None and name in case.measurements
        ]

    for name in present(series):
        ours = name == OURS
        xs, ys = zip(*points(series, name), strict=True)
        axes.plot(xs, ys, "o-", color=COLOURS[name], ms=3.5 if ours else 2.5, lw=2 if ours else 1)
    if single := points(few, OURS):
        axes.plot(*zip(*single, strict=True), "--", color=COLOURS[OURS], lw=1.2)
    floors = [(c.sweep[1], c.floor * 1e3) for c in series if c.sweep is not None and c.floor]
    if floors:
        axes.plot(*zip(*floors, strict=True), ":", color=theme.ink, lw=1.3)


def _scaling_legend(
    figure: Figure, theme: Theme, names: Sequence[str], threads: tuple[int, int] | None
) -> None:
    lines = import_extra("matplotlib.lines", "bench")
    handles = [lines.Line2D([], [], color=COLOURS[n], lw=2, label=TITLES[n]) for n in names]
    if threads is not None:
        more, fewer = threads
        label = f"segpose_kernels, {fewer} of {more} threads"
        handles.append(lines.Line2D([], [], color=COLOURS[OURS], ls="--", label=label))
    handles.append(lines.Line2D([], [], color=theme.ink, ls=":", label="machine's limit, direct"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, columnspacing=1.2)
