# SPDX-License-Identifier: BSD-3-Clause
"""What `segpose bench` makes of results: ratios, the gate, goals, tables and reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_up_results import measurement, result, run_of

from segpose_kernels.bench import compare, document, gate, goals, gpu, report, table
from segpose_kernels.bench.catalogue import CASES
from segpose_kernels.bench.results import CaseResult, Run, summarise
from segpose_kernels.bench.statistics import Estimate

FASTER = result({"segpose": 1e-3, "eager": 3e-3, "openvino": 2e-3}, name="faster")
SLOWER = result({"segpose": 4e-3, "eager": 1e-3, "openvino": 2e-3}, name="slower")
NOISY = result({"segpose": 1e-3, "eager": 1.5e-3}, name="noisy", noise=0.6)
ALONE = result({"segpose": 1e-3}, name="alone", absent={"openvino": "not installed"})


def test_a_ratio_is_to_the_fastest_peer() -> None:
    assert FASTER.ratio is not None
    assert FASTER.ratio.value == pytest.approx(2)
    assert FASTER.ratio_to_eager is not None
    assert FASTER.ratio_to_eager.value == pytest.approx(3)
    assert SLOWER.fastest_peer is not None
    assert SLOWER.fastest_peer.contender == "eager"
    assert SLOWER.ratio is not None
    assert SLOWER.ratio.value == pytest.approx(0.25)
    assert ALONE.ratio is None
    assert ALONE.fastest_peer is None


def test_another_form_of_this_package_is_no_peer() -> None:
    case = result({"segpose": 2e-3, "segpose-nchw": 1e-3, "eager": 4e-3})
    assert case.ratio is not None
    assert case.ratio.value == pytest.approx(2)


def test_replayed_graphs_are_compared_with_each_other() -> None:
    graphs = {"segpose-graph": 1.0, "eager-graph": 3.0}
    both = result({"segpose": 4.0, "eager": 6.0} | graphs)
    assert both.ratio is not None
    assert both.ratio.value == pytest.approx(3.0), "the fastest peer is a graph, and so is ours"
    assert both.ratio_to_eager is not None
    assert both.ratio_to_eager.value == pytest.approx(1.5), "without graphs on either side"
    alone = result({"segpose": 4.0, "eager-graph": 3.0})
    assert alone.ratio is not None
    assert alone.ratio.value == pytest.approx(0.75), "no graph of ours was measured"


def test_the_method_is_that_of_the_device() -> None:
    run = run_of(result({"segpose": 1.0, "eager": 2.0}))
    on_cpu = document.to_markdown(report._method(run))
    run.settings["device"] = "cuda"
    on_gpu = document.to_markdown(report._method(run))
    assert "thread pools" in on_cpu
    assert "TF32" not in on_cpu
    assert "CUDA events" in on_gpu
    assert "thread pools" not in on_gpu


def test_noise_is_told() -> None:
    assert NOISY.noisy
    assert not FASTER.noisy
    assert not ALONE.noisy


def test_means_by_group() -> None:
    other = replace(FASTER, mode="training")
    summaries = summarise([FASTER, SLOWER, ALONE, other])
    assert [(s.mode, s.count, s.losses, s.worst_case) for s in summaries] == [
        ("inference", 2, 1, "slower"),
        ("training", 1, 0, "faster"),
    ]
    assert summaries[0].mean == pytest.approx((2 * 0.25) ** 0.5)


def test_results_are_read_as_written(tmp_path: Path) -> None:
    swept = replace(FASTER, sweep=("batch", 4))
    run = run_of(swept, SLOWER, ALONE)
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run


@pytest.mark.parametrize("text", ["", "{}", '{"cases": 3}', '{"benchmarks": [{}]}', "[]"])
def test_files_of_another_kind_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results of segpose bench"):
        Run.load(path)


def ratios(**values: float) -> dict[str, Estimate]:
    return {
        f"{name} float32 inference": Estimate(value, 0.98 * value, 1.02 * value)
        for name, value in values.items()
    }


def test_the_gate_names_what_lost_and_by_how_much() -> None:
    losses = gate.find_losses([FASTER, SLOWER, NOISY], ratios(faster=6.0, slower=0.25, noisy=2.5))
    assert [loss.case for loss in losses] == ["faster float32 inference"]
    message = "faster float32 inference: 3.00x torch eager, was 6.00x, 50% lost"
    assert str(losses[0]) == message


@pytest.mark.parametrize(
    ("before", "lost"), [(2.0, False), (3.0, False), (3.2, False), (3.5, True)]
)
def test_the_gate_lets_noise_and_gains_pass(before: float, lost: bool) -> None:
    assert bool(gate.find_losses([FASTER], ratios(faster=before))) == lost


def test_the_gate_does_not_blame_a_noisy_run() -> None:
    assert gate.find_losses([NOISY], ratios(noisy=2.2)) == []
    assert gate.find_losses([replace(NOISY, name="other")], ratios(noisy=9.0)) == []


def test_stored_ratios(tmp_path: Path) -> None:
    path = tmp_path / "ratios" / "avx512-2.json"
    assert gate.store_ratios(path, [FASTER, ALONE], "about") == 1
    assert gate.store_ratios(path, [SLOWER], "about") == 1
    stored = gate.load_ratios(path)
    assert {case: ratio.value for case, ratio in stored.items()} == {
        FASTER.id: pytest.approx(3),
        SLOWER.id: pytest.approx(0.25),
    }
    assert gate.find_losses([FASTER, SLOWER], stored) == []


def test_ratios_in_the_package_are_of_cases_that_exist() -> None:
    known = {case.id for case in CASES}
    for path in gate.ratios_path("any", 1).parent.glob("*.json"):
        assert re.fullmatch(r"\w+-\d+", path.stem)
        assert gate.load_ratios(path).keys() <= known


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.name)
def test_goals_are_about_cases_that_exist(goal: goals.Goal) -> None:
    taken = [case for case in CASES if goal.takes(case)]
    assert len(taken) == (13 if "transposed" in goal.name else 1)
    assert goal.reached(goal.aim, goal.must)
    assert not goal.reached(goal.must, goal.aim)


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def segnet(ratio: float, mode: str = "inference", **options: object) -> CaseResult:
    times = {"segpose": 1e-3, "eager": ratio * 1e-3}
    return result(times, name="segnet-64x1x28x28", group="models", mode=mode, **options)


@pytest.mark.parametrize(
    ("ratio", "isa", "verdict"),
    [
        (2.4, "avx512", "MISSED"),
        (2.6, "avx512", "reached"),
        (4.5, "avx512", "aim reached"),
        (1.6, "avx2", "reached"),
        (1.4, "avx2", "MISSED"),
    ],
)
def test_goals_beside_what_was_measured(ratio: float, isa: str, verdict: str) -> None:
    text = goals.goals_table([segnet(ratio)], isa)
    line = line_of(text, "SegNet forward")
    assert f"{ratio:.2f}x" in line
    assert line.split("  ")[-1].strip() == verdict
    assert "not measured" in line_of(text, "SegNet training step")
    assert ("bf16" in text) == (isa != "avx2")


def test_one_case_below_its_own_goal_misses_it() -> None:
    names = [case.name for case in CASES if case.id.startswith("transposed") and not case.training]
    cases = [
        result({"segpose": 1e-3, "eager": 5e-3 if i else 0.9e-3}, name=name)
        for i, name in enumerate(dict.fromkeys(names))
    ]
    assert "MISSED" in line_of(goals.goals_table(cases, "avx512"), "transposed convolutions ")
    assert "12 of 13 cases" in line_of(goals.goals_table(cases[1:], "avx512"), "transposed")
    better = [result({"segpose": 1e-3, "eager": 5e-3}, name=case.name) for case in cases]
    assert "aim reached" in line_of(goals.goals_table(better, "avx512"), "transposed")


def test_the_goal_for_memory() -> None:
    measurements = {
        "segpose": measurement("segpose", 1e-3, peak_bytes=55),
        "eager": measurement("eager", 2e-3, peak_bytes=100),
        "eager-cl": measurement("eager-cl", 3e-3, peak_bytes=80),
    }
    case = replace(
        result({}, name="cpm2dpose-4x3x256x256", mode="training", group="models"),
        measurements=measurements,
    )
    line = line_of(goals.goals_table([case], "avx512"), "memory")
    assert "0.55 of eager" in line
    assert line.rstrip().endswith(" reached")


def test_two_runs_beside_one_another() -> None:
    slow = {"segpose": 2e-3, "eager": 4e-3}
    run = run_of(
        result(slow, name="same"),
        result(slow, name="other"),
        result({"segpose": 1e-5, "eager": 2e-5}, name="short"),
        NOISY,
        FASTER,
    )
    before = run_of(
        result(slow, name="same"),
        result({"segpose": 2e-3, "eager": 8e-3}, name="other"),
        result({"segpose": 1e-5, "eager": 8e-5}, name="short"),
        NOISY,
    )
    text = compare.comparison(run, before)
    assert line_of(text, "other").split()[-4:] == ["2.00x", "4.00x", "-50%", "differs"]
    assert line_of(text, "short").endswith("short")
    assert line_of(text, "noisy").endswith("noisy")
    assert "faster" not in text
    assert text.endswith("1 of 2 cases above 1 ms and not noisy are within 10%")
    assert compare.comparison(run_of(FASTER), before) == "the two runs have no case in common"


def test_lines_of_a_table() -> None:
    lines = table.ResultLines(["faster", "noisy"], ["segpose", "eager", "openvino"])
    assert lines.header.split()[-5:] == ["eager", "openvino", "ratio", "fastest", "peer"]
    assert lines.line(FASTER).split() == (
        ["faster", "float32", "inference", "1.00", "3.00", "2.00", "2.00x", "±0%", "openvino"]
    )
    assert " ~1.50x" in lines.line(NOISY)
    assert lines.line(ALONE).split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.012")],
)
def test_three_figures(value: float, text: str) -> None:
    assert table.three_figures(value) == text


def test_details_and_reasons() -> None:
    text = table.details(FASTER)
    assert line_of(text, "openvino").split()[4:6] == ["200%", "2.00x"]
    assert table.reasons([ALONE, ALONE]) == ["openvino: not installed (2 cases)"]


BLOCKS = (
    document.Heading("A & B", 1),
    document.Text("words <b>", items=("one", "two")),
    document.Table(("name", "ms"), (("x<y", "*1.0*"),)),
)


def test_markdown() -> None:
    text = document.to_markdown(BLOCKS)
    assert text.startswith("# A & B\n\nwords <b>\n- one\n- two\n\n| name | ms |\n| --- | ---: |\n")
    assert "| x<y | **1.0** |" in text


def test_html_escapes_what_is_not_its_own() -> None:
    text = document.to_html(BLOCKS, title="<t>", folder=Path())
    assert "<title>&lt;t&gt;</title>" in text
    assert "<h1>A &amp; B</h1>" in text
    assert "words &lt;b&gt;" in text
    assert "<td class=label>x&lt;y</td><td><b>1.0</b></td>" in text


class Tags(HTMLParser):
    """Counts tags and notes those left open."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def whole_run(threads: int = 2) -> Run:
    times = {"segpose": 1e-3, "eager": 3e-3, "openvino": 2e-3}
    swept = [
        result(times, name=f"upsampler-batch-{n}", group="scaling", sweep=("batch", n))
        for n in (1, 2, 4)
    ]
    bench = result(times, name="kernelbench-1-57", group="kernelbench", note="1 image of 8")
    return run_of(
        segnet(2.0), segnet(0.5, "training"), FASTER, SLOWER, *swept, bench, threads=threads
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report and a README beside it."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("report")
    readme = root / "README.md"
    readme.write_text(f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n", encoding="utf-8")
    folder = root / "docs" / "bench"
    made = report.write_report(whole_run(), folder, fewer_threads=whole_run(1), gpu_page=True)
    report.splice(made, readme, folder)
    return folder


def test_a_report_holds_everything_and_the_losses(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    for heading in ("In short", "Whole models", "Where this package is slower", "Scaling"):
        assert f"## {heading}" in text
    losses = text.partition("## Where this package is slower")[2].partition("\n## ")[0]
    assert "| slower float32 inference | eager | 0.25x ±0% |" in losses
    assert "segnet-64x1x28x28 float32 training" in losses
    assert "faster float32" not in losses
    assert "0123456789" in text
    assert "`segpose bench --report`" in text
    assert "| upsampler-batch-1 | 1.00x | 1.00x | 1.00x |" in text


def test_published_figures_stand_apart(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    measured, _, published = text.partition("## What KernelBench published for an H100")
    assert "kernelbench-1-57 (1 image of 8)" in measured
    assert "| kernelbench-1-57 | the convolution | 6.56 | 6.56 |" in published
    assert "6.56" not in measured
    assert "Not measured here" in published


def test_static_figures_are_called_static(written: Path) -> None:
    page = (written / "report.md").read_text(encoding="utf-8").partition("# GPU kernels")[2]
    headings = re.findall(r"^##+ (.*)$", page, flags=re.MULTILINE)
    assert len(headings) == 4
    assert all(heading.endswith("(static)") for heading in headings)


def test_plots_come_for_light_and_dark_pages(written: Path) -> None:
    plots = sorted(path.name for path in (written / "plots").iterdir())
    text = (written / "report.md").read_text(encoding="utf-8")
    referred = sorted(set(re.findall(r"plots/([\w-]+\.svg)", text)))
    assert plots == referred
    assert {name.rpartition("-")[2] for name in plots} == {"dark.svg", "light.svg"}
    for name in plots:
        path = written / "plots" / name
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        width = float(root.get("width", "0").removesuffix("pt")) / 72 * 100
        assert 800 < width < 900, "a README is about 850 pixels wide"
        assert path.stat().st_size < 200_000
        # No background: the page's shows through.
        assert "fill: #ffffff" not in path.read_text(encoding="utf-8").split("axes_1")[0]


def test_the_page_is_one_file_in_order(written: Path) -> None:
    tags = Tags()
    tags.feed((written / "report.html").read_text(encoding="utf-8"))
    assert tags.open == []
    assert len(tags.sources) == 2 * len(list((written / "plots").glob("*-dark.svg")))
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.sources)


def test_a_readme_keeps_what_is_around_the_results(written: Path) -> None:
    text = (written.parents[1] / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n{report._BEGIN}\n")
    assert text.endswith(f"{report._END}\nafter\n")
    assert "\nold\n" not in text
    assert "Slower than the fastest alternative in 2 of 5 cases" in text
    assert "(docs/bench/report.md)" in text
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(pictures) == 4
    assert all((written.parents[1] / picture).is_file() for picture in pictures)


def test_a_readme_without_marks_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n", encoding="utf-8")
    made = report.write_report(run_of(FASTER), tmp_path / "out")
    with pytest.raises(ValueError, match="has no lines <!-- segpose bench: begin -->"):
        report.splice(made, readme, tmp_path / "out")
    assert readme.read_text(encoding="utf-8") == "nothing here\n"


def test_the_kernel_table_or_why_it_is_not_there() -> None:
    rows, missing = gpu.kernel_facts()
    assert bool(rows) != bool(missing)
    if missing:
        assert "`segpose kernels`" in missing


def test_the_kernel_table_as_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"name": "dgrad_f16", "backend": "cuda", "arch": "sm_80", "registers": 128}
    simulated = {"wavefronts_per_request": 1.0}
    monkeypatch.setattr(gpu, "kernel_facts", lambda: ([row | {"simulated": simulated}], ""))
    text = document.to_markdown(
        [b for b in gpu.static_page() if not isinstance(b, document.Picture)]
    )
    assert "| dgrad_f16 | cuda | sm_80 | 128 | - | - | - | - | 1 |" in text
    assert "kernels of the triton backend" in text


def test_floors_of_gpus() -> None:
    spec = gpu.GPU_PROBLEMS[0]
    for dtype in (gpu.torch.float16, gpu.torch.float32):
        seconds = [g.floor(spec, dtype)[0] for g in gpu.GPUS]
        assert seconds == sorted(seconds, reverse=True)
    json.dumps([g.name for g in gpu.GPUS])
