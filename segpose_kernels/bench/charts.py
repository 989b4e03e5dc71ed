# SPDX-License-Identifier: BSD-3-Clause
"""The report's plots, each drawn twice: for light pages and for dark ones.

Backgrounds are transparent, and one set of colours of middle lightness serves both; only lines and
letters change. Widths are those of a README column, about 850 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import import_extra
from .contenders import CONTENDERS
from .limits import Limits
from .results import OURS, CaseResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "TITLES",
    "Draw",
    "Theme",
    "gpu_roofs",
    "log_ticks",
    "present",
    "relative_times",
    "roofline",
    "rows_height",
    "save",
]

Draw = Callable[["Figure", "Theme"], None]

_WIDTH = 8.6  # inches, at 100 dots an inch
COLOURS = {
    "segpose": "#e4572e",
    "segpose-nchw": "#f0a38a",
    "segpose-triton": "#c2185b",
    "segpose-graph": "#7a1fa2",
    "eager": "#8a94a0",
    "eager-cl": "#5b7fa6",
    "eager-graph": "#34556f",
    "cudnn-search": "#3b6ea5",
    "cudnn-fused": "#7d8f3c",
    "cudnn-graph": "#a8b545",
    "flag-gems": "#9a6a4f",
    "compile": "#2f9e8f",
    "max-autotune": "#1c7c54",
    "mkldnn": "#b8902b",
    "onnxruntime": "#8a6fd1",
    "openvino": "#3b8fd9",
    "jax": "#c06fae",
}
TITLES = {c.name: c.title for c in CONTENDERS}


class Theme:
    """Colours of letters and lines on a light or dark page."""

    def __init__(self, name: str) -> None:
        dark = name == "dark"
        self.name = name
        self.ink = "#e6edf3" if dark else "#1f2328"
        self.grey = "#8d96a0" if dark else "#656d76"
        self.rule = "#30363d" if dark else "#d8dee4"

    @property
    def parameters(self) -> dict[str, Any]:
        """matplotlib's."""
        return {
            "font.size": 9.5,
            # Letters as letters: a fifth of the size, and any narrower font fits too.
            "svg.fonttype": "none",
            "text.color": self.ink,
            "axes.labelcolor": self.grey,
            "axes.edgecolor": self.rule,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlecolor": self.ink,
            "xtick.color": self.grey,
            "ytick.color": self.grey,
            "grid.color": self.rule,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "legend.labelcolor": self.ink,
            "figure.facecolor": "none",
            "svg.hashsalt": "segpose_kernels",
        }


def save(name: str, height: float, draw: Draw, folder: Path) -> None:
    """Draw into `folder`/`name`-light.svg and -dark.svg, `height` inches tall.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "bench")
    figures = import_extra("matplotlib.figure", "bench")
    for theme in (Theme("light"), Theme("dark")):
        with matplotlib.rc_context(theme.parameters):
            figure: Figure = figures.Figure(figsize=(_WIDTH, height), layout="constrained")
            draw(figure, theme)
            # No date: the same figures give the same file.
            figure.savefig(folder / f"{name}-{theme.name}.svg", metadata={"Date": None})


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis of a few decades at most, fewer where they would crowd."""
    steps = (1, 2, 5) if high / low > 30 else (1, 1.5, 2, 3, 5, 7)
    ticks = [m * 10.0**e for e in range(-3, 4) for m in steps]
    return [tick for tick in ticks if low <= tick <= high]


# Times further apart than this stand at the edge, as arrows.
_FARTHEST = 30.0


def relative_times(cases: Sequence[CaseResult]) -> Draw:
    """Everyone's time over this package's, a row a case; left of the line is faster than it."""
    shown = [case for case in cases if case.ours is not None]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        names = present(shown)
        low, high = 0.8, 1.25
        for row, case in enumerate(shown):
            assert case.ours is not None
            axes.axhline(row, color=theme.rule, linewidth=0.6, zorder=0)
            for name, measured in case.measurements.items():
                if name == OURS:
                    continue
                relative = measured.time.value / case.ours.time.value
                at = min(max(relative, 1 / _FARTHEST), _FARTHEST)
                low, high = min(low, at / 1.1), max(high, at * 1.1)
                marker = "o" if at == relative else "<" if relative < 1 else ">"
                axes.plot(at, row, marker, color=COLOURS[name], markersize=6, alpha=0.95)
        axes.axvline(1, color=COLOURS[OURS], linewidth=2, zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(log_ticks(low, high), [f"{tick:g}x" for tick in log_ticks(low, high)])
        axes.minorticks_off()
        axes.set_yticks(range(len(shown)), [_row_label(case, shown) for case in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel("time relative to segpose_kernels: left of the line is faster than it")
        _legend(figure, axes, [name for name in names if name != OURS], line=True)

    return draw


def _row_label(case: CaseResult, cases: Sequence[CaseResult]) -> str:
    """The name, with mode and dtype where the cases differ in them."""
    parts = [case.name.removeprefix("transposed-")]
    if len({c.mode for c in cases}) > 1 and case.mode == "training":
        parts.append("training")
    if len({c.dtype for c in cases}) > 1:
        parts.append({"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[case.dtype])
    return " ".join(parts)


def present(cases: Sequence[CaseResult]) -> list[str]:
    """Names of contenders with a measurement, in the order of columns."""
    found = {name for case in cases for name in case.measurements}
    return [name for name in COLOURS if name in found]


def _legend(figure: Figure, axes: Axes, names: Sequence[str], *, line: bool = False) -> None:
    lines = import_extra("matplotlib.lines", "bench")
    handles = [
        lines.Line2D([], [], color=COLOURS[n], marker="o", linestyle="", label=TITLES[n])
        for n in names
    ]
    if line:
        ours = lines.Line2D([], [], color=COLOURS[OURS], linewidth=2, label="segpose_kernels")
        handles.insert(0, ours)
    figure.legend(handles=handles, loc="outside upper left", ncols=4, columnspacing=1.2)


def roofline(cases: Sequence[CaseResult], limits: Limits) -> Draw:
    """Operations a second against operations a byte: this package, the fastest peer, the limits."""

    def draw(figure: Figure, theme: Theme) -> None:
        dtypes = list(dict.fromkeys(case.dtype for case in cases))
        panels = figure.subplots(1, len(dtypes), squeeze=False)[0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            chosen = [
                c for c in cases if c.dtype == dtype and c.ours is not None and c.bytes is not None
            ]
            _roofs(axes, theme, limits, dtype, chosen)
            for case in chosen:
                assert case.bytes is not None
                x = case.flops / case.bytes
                peer = case.fastest_peer
                ys = {}
                if peer is not None:
                    ys["peer"] = case.flops / peer.time.value / 1e9
                    axes.plot(x, ys["peer"], "o", color=theme.grey, markersize=4, alpha=0.8)
                assert case.ours is not None
                ys["ours"] = case.flops / case.ours.time.value / 1e9
                axes.plot([x, x], list(ys.values())[:2] * (2 // len(ys)), color=theme.rule, lw=0.8)
                axes.plot(x, ys["ours"], "o", color=COLOURS[OURS], markersize=4.5)
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"{dtype}: at most {limits.peak(dtype) / 1e9:,.0f} GFLOP/s")
            axes.set_xlabel("operations a byte")
            axes.tick_params(which="minor", labelbottom=False, labelleft=False)
            axes.grid(visible=True, linewidth=0.4)
        panels[0].set_ylabel("GFLOP/s, direct definition")
        lines = import_extra("matplotlib.lines", "bench")
        handles = [
            lines.Line2D([], [], color=colour, marker="o", linestyle="", label=label)
            for colour, label in (
                (COLOURS[OURS], "segpose_kernels"),
                (theme.grey, "fastest peer"),
            )
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)

    return draw


def _roofs(
    axes: Axes, theme: Theme, limits: Limits, dtype: str, cases: Sequence[CaseResult]
) -> None:
    """The limits: arithmetic, memory, and a cache where copies show one."""
    peak = limits.peak(dtype) / 1e9
    intensities = [case.flops / case.bytes for case in cases if case.bytes]
    low, high = min(intensities, default=1) / 1.5, max(intensities, default=100) * 1.5
    for rate in limits.memory_rates():
        slope = rate / 1e9
        points = [low, peak / slope, max(high, peak / slope)]
        axes.plot(points, [min(peak, slope * x) for x in points], color=theme.grey, linewidth=1)
        axes.annotate(
            f"{slope:.0f} GB/s",
            (low, slope * low),
            xytext=(12, -2),
            textcoords="offset points",
            fontsize=8,
            color=theme.grey,
            va="top",
        )
    axes.set_xlim(low, high)


def rows_height(count: int) -> float:
    """Inches for `relative_times` of so many rows."""
    return 1.35 + 0.24 * count


def gpu_roofs(
    roofs: Sequence[tuple[str, float, float]], intensities: Sequence[float], title: str
) -> Draw:
    """What data sheets allow: a line a GPU, and on it the problems where they can be at best.

    Args:
        roofs: name, operations a second, bytes a second.
        intensities: operations a byte of the problems.
    """
    colours = ("#8a6fd1", "#3b8fd9", "#2f9e8f", "#e4572e")

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        low, high = min(intensities) / 1.5, max(intensities) * 1.5
        for (name, flops, bandwidth), colour in zip(roofs, colours, strict=True):
            corners = [low, flops / bandwidth, max(high, flops / bandwidth)]
            heights = [min(flops, bandwidth * x) / 1e12 for x in corners]
            axes.plot(corners, heights, color=colour, linewidth=1.5, label=name)
            points = [min(flops, bandwidth * x) / 1e12 for x in intensities]
            axes.plot(intensities, points, "o", color=colour, markersize=3.5)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlim(low, high)
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("TFLOP/s at most")
        axes.grid(visible=True, linewidth=0.4)
        figure.legend(loc="outside upper left", ncols=4)

    return draw
