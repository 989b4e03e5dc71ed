# SPDX-License-Identifier: BSD-3-Clause
"""One case from start to end: prepare the contenders, check what they compute, time those right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..testing.memory import peak_allocated_bytes
from ..testing.numerics import relative_l2
from .cases import Case, dtype_name
from .contenders import Contender, Prepared, Unavailable
from .limits import Limits
from .results import OURS, CaseResult, Measurement
from .statistics import paired_ratio
from .subjects import results_of
from .timing import Clock, Effort, clock_for, take_turns

__all__ = ["Options", "WrongResult", "measure_case"]

# Above this many operations a float64 reference takes too long; torch eager in float32 serves then.
_LARGEST_FLOAT64_REFERENCE = {"cpu": 3e11, "cuda": 3e13}

# Largest relative L2 errors of results that are timed: of a layer's output and gradients, of a
# model's output and gradients. Errors add up over a model's layers; and where rounding decides on
# which side of zero an activation lies, all of a gradient that passes there is at stake.
_ALLOWED = {
    torch.float32: (1e-5, 1e-5, 1e-4, 5e-2),
    torch.bfloat16: (1e-2, 1e-1, 1e-1, 7e-1),
    torch.float16: (2e-3, 2e-2, 2e-2, 2e-1),
}


# On CUDA torch computes float32 convolutions in TF32, with 10 bits behind the point, by default;
# Triton's kernels cut the others off where cuDNN's round.
_ALLOWED_TF32 = (2e-3, 3e-2, 3e-2, 2e-1)


class WrongResult(Exception):  # noqa: N818 - reads as what it is
    """This package computed something else than the reference."""


@dataclass(frozen=True)
class Options:
    """How cases are measured.

    Attributes:
        contenders: who takes part, in the order of columns.
        device: "cpu" or "cuda".
        threads: of every contender.
        evict: bytes of other memory touched before each call; 0 leaves the CPU's caches warm.
        memory: whether to measure peak memory too.
        limits: of the machine, to compare times with.
    """

    contenders: Sequence[Contender]
    device: str = "cpu"
    threads: int = 1
    effort: Effort = field(default_factory=Effort)
    evict: int = 0
    memory: bool = True
    limits: Limits | None = None

    def settings(self) -> dict[str, Any]:
        """Plain data for a report."""
        effort = asdict(self.effort)
        return {
            "device": self.device,
            "threads": self.threads,
            "effort": effort,
            "evict_bytes": self.evict,
            "contenders": [c.name for c in self.contenders],
        }


def measure_case(case: Case, options: Options) -> CaseResult:
    """Check and time every contender on a case.

    A peer that cannot take part, or whose result is wrong, is left out with its reason.

    Raises:
        WrongResult: if this package's own result is wrong.
    """
    try:
        return _measure(case, options)
    finally:
        case.forget()


def _measure(case: Case, options: Options) -> CaseResult:
    reference, origin = _reference(case, options.device)
    ready: dict[str, Prepared] = {}
    about: dict[str, tuple[float, float]] = {}
    absent: dict[str, str] = {}
    for contender in options.contenders:
        if case.contenders and contender.name not in case.contenders:
            continue
        start = time.perf_counter()
        try:
            prepared = contender.prepare(case, options.device, options.threads)
            error = _check(case, prepared, reference, options.device)
            about[contender.name] = error, time.perf_counter() - start
        except Unavailable as reason:
            absent[contender.name] = str(reason)
        except WrongResult as wrong:
            if contender.ours:
                raise WrongResult(f"{contender.name} on {case}: {wrong}") from None
            absent[contender.name] = f"wrong result: {wrong}"
        except Exception as failure:  # a peer's failure is a finding about the peer
            if contender.ours:
                raise
            absent[contender.name] = f"{type(failure).__name__}: {_first_line(failure)}"
        else:
            ready[contender.name] = prepared
    del reference
    measurements = _timed(case, options, ready, about)
    floor = None
    if options.limits is not None:
        floor = options.limits.floor(dtype_name(case.dtype), case.flops, case.bytes)
    return CaseResult.of(case, measurements, absent, reference=origin, floor=floor)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")[:200]


def _reference(case: Case, device: str) -> tuple[dict[str, Tensor], str]:
    """Expected results by name, and how they were computed."""
    double = case.flops <= _LARGEST_FLOAT64_REFERENCE[device]
    dtype = torch.float64 if double else torch.float32
    origin = "float64" if double else "torch eager, float32"
    subject = case.subject if device == "cpu" else case.subject.to(device)
    return results_of(subject, training=case.training, dtype=dtype), origin


def _check(case: Case, prepared: Prepared, reference: Mapping[str, Tensor], device: str) -> float:
    """The largest relative L2 error over all results; raises WrongResult above the limit."""
    first = 2 * (case.spec is None)
    tf32 = device == "cuda" and case.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    of_output, of_gradient = (_ALLOWED_TF32 if tf32 else _ALLOWED[case.dtype])[first : first + 2]
    results = prepared.results()
    if missing := reference.keys() - results.keys():
        raise WrongResult(f"no result {sorted(missing)}")
    errors = {}
    for name, expected in reference.items():
        found = results[name].to(expected.device, torch.float64)
        if found.shape != expected.shape:
            raise WrongResult(f"{name} is {list(found.shape)}, expected {list(expected.shape)}")
        allowed = of_output if name == "output" else of_gradient
        error = relative_l2(found, expected)
        if not error <= allowed:  # NaN is wrong too
            raise WrongResult(f"{name} has relative L2 error {error:.1e}, allowed {allowed:.0e}")
        errors[name] = error
    return max(errors.values())


def _timed(
    case: Case,
    options: Options,
    ready: Mapping[str, Prepared],
    about: Mapping[str, tuple[float, float]],  # error, seconds until ready
) -> list[Measurement]:
    ours = {c.name for c in options.contenders if c.ours}

    def interval(seconds: Mapping[str, list[float]]) -> float:
        """Width of the ratio to the fastest peer."""
        peers = {n: values for n, values in seconds.items() if n not in ours}
        if OURS not in seconds or not peers:
            return float("inf")
        fastest = min(peers, key=lambda name: statistics.median(peers[name]))
        return paired_ratio(peers[fastest], seconds[OURS]).relative_width

    layer = case.spec is not None
    clock: Clock = clock_for(options.device, evict=options.evict, hide_launches=layer)
    calls = {name: prepared.call for name, prepared in ready.items()}
    samples = take_turns(calls, clock, options.effort, keep={OURS}, interval=interval)
    return [
        Measurement(
            name,
            name in ours,
            samples[name].seconds,
            samples[name].calls,
            *about[name],
            _peak(prepared.memory_call, options) if options.memory else None,
        )
        for name, prepared in ready.items()
    ]


def _peak(call: Callable[[], object] | None, options: Options) -> int | None:
    if call is None:
        return None
    if options.device == "cpu":
        return peak_allocated_bytes(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
