# SPDX-License-Identifier: BSD-3-Clause
"""Types of the module built from csrc/checks.cpp."""

from typing import Any

def hold(
    same: tuple[Any, ...], equal: tuple[Any, ...], values: tuple[Any, ...], answers: tuple[Any, ...]
) -> bool: ...
