"""HTML in small pieces, for the report and for notebooks: escaped text, and tables of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def text(value: object) -> str:
    """Anything as text that is no markup.

    >>> text("a < b & 'c'")
    'a &lt; b &amp; &#x27;c&#x27;'
    """
    return escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    r"""A table, its head and cells escaped; the first cell of a row is its heading.

    >>> print(table(["width", "lr"], [[32, 0.1]]).replace("<tbody>", "\n<tbody>"))
    <table><thead><tr><th scope="col">width</th><th scope="col">lr</th></tr></thead>
    <tbody><tr><th scope="row">32</th><td>0.1</td></tr></tbody></table>
    """
    titles = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    return f"<table>{named}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _cells(row: Sequence[object]) -> str:
    first, *rest = row
    return f'<th scope="row">{text(first)}</th>' + "".join(f"<td>{text(c)}</td>" for c in rest)
