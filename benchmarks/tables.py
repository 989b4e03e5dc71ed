# SPDX-License-Identifier: BSD-3-Clause
"""The parameters of the benchmark files: cases by group, and the names of all contenders."""

from __future__ import annotations

from typing import Any

import pytest

from segpose_kernels.bench.catalogue import CASES
from segpose_kernels.bench.contenders import CONTENDERS

__all__ = ["each_case"]

_NAMES = list(dict.fromkeys(contender.name for contender in CONTENDERS))


def each_case(*groups: str) -> Any:
    """Parametrises a test over the cases of the groups, each with every contender."""
    cases = [case for case in CASES if case.group in groups and case.tier != "extra"]

    def decorate(test: Any) -> Any:
        by_contender = pytest.mark.parametrize("contender", _NAMES)
        by_case = pytest.mark.parametrize("case", cases, indirect=True, ids=str)
        return by_contender(by_case(test))

    return decorate
