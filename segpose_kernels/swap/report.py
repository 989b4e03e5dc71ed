# SPDX-License-Identifier: BSD-3-Clause
"""What `optimize` did, one row a candidate, and the plain-text tables that reports print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .filters import FilterCache


@dataclass(frozen=True)
class SwapRow:
    """One candidate: a convolution of the model, or an activation that follows one.

    Attributes:
        name: the module's name in the model, or the forward that holds a functional activation.
        old: what stood there, such as `Conv2d + LeakyReLU`.
        new: what stands there now; equal to `old` where nothing was replaced.
        fused: False for a candidate left alone.
        reason: why it was left alone, or a remark on how it was fused.
        activation: `none`, `relu` or `leaky_relu(slope)`; empty for a convolution left alone.
        backend: the backend asked for; empty for a candidate left alone.
    """

    name: str
    old: str
    new: str
    fused: bool
    reason: str = ""
    activation: str = ""
    backend: str = ""


@dataclass
class SwapReport:
    """The rows of one `optimize` call; `str` is an aligned table.

    In inference mode `graphs` says, for the model or its parts, what runs as one graph or why it
    does not, and `prepared_bytes` how much memory packed filters take now.
    """

    rows: list[SwapRow] = field(default_factory=list)
    mode: str = "train"
    backend: str = "auto"
    memory_format: str = "preserve_format"
    memory_format_reason: str = ""
    graphs: dict[str, str] = field(default_factory=dict)
    filters: FilterCache | None = field(default=None, repr=False, compare=False)

    @property
    def prepared_bytes(self) -> int:
        """Of the filters packed for inference, now."""
        return self.filters.bytes if self.filters is not None else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SwapRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> SwapRow:
        """The row called `name`; KeyError names the rows there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; rows: {[row.name for row in self.rows]}")

    @property
    def fused(self) -> list[SwapRow]:
        """The rows that were fused."""
        return [row for row in self.rows if row.fused]

    @property
    def skipped(self) -> list[SwapRow]:
        """The rows left alone; each has a reason."""
        return [row for row in self.rows if not row.fused]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        plain = asdict(replace(self, filters=None))
        del plain["filters"]
        return {**plain, "prepared_bytes": self.prepared_bytes}

    def __str__(self) -> str:
        header = ("name", "old", "new", "activation", "backend", "note")
        cells = [
            (
                row.name,
                row.old,
                row.new if row.fused else "left alone",
                row.activation,
                row.backend,
                row.reason,
            )
            for row in self.rows
        ]
        note = f" ({self.memory_format_reason})" if self.memory_format_reason else ""
        return (
            f"{format_table(header, cells)}\n"
            f"{len(self.fused)} fused, {len(self.skipped)} left alone; mode {self.mode}; "
            f"memory format {self.memory_format}{note}"
            + "".join(f"\n{name or 'model'}: {text}" for name, text in self.graphs.items())
            + (f"\n{self.prepared_bytes / 1e6:.1f} MB of packed filters" if self.filters else "")
        )


class SwapError(RuntimeError):
    """`optimize(..., strict=True)` left a candidate alone; `report` holds the rows."""

    def __init__(self, report: SwapReport) -> None:
        reasons = "\n".join(f"  {row.name}: {row.reason}" for row in report.skipped)
        super().__init__(
            f"segpose_kernels.optimize(strict=True): {len(report.skipped)} candidate(s) cannot be "
            f"fused:\n{reasons}\nChange the model there, or call optimize with strict=False; "
            "the model is as it was before the call."
        )
        self.report = report


def format_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, a rule under the header."""
    widths = [
        max(len(header[i]), *(len(row[i]) for row in cells)) if cells else len(header[i])
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            text.ljust(width) for text, width in zip(row, widths, strict=True)
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])
