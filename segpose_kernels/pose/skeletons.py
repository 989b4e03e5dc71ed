# SPDX-License-Identifier: BSD-3-Clause
"""Skeletons: which joint is which number, and which pairs a limb connects."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Skeleton:
    """Joints by name and limbs by name.

    Attributes:
        name: what the skeleton is of.
        joints: J names; a joint's index is its channel in heatmaps and its row in [N, J, 2]
            coordinates.
        limbs: pairs of names.

    Raises:
        ValueError: for a joint named twice or a limb between joints that do not exist.
    """

    name: str
    joints: tuple[str, ...]
    limbs: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        if len(set(self.joints)) != len(self.joints):
            raise ValueError(f"skeleton {self.name!r} names a joint twice: {self.joints}")
        unknown = {joint for limb in self.limbs for joint in limb} - set(self.joints)
        if unknown:
            raise ValueError(
                f"limbs of skeleton {self.name!r} name unknown joints: {sorted(unknown)}"
            )

    def __len__(self) -> int:
        return len(self.joints)

    def index(self, joint: str) -> int:
        """Index of a joint; ValueError if there is none of that name."""
        return self.joints.index(joint)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Limbs as pairs of joint indices."""
        return tuple((self.index(a), self.index(b)) for a, b in self.limbs)

    @property
    def mirror(self) -> tuple[int, ...]:
        """Indices that rename left to right and back: `joints[:, mirror]` after a flip."""

        def mirrored(joint: str) -> str:
            if joint.startswith("left_"):
                return "right_" + joint.removeprefix("left_")
            if joint.startswith("right_"):
                return "left_" + joint.removeprefix("right_")
            return joint

        return tuple(self.index(mirrored(joint)) for joint in self.joints)


def _body() -> Skeleton:
    parts = ("foot", "knee", "hip", "shoulder", "elbow", "hand")
    joints = [f"{side}_{part}" for part in parts for side in ("left", "right")] + [
        "neck",
        "head_top",
    ]
    limbs = [("head_top", "neck"), ("left_hip", "right_hip")]
    for side in ("left", "right"):
        chain = ["neck", f"{side}_shoulder", f"{side}_elbow", f"{side}_hand"]
        limbs += pairwise(chain)
        chain = [f"{side}_shoulder", f"{side}_hip", f"{side}_knee", f"{side}_foot"]
        limbs += pairwise(chain)
    return Skeleton("body", tuple(joints), tuple(limbs))


def _hand() -> Skeleton:
    joints = ["wrist"]
    limbs: list[tuple[str, str]] = []
    segments = {
        "thumb": ("cmc", "mcp", "ip", "tip"),
        "index": ("mcp", "pip", "dip", "tip"),
        "middle": ("mcp", "pip", "dip", "tip"),
        "ring": ("mcp", "pip", "dip", "tip"),
        "little": ("mcp", "pip", "dip", "tip"),
    }
    for finger, names in segments.items():
        chain = ["wrist", *(f"{finger}_{name}" for name in names)]
        joints += chain[1:]
        limbs += pairwise(chain)
    return Skeleton("hand", tuple(joints), tuple(limbs))


BODY_14 = _body()
"""The lecture's body: left/right foot, knee, hip, shoulder, elbow, hand; neck; head top."""

HAND_21 = _hand()
"""A hand: the wrist and four joints of each finger, from the palm outward."""
