# SPDX-License-Identifier: BSD-3-Clause
"""Results as text: a line a case while they come in, then means, losses and who was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..swap.report import format_table
from .results import CaseResult, Measurement, summarise
from .statistics import Estimate

__all__ = [
    "LEGEND",
    "ResultLines",
    "details",
    "format_ratio",
    "format_seconds",
    "reasons",
    "summary",
]


LEGEND = (
    "ratio: time of the fastest alternative / ours, ± half its 95% interval; ~ if not known to 10%"
)


def format_seconds(seconds: float) -> str:
    """In milliseconds, three figures."""
    return three_figures(seconds * 1e3)


def three_figures(value: float) -> str:
    """A positive number without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def format_ratio(ratio: Estimate | None) -> str:
    """Such as `2.31x ±3%`; `~` before a noisy one is added by the caller."""
    if ratio is None:
        return "-"
    return f"{ratio.value:.2f}x ±{100 * ratio.relative_width:.0f}%"


class ResultLines:
    """Lines of one table, printable one by one: the widths are known before the first."""

    _RATIO_WIDTH = 13

    def __init__(self, names: Sequence[str], contenders: Sequence[str]) -> None:
        self._contenders = contenders
        self._name_width = max(map(len, names), default=0)
        self._widths = [max(6, len(name)) for name in contenders]

    @property
    def header(self) -> str:
        cells = [
            name.rjust(width) for name, width in zip(self._contenders, self._widths, strict=True)
        ]
        first = "ms a call".ljust(self._name_width + 19)
        return "  ".join((first, *cells, "ratio".rjust(self._RATIO_WIDTH), "fastest peer"))

    def line(self, result: CaseResult) -> str:
        cells = []
        for name, width in zip(self._contenders, self._widths, strict=True):
            measured = result.measurements.get(name)
            cells.append((format_seconds(measured.time.value) if measured else "-").rjust(width))
        first = f"{result.name.ljust(self._name_width)} {result.dtype[:8]:<8} {result.mode[:9]:<9}"
        ratio = ("~" if result.noisy else "") + format_ratio(result.ratio)
        peer = result.fastest_peer
        last = "" if peer is None else peer.contender
        return "  ".join((first, *cells, ratio.rjust(self._RATIO_WIDTH), last)).rstrip()


def summary(cases: Sequence[CaseResult]) -> str:
    """Geometric means over each group, dtype and mode."""
    rows = [
        (
            f"{s.group} {s.dtype} {s.mode}",
            str(s.count),
            f"{s.mean:.2f}x",
            f"{s.worst:.2f}x {s.worst_case}",
            f"{s.losses} of {s.count}",
        )
        for s in summarise(cases)
    ]
    if not rows:
        return "no case has both this package and a peer"
    header = ("ratio to the fastest peer", "cases", "geometric mean", "worst", "losses")
    return format_table(header, rows)


def details(result: CaseResult) -> str:
    """One case, a row a contender."""
    header = ["contender", "ms", "spread", "GFLOP/s", "ours is", "peak MiB", "ready s", "error"]
    if result.floor is not None:
        header.insert(4, "of limit")
    rows = []
    for measured in sorted(result.measurements.values(), key=lambda m: m.time.value):
        time = measured.time
        row = [
            measured.contender,
            format_seconds(time.value),
            f"{format_seconds(time.low)}-{format_seconds(time.high)}",
            three_figures(result.flops / time.value / 1e9),
            "" if measured.ours else _ours_is(result, measured),
            "-" if measured.peak_bytes is None else three_figures(measured.peak_bytes / 2**20),
            three_figures(measured.ready_seconds),
            f"{measured.error:.0e}",
        ]
        if result.floor is not None:
            row.insert(4, f"{result.floor / time.value:.0%}")
        rows.append(tuple(row))
    return format_table(tuple(header), rows)


def _ours_is(result: CaseResult, measured: Measurement) -> str:
    ratio = result.ratio_to(measured)
    return "-" if ratio is None else f"{ratio.value:.2f}x"


def reasons(cases: Iterable[CaseResult]) -> list[str]:
    """Who was left out, why, and in how many cases; a line each."""
    counts: Counter[tuple[str, str]] = Counter()
    for case in cases:
        counts.update(case.absent.items())
    return [
        f"{contender}: {reason} ({count} case{'s' * (count > 1)})"
        for (contender, reason), count in sorted(counts.items())
    ]
