"""HTML in small pieces, for the report and for notebooks: escaped text, and tables of it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from html import escape

LONG = 28
"""Length of a cell above which its column counts as text that may be broken."""


def text(value: object) -> str:
    """Escape anything for use as text in HTML.

    >>> text("a < b & 'c'")
    'a &lt; b &amp; &#x27;c&#x27;'
    """
    return escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    r"""Render a table with its head and cells escaped; the first cell of a row is its heading.

    Columns with long text have the class `words`.

    >>> print(table(["width", "lr"], [[32, 0.1]]).replace("<tbody>", "\n<tbody>"))
    <table><thead><tr><th scope="col">width</th><th scope="col">lr</th></tr></thead>
    <tbody><tr><th scope="row">32</th><td>0.1</td></tr></tbody></table>
    """
    shown = [[text(cell) for cell in row] for row in rows]
    long = {i for row in shown for i, cell in enumerate(row) if len(cell) > LONG}
    titles = "".join(
        f'<th scope="col"{_kind(i in long)}>{text(t)}</th>' for i, t in enumerate(head)
    )
    body = "".join(f"<tr>{_cells(row, long)}</tr>" for row in shown)
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    return f"<table>{named}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _cells(row: Sequence[str], long: Container[int]) -> str:
    first, *rest = row
    cells = (f"<td{_kind(i in long)}>{cell}</td>" for i, cell in enumerate(rest, 1))
    return f'<th scope="row">{first}</th>' + "".join(cells)


def _kind(is_long: bool) -> str:
    return ' class="words"' if is_long else ""
