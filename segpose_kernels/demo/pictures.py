# SPDX-License-Identifier: BSD-3-Clause
"""The demo's pictures: each function draws one figure from plain data and computes no result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.digits import CLASS_NAMES, Digits
from ..extras import import_extra
from ..pose import Skeleton
from ..training import History
from .memory import MemoryRow
from .timing import TimingRow
from .workloads import EAGER, EAGER_CHANNELS_LAST, OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _GREY, _RULE = "#1a1a1a", "#6b6b6b", "#e4e4e4"
_ACCENT = "#d1495b"
_COLOURS = {EAGER: "#9aa5b1", EAGER_CHANNELS_LAST: "#5c7c99", OURS: _ACCENT}
# Ten digits that stay apart from each other and from white, the background.
_CLASS_COLOURS = (
    "#ffffff",
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#59a14f",
    "#edc948",
    "#b07aa1",
    "#17a2a2",
    "#9c755f",
    "#2b2b2b",
    "#ff7fb2",
)
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": "#bdbdbd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_DPI = 130


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=_DPI)
    return path


def _new_figure(width: float, height: float, **options: Any) -> Figure:
    """A figure in inches, in the common style, without pyplot: no window, nothing global."""
    import_extra("matplotlib").rcParams.update(_STYLE)
    figure: Figure = import_extra("matplotlib.figure").Figure(figsize=(width, height), **options)
    return figure


def _headline(figure: Figure, title: str, remark: str) -> None:
    """Title and one line below it, top left, at a distance in inches from the edges."""
    width, height = figure.get_size_inches()
    figure.text(0.35 / width, 1 - 0.32 / height, title, fontsize=15, weight="bold", va="center")
    figure.text(0.35 / width, 1 - 0.62 / height, remark, fontsize=10, color=_GREY, va="center")


def segnet_predictions(
    digits: Digits, predicted: Tensor, scores: dict[str, float], *, typical: int = 10
) -> Figure:
    """Images, true masks, predicted masks, wrong pixels: an image of each digit, then the worst.

    Args:
        digits: N held-out images with masks.
        predicted: [N, 28, 28], predicted classes.
        scores: `mean_iou` and `pixel_accuracy` over them, for the caption.
        typical: how many columns of one digit each; four columns of the worst images follow.
    """
    wrong = (predicted != digits.masks).flatten(1).sum(dim=1)
    columns = [int((digits.labels == digit).nonzero()[0]) for digit in range(typical)]
    columns += wrong.argsort(descending=True)[:4].tolist()
    rows: list[tuple[str, Tensor]] = [
        ("image", digits.images[:, 0]),
        ("truth", digits.masks),
        ("predicted", predicted),
        ("wrong pixels", (predicted != digits.masks).float()),
    ]
    figure = _new_figure(13.2, 5.9)
    _headline(
        figure,
        "SegNet on held-out handwritten digits",
        f"{len(digits)} images not trained on: mean IoU {scores['mean_iou']:.3f} over 11 classes, "
        f"pixel accuracy {scores['pixel_accuracy']:.3f}. One colour a class, white is background.",
    )
    colour_maps = import_extra("matplotlib.colors")
    colours = colour_maps.ListedColormap(_CLASS_COLOURS)
    reds = colour_maps.ListedColormap(("#ffffff", "#c1121f"))
    grid = figure.add_gridspec(
        len(rows),
        len(columns) + 1,
        left=0.085,
        right=0.985,
        bottom=0.115,
        top=0.8,
        wspace=0.08,
        hspace=0.08,
        width_ratios=[1] * typical + [0.3] + [1] * 4,
    )
    for i, (name, pictures) in enumerate(rows):
        for j, index in enumerate(columns):
            axis = figure.add_subplot(grid[i, j if j < typical else j + 1])
            if name in ("truth", "predicted"):
                axis.imshow(
                    pictures[index], cmap=colours, vmin=-0.5, vmax=10.5, interpolation="nearest"
                )
            else:
                axis.imshow(
                    pictures[index], cmap="gray_r" if name == "image" else reds, vmin=0, vmax=1
                )
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=True, color=_RULE)
            if j == 0:
                axis.set_ylabel(
                    name, rotation=0, ha="right", va="center", labelpad=8, fontsize=11, color=_INK
                )
            if i == 0 and j in (0, typical):
                axis.set_title(
                    "one of each digit" if j == 0 else "the four worst", loc="left", color=_GREY
                )
    patches = import_extra("matplotlib.patches")
    handles = [
        patches.Patch(facecolor=_CLASS_COLOURS[c], edgecolor="#bdbdbd", label=CLASS_NAMES[c])
        for c in range(11)
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=11,
        handlelength=1,
        handleheight=1,
        columnspacing=1.4,
    )
    return figure


def learning_curve(history: History, class_iou: Tensor, epoch_steps: int) -> Figure:
    """Training loss and held-out scores over epochs, and the final IoU of each class [11]."""
    figure = _new_figure(13.2, 4.6)
    last = history.last
    _headline(
        figure,
        "SegNet learns the digits",
        f"{len(history.losses)} steps in {history.seconds:.0f} s; "
        f"final held-out mean IoU {last['mean_iou']:.3f}.",
    )
    grid = figure.add_gridspec(1, 3, left=0.055, right=0.985, bottom=0.135, top=0.75, wspace=0.24)
    epochs = (torch.arange(len(history.losses)) + 1) / epoch_steps

    axis = figure.add_subplot(grid[0, 0], title="training loss (cross entropy)", xlabel="epoch")
    losses = torch.tensor(history.losses)
    axis.plot(epochs, losses, color="#cfd4da", linewidth=0.7)
    width = min(50, len(losses))
    smooth = losses.unfold(0, width, 1).mean(dim=1)
    axis.plot(
        epochs[width - 1 :], smooth, color=_ACCENT, linewidth=1.8, label=f"mean of {width} steps"
    )
    axis.set_yscale("log")
    ticks = import_extra("matplotlib.ticker")
    axis.yaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(ticks.NullFormatter())
    axis.set_xlim(0, epochs[-1].item() * 1.02)
    axis.grid(axis="y", color=_RULE, linewidth=0.6)
    axis.legend(loc="upper right")

    axis = figure.add_subplot(grid[0, 1], title="held-out images", xlabel="epoch", ylim=(0, 1.02))
    at = [evaluation.step / epoch_steps for evaluation in history.evaluations]
    for name, label, colour in (
        ("pixel_accuracy", "pixel accuracy", "#5c7c99"),
        ("mean_iou", "mean IoU", _ACCENT),
    ):
        values = [evaluation.metrics[name] for evaluation in history.evaluations]
        axis.plot(at, values, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
        axis.annotate(
            f"{values[-1]:.3f}",
            (at[-1], values[-1]),
            (0, -13),
            textcoords="offset points",
            ha="center",
        )
    axis.set_xlim(0, epochs[-1].item() * 1.06)
    axis.grid(axis="y", color=_RULE, linewidth=0.6)
    axis.legend(loc="lower right")

    axis = figure.add_subplot(grid[0, 2], title="IoU of each class", ylim=(0, 1.02))
    values = class_iou.tolist()
    colours = ("#bdbdbd", *_CLASS_COLOURS[1:])
    axis.bar(range(len(values)), values, color=colours[: len(values)], width=0.75)
    for x, value in enumerate(values):
        axis.text(x, value + 0.012, f"{value:.2f}", ha="center", fontsize=8, color=_GREY)
    axis.set_xticks(range(len(values)), ["back-\nground", *CLASS_NAMES[1:]])
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", color=_RULE, linewidth=0.6)
    axis.set_axisbelow(True)
    return figure


def pose_heatmaps(
    images: Tensor,  # [N, 3, S, S]
    true: Tensor,  # [N, J, 2]
    predicted: Tensor,  # [N, J, 2]
    stages: Sequence[Tensor],  # each [N, J, S/8, S/8]
    skeleton: Skeleton,
    remark: str,
) -> Figure:
    """A row for each image: joints found and true, heatmaps after each stage, one joint each.

    Args:
        images: in [0, 1].
        true, predicted: (x, y) in pixels.
        stages: heatmaps of stages 5, 6, 7.
        skeleton: names and limbs of the J joints.
        remark: the caption's line.
    """
    count = len(images)
    names = ("stage 5, first guess", "stage 6", "stage 7, final")
    figure = _new_figure(13.2, 1.0 + 2.75 * count + 0.45)
    _headline(figure, "CPM2DPose finds the landmarks of a photograph", remark)
    height = figure.get_size_inches()[1]
    grid = figure.add_gridspec(
        count,
        5,
        left=0.01,
        right=0.99,
        bottom=0.45 / height,
        top=1 - 1.15 / height,
        wspace=0.05,
        hspace=0.05,
    )
    hues = import_extra("matplotlib").colormaps["hsv"]
    colours = [hues(j / len(skeleton)) for j in range(len(skeleton))]
    for i in range(count):
        axis = figure.add_subplot(grid[i, 0])
        _picture(axis, images[i], "joints found" if i == 0 else "")
        _draw_skeleton(axis, predicted[i], skeleton, colours)
        axis.scatter(
            true[i, :, 0],
            true[i, :, 1],
            s=44,
            facecolors="none",
            edgecolors="white",
            linewidths=1.0,
            zorder=4,
        )
        for j, stage in enumerate(stages):
            axis = figure.add_subplot(grid[i, j + 1])
            _picture(axis, images[i], names[j] if i == 0 else "", faded=True)
            _overlay(axis, stage[i], images.shape[-1], colours)
        axis = figure.add_subplot(grid[i, 4])
        _montage(axis, stages[-1][i], "final, a joint each" if i == 0 else "")
    figure.text(
        0.01,
        0.2 / height,
        "left: dots and limbs are predicted, white rings are the hand-labelled truth; "
        "heatmaps are 1/8 of the image's resolution, one colour a joint",
        color=_GREY,
        va="center",
    )
    return figure


def _picture(axis: Any, image: Tensor, title: str, *, faded: bool = False) -> None:
    shown = image.permute(1, 2, 0)
    if faded:
        shown = shown.mean(dim=2, keepdim=True).expand(-1, -1, 3) * 0.45
    axis.imshow(shown.numpy(), interpolation="bilinear")
    axis.set_title(title, loc="left", color=_GREY)
    axis.set(xlim=(-0.5, image.shape[2] - 0.5), ylim=(image.shape[1] - 0.5, -0.5))
    axis.axis("off")


def _draw_skeleton(axis: Any, joints: Tensor, skeleton: Skeleton, colours: Sequence[Any]) -> None:
    for a, b in skeleton.edges:
        axis.plot(
            joints[[a, b], 0], joints[[a, b], 1], color="white", linewidth=3.2, alpha=0.65, zorder=2
        )
        axis.plot(joints[[a, b], 0], joints[[a, b], 1], color=_INK, linewidth=1.2, zorder=2)
    axis.scatter(
        joints[:, 0], joints[:, 1], s=16, c=colours, edgecolors=_INK, linewidths=0.5, zorder=5
    )


def _overlay(axis: Any, heatmaps: Tensor, size: int, colours: Sequence[Any]) -> None:
    """All joints' heatmaps [J, h, w] over a faded picture, each in its colour."""
    enlarged = torch.nn.functional.interpolate(
        heatmaps[None], size=(size, size), mode="bicubic", align_corners=False
    )[0].clamp(0, 1)
    tints = torch.tensor([colour[:3] for colour in colours], dtype=enlarged.dtype)  # [J, 3]
    strength, strongest = enlarged.max(dim=0)  # [S, S]
    layer = torch.cat((tints[strongest], strength[..., None]), dim=2)
    axis.imshow(layer.numpy())


def _montage(axis: Any, heatmaps: Tensor, title: str) -> None:
    """The heatmaps [J, h, w] in a near-square grid with thin white rules between."""
    count, height, width = heatmaps.shape
    across = math.ceil(math.sqrt(count))
    down = -(-count // across)
    cells = torch.full((down * (height + 1) - 1, across * (width + 1) - 1), float("nan"))
    for j in range(count):
        top, left = (j // across) * (height + 1), (j % across) * (width + 1)
        cells[top : top + height, left : left + width] = heatmaps[j]
    axis.imshow(cells.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, loc="left", color=_GREY)
    axis.axis("off")


def speed_bars(timings: Sequence[TimingRow], memory: Sequence[MemoryRow], remark: str) -> Figure:
    """Time of each operation and peak memory of each training step, side by side."""
    panels: list[tuple[str, dict[str, float], Callable[[float], str]]] = [
        (f"{row.workload}\n{row.operation}", row.milliseconds, _time) for row in timings
    ]
    panels += [
        (
            f"{row.workload}\nstep, peak memory",
            {name: size / 2**20 for name, size in row.bytes.items()},
            lambda mebibytes: f"{mebibytes:.3g} MiB",
        )
        for row in memory
    ]
    figure = _new_figure(13.2, 4.6)
    _headline(figure, "Time and memory beside torch eager: shorter is better", remark)
    grid = figure.add_gridspec(
        1, len(panels), left=0.02, right=0.985, bottom=0.14, top=0.72, wspace=0.12
    )
    for i, (title, values, form) in enumerate(panels):
        axis = figure.add_subplot(grid[0, i])
        axis.set_title(title, loc="left", fontsize=9.5)
        top = max(values.values())
        for x, name in enumerate((EAGER, EAGER_CHANNELS_LAST, OURS)):
            axis.bar(x, values[name], color=_COLOURS[name], width=0.8)
            axis.text(x, values[name] + 0.015 * top, form(values[name]), ha="center", fontsize=8)
        ratio = values[OURS] / min(values[EAGER], values[EAGER_CHANNELS_LAST])
        axis.set_xlabel(f"ratio {ratio:.2f}", color=_INK, fontsize=10, labelpad=7)
        axis.set(xticks=[], yticks=[], ylim=(0, 1.12 * top))
        axis.spines["left"].set_visible(False)
    patches = import_extra("matplotlib.patches")
    figure.legend(
        handles=[patches.Patch(color=colour, label=name) for name, colour in _COLOURS.items()],
        loc="lower center",
        ncols=3,
    )
    return figure


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"
