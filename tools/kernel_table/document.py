# SPDX-License-Identifier: BSD-3-Clause
"""The table of docs/kernels.md, between two marks; the words around it are written by hand."""

from __future__ import annotations

from typing import Any

from segpose_kernels.kernel_facts import COLUMNS, value_of

BEGIN, END = "<!-- table begins -->", "<!-- table ends -->"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def rewrite(text: str, table: dict[str, Any]) -> str:
    """`text` with the lines between the marks made from the table."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    blocks = []
    for backend, entry in table.items():
        lines = [f"### {backend} ({entry['compiler']})", ""]
        lines.append("| " + " | ".join(title for title, _ in COLUMNS) + " |")
        lines.append("|---|---|" + "---:|" * (len(COLUMNS) - 2))
        for row in entry["kernels"]:
            cells = [_cell(value_of(row, path)) for _, path in COLUMNS]
            lines.append("| " + " | ".join(cells) + " |")
        notes: dict[str, list[str]] = {}
        for row in entry["kernels"]:
            if row["note"]:
                notes.setdefault(row["note"], []).append(f"`{row['name']}`")
        lines.append("")
        lines += [f"- {', '.join(dict.fromkeys(n))}: {note}." for note, n in notes.items()]
        blocks.append("\n".join(lines))
    return before + BEGIN + "\n\n" + "\n\n".join(blocks) + "\n\n" + END + after
