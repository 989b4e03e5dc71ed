# SPDX-License-Identifier: BSD-3-Clause
"""Types of the module built from csrc/calls.cpp."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

def layouts(tensors: tuple[Any, ...]) -> bytes | None: ...
def run(
    entry: int,
    handle: int,
    allocate: tuple[Callable[[], Tensor], ...],
    given: tuple[Any, ...],
) -> list[Tensor] | None: ...

# Of csrc/cpu/sequence_entry.h.
ENTRY_VERSION: int
