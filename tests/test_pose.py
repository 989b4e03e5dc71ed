# SPDX-License-Identifier: BSD-3-Clause
"""Joints, heatmaps, skeletons and pose metrics."""

from __future__ import annotations

import math

import pytest
import torch

from segpose_kernels.pose import (
    BODY_14,
    HAND_21,
    Skeleton,
    heatmaps_to_joints,
    joints_to_heatmaps,
    mean_joint_error,
    percentage_correct,
    percentage_correct_per_joint,
)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_joints_survive_the_round_trip(sigma: float) -> None:
    joints = 12 + torch.rand(5, 14, 2, dtype=torch.float64) * torch.tensor([168.0, 104.0])
    heatmaps = joints_to_heatmaps(joints, (128, 192), sigma=sigma)
    assert heatmaps.shape == (5, 14, 16, 24)
    found, scores = heatmaps_to_joints(heatmaps)
    torch.testing.assert_close(found, joints)
    assert ((scores > math.exp(-0.25 / sigma**2)) & (scores <= 1)).all()


def test_without_refinement_joints_are_cell_centres() -> None:
    joints = torch.tensor([[[40.0, 17.0]]])
    found, _ = heatmaps_to_joints(joints_to_heatmaps(joints, (64, 64)), refine=False)
    # Cell 5 reaches from pixel 40 to 47 and is centred on 43.5; cell 2 from 16 to 23.
    assert found.tolist() == [[[43.5, 19.5]]]


def test_refinement_leaves_borders_and_empty_maps_alone() -> None:
    heatmaps = torch.zeros(1, 3, 4, 4)
    heatmaps[0, 0, 0, 0] = 1  # a corner
    heatmaps[0, 1] = -1
    heatmaps[0, 1, 2, 2] = -0.5  # no positive peak
    heatmaps[0, 2, 1, 2] = 1  # a lone spike
    found, scores = heatmaps_to_joints(heatmaps, stride=1)
    assert found.tolist() == [[[0, 0], [2, 2], [2, 1]]]
    assert scores.tolist() == [[1, -0.5, 1]]


def test_refinement_bears_values_without_a_logarithm() -> None:
    heatmaps = torch.randn(4, 21, 9, 7)
    found, _ = heatmaps_to_joints(heatmaps, stride=1)
    coarse, _ = heatmaps_to_joints(heatmaps, stride=1, refine=False)
    assert torch.isfinite(found).all()
    assert ((found - coarse).abs() <= 0.5).all()


def test_invisible_joints_have_empty_heatmaps() -> None:
    visible = torch.tensor([[True, False]])
    heatmaps = joints_to_heatmaps(torch.full((1, 2, 2), 20.0), (64, 64), visible=visible)
    assert heatmaps[0, 0].max() > 0.5
    assert heatmaps[0, 1].abs().max() == 0


def test_heatmaps_reject_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"joints must have shape \[N, J, 2\], got \[3, 2\]"):
        joints_to_heatmaps(torch.zeros(3, 2), (8, 8))
    with pytest.raises(ValueError, match="sigma and stride must be above 0"):
        joints_to_heatmaps(torch.zeros(1, 3, 2), (8, 8), sigma=0)
    with pytest.raises(ValueError, match=r"heatmaps must have shape \[N, J, H, W\]"):
        heatmaps_to_joints(torch.zeros(1, 3, 0, 4))


@pytest.mark.parametrize(("skeleton", "joints", "limbs"), [(BODY_14, 14, 14), (HAND_21, 21, 20)])
def test_skeletons_are_connected(skeleton: Skeleton, joints: int, limbs: int) -> None:
    assert len(skeleton) == joints
    assert len(skeleton.edges) == limbs
    reached = {0}
    for _ in range(joints):
        reached |= {b for a, b in skeleton.edges if a in reached}
        reached |= {a for a, b in skeleton.edges if b in reached}
    assert reached == set(range(joints))
    assert [skeleton.mirror[j] for j in skeleton.mirror] == list(range(joints))


def test_body_has_the_lectures_joints() -> None:
    parts = {name.removeprefix("left_").removeprefix("right_") for name in BODY_14.joints}
    assert parts == {"foot", "knee", "hip", "shoulder", "elbow", "hand", "neck", "head_top"}


def test_skeleton_rejects_unknown_joints() -> None:
    with pytest.raises(ValueError, match=r"unknown joints: \['b'\]"):
        Skeleton("bad", ("a",), (("a", "b"),))
    with pytest.raises(ValueError, match="names a joint twice"):
        Skeleton("bad", ("a", "a"), ())


def test_metrics_on_known_distances() -> None:
    true = torch.zeros(2, 3, 2)
    predicted = torch.zeros(2, 3, 2)
    predicted[0, 0] = torch.tensor([3.0, 4.0])  # 5 pixels off
    predicted[1, 1] = torch.tensor([0.0, 1.0])
    assert mean_joint_error(predicted, true) == pytest.approx(1.0)
    per_joint = percentage_correct_per_joint(predicted, true, 10.0, threshold=0.2)
    assert per_joint.tolist() == [0.5, 1, 1]
    # With a longer reference in the first image, its joint is near enough.
    lengths = torch.tensor([25.0, 10.0])
    assert percentage_correct(predicted, true, lengths, threshold=0.2) == 1
    assert percentage_correct(predicted, true, 10.0, threshold=0.05) == pytest.approx(2 / 3)

    visible = torch.ones(2, 3, dtype=torch.bool)
    visible[0, 0] = False
    assert mean_joint_error(predicted, true, visible) == pytest.approx(0.2)
    assert percentage_correct(predicted, true, 10.0, visible=visible) == 1
    visible[1, 0] = False
    assert percentage_correct_per_joint(predicted, true, 10.0, visible=visible)[0].isnan()
    with pytest.raises(ValueError, match=r"must both be \[N, J, 2\], got \[2, 3\] and \[2, 3\]"):
        mean_joint_error(torch.zeros(2, 3), torch.zeros(2, 3))
