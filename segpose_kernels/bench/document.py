# SPDX-License-Identifier: BSD-3-Clause
"""A report as a list of blocks, and its two forms: Markdown for GitHub, and one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "Heading", "Picture", "Table", "Text", "to_html", "to_markdown"]


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the document's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list of short lines."""

    text: str = ""
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first `labels` columns are words, the others numbers.

    A cell between asterisks is set in bold.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


@dataclass(frozen=True)
class Picture:
    """An SVG in two versions: `<name>-light.svg` and `<name>-dark.svg`, for such pages."""

    name: str
    alt: str


Block = Heading | Text | Table | Picture


def to_markdown(blocks: Sequence[Block], *, pictures: str = "plots") -> str:
    """Markdown; `pictures` is the folder of the pictures as seen from the file."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            lines = [block.text] if block.text else []
            parts.append("\n".join(lines + [f"- {item}" for item in block.items]))
        elif isinstance(block, Table):
            parts.append(_markdown_table(block))
        else:
            parts.append(
                "<picture>\n"
                f'  <source media="(prefers-color-scheme: dark)" '
                f'srcset="{pictures}/{block.name}-dark.svg">\n'
                f'  <img alt="{html.escape(block.alt)}" '
                f'src="{pictures}/{block.name}-light.svg">\n'
                "</picture>"
            )
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---" if i < table.labels else "---:" for i in range(len(table.header))]
    rows = [[_bold(cell, "**", "**") for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.header, rule, *rows))


def _bold(cell: str, before: str, after: str) -> str:
    if len(cell) > 2 and cell.startswith("*") and cell.endswith("*"):
        return f"{before}{cell[1:-1]}{after}"
    return cell


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --grey: #656d76; --rule: #d8dee4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --grey: #8d96a0; --rule: #30363d; }
}
html { background: Canvas; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { color: var(--grey); font-weight: 600; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right;
         white-space: nowrap; }
.label { text-align: left; }
img { max-width: 100%; }
li { color: var(--grey); }
"""


def to_html(blocks: Sequence[Block], *, title: str, folder: Path) -> str:
    """One file without references to others: the pictures in `folder` are put into it."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
        elif isinstance(block, Text):
            if block.text:
                parts.append(f"<p>{html.escape(block.text)}</p>")
            if block.items:
                items = "".join(f"<li>{html.escape(item)}</li>" for item in block.items)
                parts.append(f"<ul>{items}</ul>")
        elif isinstance(block, Table):
            parts.append(_html_table(block))
        else:
            dark, light = (
                _data_url(folder / f"{block.name}-{theme}.svg") for theme in ("dark", "light")
            )
            parts.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
                f'<img alt="{html.escape(block.alt)}" src="{light}"></picture>'
            )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _data_url(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=label' if i < table.labels else ''}>"
            f"{_bold(html.escape(cell), '<b>', '</b>')}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    head = f"<thead><tr>{row(table.header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'
