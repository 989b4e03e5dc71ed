# SPDX-License-Identifier: BSD-3-Clause
"""A guard against getting slower: ratios to torch eager, stored for each instruction set.

Times differ between machines of one kind, and from day to day; the ratio to torch eager on the
same machine in the same minute hardly does. A run is compared with the stored ratios, and what has
lost more than the noise is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .contenders import Contender
from .results import OURS, CaseResult
from .statistics import Estimate

__all__ = [
    "Loss",
    "contenders_of_gate",
    "find_losses",
    "load_ratios",
    "ratios_path",
    "store_ratios",
]

LEAST_LOSS = 0.1
"""Losses below this share are not told from noise, however narrow the intervals."""

_CONTENDERS = (OURS, "eager", "eager-cl")


@dataclass(frozen=True)
class Loss:
    """A case whose ratio to torch eager has fallen."""

    case: str
    before: Estimate
    now: Estimate

    @property
    def share(self) -> float:
        """How much of the former ratio is lost."""
        return 1 - self.now.value / self.before.value

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.now.value:.2f}x torch eager, was {self.before.value:.2f}x, "
            f"{self.share:.0%} lost"
        )


def ratios_path(isa: str | None, threads: int) -> Path:
    """The table for an instruction set and a number of threads."""
    return Path(__file__).parent / "ratios" / f"{isa or 'aten'}-{threads}.json"


def contenders_of_gate(contenders: Iterable[Contender]) -> list[Contender]:
    """Those that the gate needs."""
    return [contender for contender in contenders if contender.name in _CONTENDERS]


def load_ratios(path: Path) -> dict[str, Estimate]:
    """Ratios to torch eager by the id of the case.

    Raises:
        FileNotFoundError: if none were stored for this instruction set and number of threads.
    """
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {case: Estimate(**ratio) for case, ratio in data["ratios"].items()}


def store_ratios(path: Path, results: Iterable[CaseResult], about: str) -> int:
    """Write the ratios of a run, in place of those of the same cases; the number written."""
    ratios = load_ratios(path) if path.exists() else {}
    new = {case.id: ratio for case in results if (ratio := case.ratio_to_eager) is not None}
    rounded = {
        case: {key: round(value, 4) for key, value in asdict(ratio).items()}
        for case, ratio in sorted((ratios | new).items())
    }
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"about": about, "ratios": rounded}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return len(new)


def find_losses(
    results: Iterable[CaseResult], ratios: dict[str, Estimate], *, least: float = LEAST_LOSS
) -> list[Loss]:
    """Cases that lost more than `least` and more than both intervals explain, worst first."""
    losses = []
    for case in results:
        now, before = case.ratio_to_eager, ratios.get(case.id)
        if now is None or before is None:
            continue
        loss = Loss(case.id, before, now)
        if loss.share > max(least, before.relative_width + now.relative_width):
            losses.append(loss)
    return sorted(losses, key=lambda loss: loss.share, reverse=True)
