# SPDX-License-Identifier: BSD-3-Clause
"""The command line: `python -m segpose_kernels COMMAND ...`, also installed as `segpose`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from . import __version__
from .cli import LineParser, UsageError
from .extras import MissingExtraError

PROGRAM = "segpose"


@dataclass(frozen=True)
class Command:
    """A subcommand; `module` has `main(argv) -> exit code` and is imported when it is called."""

    summary: str
    module: str


COMMANDS = {
    "bench": Command("speed and memory beside every alternative on this machine", ".bench.run"),
    "demo": Command("the main job on real images, with pictures and timings", ".demo.run"),
    "info": Command("versions, instruction sets, and which backends run here", ".info"),
    "kernels": Command(
        "registers, shared memory and counted accesses of GPU kernels", ".kernel_facts"
    ),
    "tune": Command("measure tiles or algorithms for a model's layers, and keep the best", ".tune"),
}


def _parser() -> LineParser:
    listing = "\n".join(f"  {name:<8}{command.summary}" for name, command in COMMANDS.items())
    parser = LineParser(
        prog=PROGRAM,
        description="Fused convolution and transposed convolution + bias + activation for torch.",
        epilog=f"commands:\n{listing}\n\n'{PROGRAM} COMMAND --help' describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"segpose_kernels {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 fine, 1 the command failed, 2 bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        module = importlib.import_module(COMMANDS[arguments.command].module, __package__)
        code: int = module.main(arguments.arguments)
        return code
    except UsageError as error:
        print(f"{PROGRAM} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except MissingExtraError as error:
        print(f"{PROGRAM} {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM} {arguments.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
