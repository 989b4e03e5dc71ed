# SPDX-License-Identifier: BSD-3-Clause
"""A run as a report in Markdown and HTML: tables, plots, losses, method; in short for a README."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..testing.kernelbench import PUBLISHED_H100
from . import charts, gpu
from .catalogue import GROUPS
from .charts_scaling import scaling
from .contenders import CONTENDERS
from .document import Block, Heading, Picture, Table, Text, to_html, to_markdown
from .limits import Limits
from .machine import describe
from .results import CaseResult, Run, summarise
from .table import format_ratio, format_seconds, reasons

__all__ = ["splice", "write_gpu_page", "write_report"]

_BEGIN, _END = "<!-- segpose bench: begin -->", "<!-- segpose bench: end -->"
_ROOFS_HEIGHT = 3.8
_TITLE = "Speed and memory beside the alternatives"
_NAMES = tuple(dict.fromkeys(contender.name for contender in CONTENDERS))


@dataclass
class _Report:
    """What is being put together."""

    run: Run
    fewer_threads: Run | None
    blocks: list[Block] = field(default_factory=list)
    plots: dict[str, tuple[float, charts.Draw]] = field(default_factory=dict)

    def picture(self, name: str, alt: str, height: float, draw: charts.Draw) -> Picture:
        self.plots[name] = height, draw
        return Picture(name, alt)

    def group(self, name: str) -> list[CaseResult]:
        return [case for case in self.run.cases if case.group == name]


def write_report(
    run: Run, folder: Path, *, fewer_threads: Run | None = None, gpu_page: bool = False
) -> _Report:
    """Write `report.md`, `report.html` and `plots/` into `folder`, which is made if need be.

    Args:
        run: the results; losses and what was left out are reported like everything else.
        fewer_threads: the series of sweeps once more with fewer threads.
        gpu_page: end with the static figures of the GPU kernels.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    report = _Report(run, fewer_threads)
    report.blocks += [Heading(_TITLE, 1), *_where(run), Heading("In short"), *_summary(run)]
    for name, words in GROUPS.items():
        if name != "scaling" and (cases := report.group(name)):
            report.blocks += [
                Heading(f"{words[0].upper()}{words[1:]}"),
                *_group(report, name, cases),
            ]
    report.blocks += [*_losses(run), *_scaling(report), *_roofline(report), *_published(run)]
    report.blocks += [*_method(run), *_left_out(run)]
    if gpu_page:
        report.blocks += gpu.static_page()
        report.plots[gpu.ROOFS] = _ROOFS_HEIGHT, gpu.roofs()
    _write(report.blocks, report.plots, folder, "report", _TITLE)
    return report


def write_gpu_page(folder: Path) -> None:
    """Write `gpu.md`, `gpu.html` and their plot into `folder`: static figures only."""
    plots = {gpu.ROOFS: (_ROOFS_HEIGHT, gpu.roofs())}
    _write(gpu.static_page(), plots, folder, "gpu", "GPU kernels")


def _write(
    blocks: Sequence[Block],
    plots: Mapping[str, tuple[float, charts.Draw]],
    folder: Path,
    name: str,
    title: str,
) -> None:
    pictures = folder / "plots"
    pictures.mkdir(parents=True, exist_ok=True)
    for picture, (height, draw) in plots.items():
        charts.save(picture, height, draw, pictures)
    (folder / f"{name}.md").write_text(to_markdown(blocks), encoding="utf-8")
    page = to_html(blocks, title=title, folder=pictures)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")


def splice(report: _Report, readme: Path, folder: Path) -> None:
    """Put the report's short form between the two marks in `readme`.

    Args:
        folder: where the report was written; linked from the README.

    Raises:
        ValueError: if the marks are not there.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{readme} has no lines {_BEGIN} and {_END} to put the results between")
    link = Path(os.path.relpath(folder.resolve(), readme.resolve().parent)).as_posix()
    pictures = [block for block in report.blocks if isinstance(block, Picture)][:2]
    summaries = summarise(_outside_sweeps(report.run))
    lost, total = sum(s.losses for s in summaries), sum(s.count for s in summaries)
    models = report.group("models")
    blocks: list[Block] = [
        *_where(report.run),
        *_summary(report.run),
        *([_short(models)] if models else []),
        Text(
            f"Slower than the fastest alternative in {lost} of {total} cases: "
            f"[all of them, and the full report]({link}/report.md)."
        ),
        *pictures,
    ]
    body = to_markdown(blocks, pictures=f"{link}/plots")
    readme.write_text(f"{before}{_BEGIN}\n\n{body}\n{_END}{after}", encoding="utf-8")


def _where(run: Run) -> list[Block]:
    machine = run.machine
    return [Text(f"{describe(machine)}; {machine['date']}. Made by `{machine['command']}`.")]


def _outside_sweeps(run: Run) -> list[CaseResult]:
    """Sweeps are there to show a course; a mean over their points says nothing."""
    return [case for case in run.cases if case.sweep is None]


def _summary(run: Run) -> list[Block]:
    rows = [
        (
            GROUPS.get(s.group, s.group),
            s.dtype,
            s.mode,
            str(s.count),
            f"*{s.mean:.2f}x*",
            f"{s.worst:.2f}x",
            s.worst_case,
            str(s.losses),
        )
        for s in summarise(_outside_sweeps(run))
    ]
    header = ("", "", "", "cases", "geometric mean", "worst", "of", "lost")
    return [
        Text(
            "How many times faster than the fastest alternative, whichever that is in each case; "
            "below 1 this package is slower."
        ),
        Table(header, rows, labels=3),
    ]


def _group(report: _Report, name: str, cases: Sequence[CaseResult]) -> list[Block]:
    blocks: list[Block] = []
    for mode in ("inference", "training"):
        for dtype in dict.fromkeys(case.dtype for case in cases):
            chosen = [case for case in cases if (case.mode, case.dtype) == (mode, dtype)]
            if not chosen:
                continue
            blocks.append(
                report.picture(
                    f"{name}-{mode}-{dtype}",
                    f"Time of each alternative relative to this package, {mode}, {dtype}",
                    charts.rows_height(len(chosen)),
                    charts.relative_times(chosen),
                )
            )
            blocks += [Heading(f"{mode.capitalize()}, {dtype}", 3), _times(chosen)]
    return blocks


def _times(cases: Sequence[CaseResult]) -> Table:
    """A row a case, a column a contender; the fastest in bold."""
    names = [name for name in _NAMES if any(name in case.measurements for case in cases)]
    limited = any(case.floor for case in cases)
    several = len({(case.mode, case.dtype) for case in cases}) > 1
    header = ["", *(["", ""] if several else []), *(f"{name} ms" for name in names), "ratio"]
    header += ["peak MiB (eager)", "GFLOP/s"] + (["of limit"] if limited else [])
    rows = []
    for case in cases:
        fastest = min(case.measurements.values(), key=lambda m: m.time.value, default=None)
        row = [f"{case.name} ({case.note})" if case.note else case.name]
        row += [case.dtype, case.mode] if several else []
        for name in names:
            measured = case.measurements.get(name)
            text = "-" if measured is None else format_seconds(measured.time.value)
            row.append(f"*{text}*" if measured is not None and measured is fastest else text)
        row.append(("~" if case.noisy else "") + format_ratio(case.ratio))
        row.append(_memory(case))
        ours = case.ours
        row.append("-" if ours is None else f"{case.flops / ours.time.value / 1e9:,.0f}")
        if limited:
            row.append("-" if not (ours and case.floor) else f"{case.floor / ours.time.value:.0%}")
        rows.append(row)
    return Table(header, rows, labels=3 if several else 1)


def _short(cases: Sequence[CaseResult]) -> Table:
    """A row a case: this package, the fastest peer, memory."""
    header = ("", "dtype", "mode", "ms", "fastest alternative", "ms", "ratio", "peak MiB (eager)")
    rows = []
    for case in cases:
        peer = case.fastest_peer
        ours = case.ours_against(peer)
        if ours is None or peer is None:
            continue
        times = format_seconds(ours.time.value), peer.contender, format_seconds(peer.time.value)
        ratio = ("~" if case.noisy else "") + format_ratio(case.ratio)
        rows.append((case.name, case.dtype, case.mode, *times, ratio, _memory(case)))
    return Table(header, rows, labels=3)


def _memory(case: CaseResult) -> str:
    """Ours, and in brackets the smaller of the two eager ones."""

    def text(peak: int | None) -> str:
        return "-" if peak is None else f"{peak / 2**20:.1f}"

    eager = [
        m.peak_bytes
        for name, m in case.measurements.items()
        if name.startswith("eager") and m.peak_bytes is not None
    ]
    ours = case.ours
    return f"{text(None if ours is None else ours.peak_bytes)} ({text(min(eager, default=None))})"


def _losses(run: Run) -> list[Block]:
    rows = []
    for case in run.cases:
        ratio, peer = case.ratio, case.fastest_peer
        if ratio is not None and peer is not None and ratio.value < 1:
            rows.append(
                (case.id, peer.contender, ("~" if case.noisy else "") + format_ratio(ratio))
            )
    rows.sort(key=lambda row: row[2].lstrip("~"))
    blocks: list[Block] = [Heading("Where this package is slower")]
    if not rows:
        return [*blocks, Text("Nowhere among the cases measured.")]
    return [*blocks, Table(("case", "fastest", "ratio"), rows, labels=2)]


def _scaling(report: _Report) -> list[Block]:
    cases = report.group("scaling")
    if not cases:
        return []
    fewer = report.fewer_threads
    few = [] if fewer is None else [case for case in fewer.cases if case.group == "scaling"]
    more_threads = report.run.machine["threads"]
    threads = (more_threads, more_threads if fewer is None else fewer.machine["threads"])
    blocks: list[Block] = [Heading("Scaling")]
    layer = "Transposed convolution, k4 s2, 128 to 128 channels, 32x32"
    plots = {
        "scaling-layer": ("upsampler", layer),
        "scaling-odd": ("odd", f"{layer}, in sizes that fill no vectors and tiles"),
        "scaling-changing": ("changing", f"{layer}, another size of about that area in each call"),
        "scaling-models": ("", "Whole models"),
    }
    left = list(cases)
    for name, (prefix, words) in plots.items():
        chosen = [case for case in left if case.name.startswith(prefix)]
        left = [case for case in left if case not in chosen]
        if chosen:
            draw = scaling(chosen, few, threads)
            alt = f"{words}: time and memory against size"
            blocks += [Text(f"{words}."), report.picture(name, alt, 5.4, draw)]
    if few:
        blocks.append(_thread_table(cases, few, threads))
    return blocks


def _thread_table(
    cases: Sequence[CaseResult], few: Sequence[CaseResult], threads: tuple[int, int]
) -> Table:
    """How much the additional threads gain, by contender."""
    by_id = {case.id: case for case in few}
    names = [name for name in _NAMES if any(name in case.measurements for case in cases)]
    rows = []
    for case in cases:
        other = by_id.get(case.id)
        if other is None:
            continue
        cells = [case.name]
        for name in names:
            here, there = case.measurements.get(name), other.measurements.get(name)
            gain = "-" if not (here and there) else f"{there.time.value / here.time.value:.2f}x"
            cells.append(gain)
        rows.append(cells)
    return Table((f"speed-up from {threads[1]} to {threads[0]} threads", *names), rows)


_ROOFLINE_GROUPS = (
    "transposed",
    "networks",
    "grouped",
    "cpm-layers",
    "segnet-layers",
    "kernelbench",
)


def _roofline(report: _Report) -> list[Block]:
    if report.run.limits is None:
        return []
    limits = Limits.from_dict(report.run.limits)
    cases = [
        case
        for name in _ROOFLINE_GROUPS
        for case in report.group(name)
        if case.mode == "inference" and case.bytes and case.ours
    ]
    if not cases:
        return []
    draw = charts.roofline(cases, limits)
    picture = report.picture("roofline", "Single layers against the machine's limits", 4.2, draw)
    words = (
        f"Limits: {limits.source}. Work is that of the direct definition, so an algorithm with "
        "fewer products can pass the roof; "
        + (
            "the two slopes are the bandwidths of data inside a core's cache and far outside."
            if len(limits.memory_rates()) > 1
            else "the slope is the bandwidth of memory."
        )
    )
    return [Heading("Single layers against the machine's limits"), Text(words), picture]


def _published(run: Run) -> list[Block]:
    """Others' figures, apart from ours."""
    if not any(case.group == "kernelbench" for case in run.cases):
        return []
    rows = [
        (
            name,
            published.whole or "the convolution",
            *("-" if t is None else f"{t:g}" for t in (published.eager, published.inductor)),
        )
        for name, published in PUBLISHED_H100.items()
    ]
    return [
        Heading("What KernelBench published for an H100"),
        Text(
            "Not measured here, and not to be compared with the tables above: another machine, "
            "problems at full size, float32 with TF32, torch 2.5.0; mean milliseconds, from the "
            "benchmark's repository."
        ),
        Table(("problem", "computes", "torch eager ms", "torch.compile ms"), rows, labels=2),
    ]


def _method(run: Run) -> list[Block]:
    effort = run.settings["effort"]
    sample = f"{effort['sample_seconds'] * 1e3:.0f} ms"
    rounds = effort["least_rounds"]
    on_gpu = run.settings["device"] == "cuda"
    items = (
        "Every result was compared with a float64 reference before timing (torch eager in float32 "
        "where that would take too long); a contender with a wrong result is left out.",
        *(_gpu_method() if on_gpu else _cpu_method(run)),
        f"A sample is the mean of calls for about {sample}; at least {rounds} rounds, or three "
        "where a round takes long. Times are medians; a ratio is the median of the ratios round "
        "by round, ± half its 95% interval. ~ marks a ratio not known to 10%.",
        "Inference runs under no_grad with weights in the dtype. A training step is forward and "
        "backward to every parameter, a low precision under autocast; loss and optimizer, the same "
        "for all, are left out.",
        "Peak memory is what a call takes from torch's allocator beyond model, gradients of "
        "parameters and input.",
        "GFLOP/s counts the operations of the direct definition, over input positions for "
        "transposed convolutions, three passes for a training step.",
    )
    return [Heading("How it was measured"), Text(items=items)]


def _gpu_method() -> tuple[str, ...]:
    return (
        "All contenders of a case ran in one process and in turns, another one first in each "
        "round. Each call is timed by CUDA events behind kernels that overwrite the L2 cache: "
        "launching costs nothing unless it takes longer than they do, 0.3 ms before a layer and "
        "0.1 ms before a model. Models with small batches wait for their launches; a CUDA graph "
        "takes that away.",
        "float32 is TF32, torch's default for convolutions.",
    )


def _cpu_method(run: Run) -> tuple[str, ...]:
    evicted = run.settings["evict_bytes"]
    warm_up = run.settings["effort"].get("warm_up_seconds", 0.0)
    untimed = f"{warm_up * 1e3:.0f} ms of untimed calls" if warm_up else "an untimed call"
    caches = (
        f"{evicted / 2**20:.0f} MiB of other memory are touched before each call"
        if evicted
        else f"caches are warm: each sample follows {untimed} of the same contender"
    )
    where = run.machine
    sizes = ", ".join(f"{level} {size / 2**20:g} MiB" for level, size in where["caches"].items())
    memory = f"{where['memory'] / 2**30:.0f} GiB"
    return (
        "All contenders of a case ran in one process and in turns, another one first in each "
        "round; before each turn the thread pools came to rest.",
        f"{where['threads']} threads for everyone, on as many cores; {caches}.",
        f"Data caches: {sizes}. Memory {memory}. {where['platform']}.",
        "torch.compile freezes the weights in inference. onnxruntime and OpenVINO run the ONNX "
        "export with inputs and outputs bound. OpenVINO is told the precision.",
    )


def _left_out(run: Run) -> list[Block]:
    items = reasons(run.cases)
    return [Heading("Who was left out, and why"), Text(items=items)] if items else []
