# SPDX-License-Identifier: BSD-3-Clause
"""Counts of the operators a computation really runs, those called inside other operators included.

A TorchDispatchMode sees only the outermost call: it is switched off while a kernel runs, so a C++
operator that hands its work to aten would look clean. The profiler's hooks sit in the dispatcher
itself and see every call at any depth and on any thread.
"""

from __future__ import annotations

import re
from collections import Counter
from types import TracebackType

from torch.profiler import ProfilerActivity, profile

__all__ = ["OperatorCounter"]

# Convolutions under any of torch's names, the products they can be turned into, and separate
# activations.
_ATEN_COMPUTE = re.compile(
    r"^aten::("
    r"\w*conv\w*|thnn_\w+|im2col\w*|col2im\w*"
    r"|mm|bmm|addmm|addbmm|baddbmm|matmul|linear|einsum|tensordot"
    r"|relu\w*|leaky_relu\w*|threshold\w*|clamp_min\w*|where"
    r")$"
)


class OperatorCounter:
    """Context manager: `counts` holds calls by operator name, e.g. "aten::convolution", after the
    block.

    Do not nest it in another profiler: torch runs one at a time.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._profile: profile | None = None

    def __enter__(self) -> OperatorCounter:
        self._profile = profile(activities=[ProfilerActivity.CPU], acc_events=False)
        self._profile.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._profile is not None
        self._profile.stop()
        # The raw events: building the aggregated ones takes longer than a small convolution.
        inner = self._profile.profiler
        assert inner is not None
        assert inner.kineto_results is not None
        self.counts.update(event.name() for event in inner.kineto_results.events())
        self._profile = None

    @property
    def aten_compute(self) -> dict[str, int]:
        """Calls of aten operators that do a part of the fused operators' work; must be empty."""
        return {name: n for name, n in self.counts.items() if _ATEN_COMPUTE.match(name)}

    def of(self, prefix: str) -> dict[str, int]:
        """Calls of operators whose name begins with `prefix`, e.g. "segpose::"."""
        return {name: n for name, n in self.counts.items() if name.startswith(prefix)}
