# SPDX-License-Identifier: BSD-3-Clause
"""The demo from start to end: check, train, look at a photograph, time, draw, write it all down."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cli import LineParser, UsageError
from ..data import Digits, load_digits
from ..data.digits import NUM_CLASSES
from ..explainer import draw_matrices
from ..extras import import_extra
from ..info import collect
from ..models import CPM2DPose, SegNet
from ..pose import mean_joint_error, percentage_correct
from ..segmentation import class_iou, confusion_matrix
from ..swap import optimize
from ..swap.report import format_table
from ..training import (
    PoseRecipe,
    SegNetRecipe,
    initialise,
    lift_final_bias,
    predict_joints,
    predict_masks,
    train_pose_machine,
    train_segnet,
)
from . import pictures
from .checks import WHOLE, ModelCheck, check_model
from .memory import MemoryRow, measure_memory
from .photograph import PORTRAIT, Photograph, load_photograph, normalised
from .timing import TimingRow, time_workload
from .workloads import IMPLEMENTATIONS, pose_workload, segnet_workload

DEFAULT_OUTPUT = "segpose_demo"

_SEGNET = SegNetRecipe()
_POSE = PoseRecipe(steps=240, batch_size=1, learning_rate=3e-4, evaluate_every=60)


@dataclass(frozen=True)
class Settings:
    """How much the demo does; `QUICK` shows that all of it runs, without good results."""

    segnet: SegNetRecipe = _SEGNET
    train_images: int = 4000
    pose: PoseRecipe = _POSE
    pose_size: int = 128
    pose_width: float = 1.0
    check_size: int = 64
    timed_size: int = 256
    timing_seconds: float = 4.0


QUICK = Settings(
    segnet=SegNetRecipe(epochs=1),
    train_images=500,
    pose=PoseRecipe(steps=6, batch_size=1, learning_rate=3e-4, evaluate_every=3),
    pose_size=64,
    pose_width=0.125,
    check_size=32,
    timed_size=64,
    timing_seconds=0.05,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the demo; 0 if all checks passed, 1 if not.

    Raises:
        UsageError: if the output folder cannot be used.
        MissingExtraError: if a package of the extra `demo` is not installed.
    """
    parser = LineParser(
        prog="segpose demo",
        description="Check the kernels on SegNet and CPM2DPose, train, time, and draw pictures.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path(DEFAULT_OUTPUT),
        help=f"folder for pictures and results.json (default: ./{DEFAULT_OUTPUT})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="half a minute, without useful results"
    )
    arguments = parser.parse_args(argv)
    return run(arguments.output, QUICK if arguments.quick else Settings())


def run(output: Path, settings: Settings) -> int:
    """Run the demo into `output`, made if need be; the exit code as in `main`."""
    for module in ("matplotlib", "mlxtend", "skimage"):
        import_extra(module)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {output}: {error.strerror}") from error
    start = time.perf_counter()
    facts = collect()
    cpu = facts["cpu"]
    isa = cpu["isa"] or "no compiled kernels"
    machine = f"{isa}, {cpu['threads']} threads, torch {facts['torch']['version']}"
    print(f"segpose_kernels {facts['segpose_kernels']}: {machine}")
    if facts["library"]["missing"]:
        print(f"compiled kernels missing, torch's are used: {facts['library']['missing']}")

    train, held_out = load_digits()
    train = train.take(slice(settings.train_images))
    photograph = load_photograph()

    _section("Are they right? Largest relative L2 error over all tensors")
    checks = _check(held_out, photograph, settings)

    _section("SegNet on handwritten digits")
    segnet_results, figures = _segnet(train, held_out, settings)

    _section("CPM2DPose on a photograph")
    pose_results, pose_figure = _pose(photograph, settings)
    figures["pose_heatmaps.png"] = pose_figure

    _section("Beside torch eager, medians")
    timings, memory = _measure(settings)

    figures["convolution_matrices.png"] = draw_matrices()
    figures["speed.png"] = pictures.speed_bars(
        timings, memory, f"Medians; {machine}. Ratio: to the better eager."
    )
    for name, figure in figures.items():
        pictures.save(figure, output / name)
    seconds = time.perf_counter() - start
    results = {
        "segnet": segnet_results,
        "cpm": pose_results,
        "checks": [{**asdict(row), "passed": row.passed} for row in checks],
        "timing": [{**asdict(row), "ratio": row.ratio} for row in timings],
        "memory": [{**asdict(row), "ratio": row.ratio} for row in memory],
        "isa": cpu["isa"],
        "threads": cpu["threads"],
        "versions": {
            name: facts[name] for name in ("segpose_kernels", "python", "torch", "triton")
        },
        "info": facts,
        "seconds": seconds,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _section(f"Done in {seconds:.0f} s: {output}")
    for name in (*figures, "results.json"):
        print(f"  {output / name}")
    failed = [row for row in checks if not row.passed]
    for row in failed:
        print(f"WRONG: {row.model}, {row.scope}, {row.kind} {row.worst}: error {row.ours:.1e}")
    return 1 if failed else 0


def _section(title: str) -> None:
    print(f"\n{title}", flush=True)


def _check(held_out: Digits, photograph: Photograph, settings: Settings) -> list[ModelCheck]:
    torch.manual_seed(0)
    pose = initialise(CPM2DPose(len(PORTRAIT), width=settings.pose_width))
    size = settings.check_size
    image, _ = photograph.sample(1, size, torch.Generator().manual_seed(1))
    segnet = SegNet(NUM_CLASSES)
    lift_final_bias(segnet, settings.segnet.final_bias)
    rows = check_model("SegNet", segnet, held_out.images[:64])
    rows += check_model("CPM2DPose", pose, normalised(image))
    header = ("model", "compared", "segpose_kernels", "torch eager", "worst of ours", "")
    cells = [
        (
            row.model,
            f"{row.scope}: {row.tensors} {row.kind}{'s' * (row.tensors > 1)}",
            f"{row.ours:.1e}",
            "reference" if row.scope == WHOLE else f"{row.eager:.1e}",
            row.worst,
            "right" if row.passed else "WRONG",
        )
        for row in rows
    ]
    print(format_table(header, cells))
    return rows


def _segnet(
    train: Digits, held_out: Digits, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results for results.json, and figures by file name."""
    torch.manual_seed(settings.segnet.seed)
    model, report = optimize(SegNet(NUM_CLASSES))
    print(f"{len(report.fused)} layers optimized, {len(report.skipped)} left alone")
    history = train_segnet(
        model, train, held_out, settings.segnet, num_classes=NUM_CLASSES, progress=True
    )
    model.eval()
    predicted = predict_masks(model, held_out.images)
    shares = class_iou(confusion_matrix(predicted, held_out.masks, NUM_CLASSES))
    print(
        f"held-out mean IoU {history.last['mean_iou']:.3f} over {NUM_CLASSES} classes, "
        f"pixel accuracy {history.last['pixel_accuracy']:.3f}, {history.seconds:.0f} s"
    )
    epoch_steps = -(-len(train) // settings.segnet.batch_size)
    figures = {
        "segnet_predictions.png": pictures.segnet_predictions(held_out, predicted, history.last),
        "learning_curve.png": pictures.learning_curve(history, shares.nan_to_num(), epoch_steps),
    }
    results = {
        **history.last,
        "class_iou": shares.nan_to_num().tolist(),
        "train_images": len(train),
        "held_out_images": len(held_out),
        "recipe": asdict(settings.segnet),
        "final_activation": True,
        "seconds": history.seconds,
    }
    return results, figures


def _pose(photograph: Photograph, settings: Settings) -> tuple[dict[str, Any], Any]:
    """Results for results.json, and the figure."""
    size = settings.pose_size
    recipe = settings.pose
    torch.manual_seed(recipe.seed)
    model, report = optimize(
        initialise(CPM2DPose(len(PORTRAIT), all_stages=True, width=settings.pose_width))
    )
    print(f"{len(report.fused)} layers optimized, {len(report.skipped)} left alone")

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, joints = photograph.sample(count, size, generator)
        return normalised(images), joints

    # Seeds that training never uses: warps that were not trained on.
    images, joints = photograph.sample(
        16, size, torch.Generator().manual_seed(recipe.seed + 10_000)
    )
    visible = ((joints >= 0) & (joints <= size - 1)).all(dim=-1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = torch.cat(
            [predict_joints(model, part) for part in torch.split(normalised(images), 4)]
        )
        return {"error in pixels": mean_joint_error(found, joints, visible)}

    history = train_pose_machine(model, sample, recipe, evaluate=evaluate, progress=True)
    model.eval()
    # Three looks at it: as photographed, and turned to either side within the range of training.
    angle = torch.tensor([0.0, -20.0, 20.0]) * math.pi / 180
    zoom, shift = (
        torch.tensor([1.0, 0.9, 1.15]),
        torch.tensor([[0.0, 0.0], [0.04, 0.05], [-0.03, 0.02]]),
    )
    shown, true = photograph.warp(size, angle=angle, zoom=zoom, shift=shift)
    with torch.no_grad():
        stages = model(normalised(shown))
        found = torch.cat(
            [predict_joints(model, part) for part in torch.split(normalised(images), 4)]
        )
    head = (PORTRAIT.index("head_top"), PORTRAIT.index("chin"))
    length = torch.linalg.vector_norm(joints[:, head[0]] - joints[:, head[1]], dim=-1)
    correct = percentage_correct(found, joints, length, 0.2, visible)
    error = history.last["error in pixels"]
    print(
        f"{len(images)} fresh warps of the photograph it was trained on (nobody else): mean error "
        f"{error:.1f} of {size} pixels, {correct:.0%} of landmarks within a fifth of the head's "
        f"length, {history.seconds:.0f} s"
    )
    figure = pictures.pose_heatmaps(
        shown,
        true,
        predict_joints(lambda _: stages, shown),  # type: ignore[arg-type]
        stages,
        PORTRAIT,
        f"Trained for {recipe.steps} steps on random warps of this one photograph, shown on warps "
        f"of it not trained on: mean error {error:.1f} of {size} pixels. It has seen nobody else.",
    )
    results = {
        "mean_joint_error_pixels": error,
        "image_size": size,
        "pck_head_0.2": correct,
        "evaluated_on": "fresh similarity warps of the one training photograph",
        "recipe": asdict(recipe),
        "width": settings.pose_width,
        "seconds": history.seconds,
    }
    return results, figure


def _measure(settings: Settings) -> tuple[list[TimingRow], list[MemoryRow]]:
    segnet, pose = segnet_workload(), pose_workload(settings.timed_size, settings.pose_width)
    timings = [
        *time_workload(segnet, seconds=settings.timing_seconds, least_rounds=5),
        *time_workload(pose, seconds=settings.timing_seconds, least_rounds=4),
    ]
    # In a batch, as in training: for one image the weights outweigh the activations.
    batch = pose_workload(settings.timed_size, settings.pose_width, batch=4)
    memory = [measure_memory(segnet), measure_memory(batch)]
    header = ("model", "operation", *IMPLEMENTATIONS, "ratio")
    cells = [
        (
            row.workload,
            row.operation,
            *(f"{row.milliseconds[name]:.2f} ms" for name in IMPLEMENTATIONS),
            f"{row.ratio:.2f}",
        )
        for row in timings
    ]
    cells += [
        (
            row.workload,
            "step, peak memory",
            *(f"{row.bytes[name] / 2**20:.1f} MiB" for name in IMPLEMENTATIONS),
            f"{row.ratio:.2f}",
        )
        for row in memory
    ]
    print(format_table(header, cells))
    print("ratio: ours to the better of the two; a training step is forward, loss and backward")
    return timings, memory
