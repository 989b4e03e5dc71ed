# SPDX-License-Identifier: BSD-3-Clause
"""Results as plain data: what was measured, by whom, and the ratios that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case, dtype_name
from .statistics import Estimate, geometric_mean, median_of, paired_ratio

__all__ = ["NOISY", "CaseResult", "Measurement", "Run", "Summary", "summarise"]

OURS = "segpose"
OUR_GRAPH = "segpose-graph"
# Peers that replay a CUDA graph.
_GRAPHED = frozenset({"eager-graph", "max-autotune"})
EAGER = ("eager", "eager-cl")

NOISY = 0.1
"""A ratio whose interval is wider than this share of it, to either side, is marked as noisy."""


@dataclass(frozen=True)
class Measurement:
    """One contender on one case.

    Attributes:
        ours: whether it is this package; the others are peers.
        samples: seconds a call, one a round; round i of all contenders of a case lie together.
            Those far behind take part in the first rounds only.
        calls: calls that a sample is the mean of.
        error: largest relative L2 error over all results, against the reference.
        ready_seconds: what it took to build, convert, compile or pack, up to the first result.
        peak_bytes: most memory that a call holds beyond model, gradients of parameters and input,
            as torch's allocator sees it; None where the contender has an allocator of its own.
    """

    contender: str
    ours: bool
    samples: list[float]
    calls: int
    error: float
    ready_seconds: float
    peak_bytes: int | None = None

    @property
    def time(self) -> Estimate:
        """Seconds a call."""
        return median_of(self.samples)


@dataclass(frozen=True)
class CaseResult:
    """One case: the measurements, and why a contender has none.

    `floor` is the time in seconds that the machine's own limits allow a direct computation, if they
    were measured.
    """

    name: str
    group: str
    mode: str
    dtype: str
    batch: int
    flops: float
    bytes: float | None
    note: str
    sweep: tuple[str, int] | None
    reference: str
    measurements: dict[str, Measurement]
    absent: dict[str, str]
    floor: float | None = None

    @classmethod
    def of(
        cls,
        case: Case,
        measurements: Iterable[Measurement],
        absent: dict[str, str],
        *,
        reference: str,
        floor: float | None = None,
    ) -> CaseResult:
        return cls(
            case.name,
            case.group,
            case.mode,
            dtype_name(case.dtype),
            case.input_shape[0],
            case.flops,
            case.bytes,
            case.note,
            case.sweep,
            reference,
            {m.contender: m for m in measurements},
            absent,
            floor,
        )

    @property
    def id(self) -> str:
        return f"{self.name} {self.dtype} {self.mode}"

    @property
    def ours(self) -> Measurement | None:
        """This package in the form the ratios are taken of."""
        return self.measurements.get(OURS)

    @property
    def fastest_peer(self) -> Measurement | None:
        peers = [m for m in self.measurements.values() if not m.ours]
        return min(peers, key=lambda m: m.time.value, default=None)

    @property
    def fastest_eager(self) -> Measurement | None:
        eager = [self.measurements[name] for name in EAGER if name in self.measurements]
        return min(eager, key=lambda m: m.time.value, default=None)

    def ratio_to(self, peer: Measurement | None) -> Estimate | None:
        """How many times faster this package is than `peer`; below 1 it loses."""
        ours = self.ours_against(peer)
        if ours is None or peer is None:
            return None
        return paired_ratio(peer.samples, ours.samples)

    def ours_against(self, peer: Measurement | None) -> Measurement | None:
        """What a ratio to `peer` is taken of: replayed graphs are compared with each other."""
        if peer is not None and peer.contender in _GRAPHED and OUR_GRAPH in self.measurements:
            return self.measurements[OUR_GRAPH]
        return self.ours

    @property
    def ratio(self) -> Estimate | None:
        """How many times faster than the fastest peer."""
        return self.ratio_to(self.fastest_peer)

    @property
    def ratio_to_eager(self) -> Estimate | None:
        """How many times faster than torch eager in the better memory format."""
        return self.ratio_to(self.fastest_eager)

    @property
    def noisy(self) -> bool:
        """Whether the ratio is not known to 10%."""
        ratio = self.ratio
        return ratio is not None and ratio.relative_width > NOISY


@dataclass
class Run:
    """All of one run; `machine` and `settings` say where and how.

    `limits` holds what the machine was measured to do at most, see `limits.measure`.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    limits: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Run:
        """From a file that `save` or pytest-benchmark has written.

        Raises:
            ValueError: if it is neither.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if "benchmarks" in data:
                return cls._from_pytest_benchmark(data)
            cases = [_case_from_dict(case, case["measurements"]) for case in data["cases"]]
            return cls(data["machine"], data["settings"], cases, data["limits"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no results of segpose bench: {error!r}") from error

    @classmethod
    def _from_pytest_benchmark(cls, data: dict[str, Any]) -> Run:
        found = [benchmark["extra_info"]["segpose"] for benchmark in data["benchmarks"]]
        cases: dict[str, dict[str, Any]] = {}
        measurements: dict[str, dict[str, Any]] = {}
        for entry in found:
            case, measurement = entry["case"], entry["measurement"]
            key = f"{case['name']} {case['dtype']} {case['mode']}"
            cases[key] = case
            measurements.setdefault(key, {})[measurement["contender"]] = measurement
        about = data["machine_info"]["segpose"]
        results = [_case_from_dict(case, measurements[key]) for key, case in cases.items()]
        return cls(about["machine"], about["settings"], results, about["limits"])


def _case_from_dict(case: dict[str, Any], measurements: dict[str, Any]) -> CaseResult:
    values = case | {
        "sweep": case["sweep"] and tuple(case["sweep"]),
        "measurements": {name: Measurement(**m) for name, m in measurements.items()},
    }
    return CaseResult(**values)


@dataclass(frozen=True)
class Summary:
    """Ratios to the fastest peer over the cases of one group, dtype and mode."""

    group: str
    dtype: str
    mode: str
    count: int
    mean: float
    worst: float
    worst_case: str
    losses: int


def summarise(cases: Iterable[CaseResult]) -> list[Summary]:
    """Geometric means by group, dtype and mode, in order of appearance."""
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    for case in cases:
        if (ratio := case.ratio) is not None:
            groups.setdefault((case.group, case.dtype, case.mode), {})[case.name] = ratio.value
    return [
        Summary(
            *key,
            len(ratios),
            geometric_mean(ratios.values()),
            min(ratios.values()),
            min(ratios, key=ratios.__getitem__),
            sum(ratio < 1 for ratio in ratios.values()),
        )
        for key, ratios in groups.items()
    ]
