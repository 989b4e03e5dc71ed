# SPDX-License-Identifier: BSD-3-Clause
"""What the commands of `segpose` share: a parser whose complaints are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UsageError(Exception):
    """Input that parsed but cannot be used; reported in one line, with exit code 2."""


class LineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line on stderr; the exit code stays argparse's 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage and exit."""
        self.exit(2, f"{self.prog}: error: {message}\n")
