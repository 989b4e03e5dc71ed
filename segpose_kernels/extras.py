# SPDX-License-Identifier: BSD-3-Clause
"""Packages that only some parts need, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says how to get it."""


def import_extra(module: str, extra: str = "demo") -> ModuleType:
    """Import `module`, or raise MissingExtraError naming the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = error.name or module
        raise MissingExtraError(
            f"{package} is not installed; get it with: pip install segpose_kernels[{extra}]"
        ) from error
