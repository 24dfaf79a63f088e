"""Turn matplotlib's SVG files into elements of an HTML page.

An element has the page's colours instead of fixed ones, so that it is readable on a dark page too.
It has a title on every point, ids that no other figure has, and no style that the page sets.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from telescope.report.figures import (
    ACCENT,
    BAD,
    GRID,
    HOVER,
    INK,
    MUTED,
    NEXT,
    PAPER,
    WIDTH_COLOURS,
)

PAINT = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--card)",
    BAD: "var(--bad)",
    ACCENT: "var(--accent)",
    **{colour: f"var(--w{number})" for number, colour in enumerate(WIDTH_COLOURS)},
}
"""Colour of a figure → the page's colour."""
COLOUR = re.compile("|".join(PAINT))
REFERENCE = re.compile(r"url\(#([^)]+)\)")
FONT = re.compile(r" ?font-family: [^;]*;?|stroke-opacity: 1;? ?")
LONG = re.compile(r"(-?\d+\.\d{2})\d+")
"""A coordinate with more than two decimals of a point."""


def inline(svg: str, prefix: str, label: str) -> str:
    """Turn one figure into an element of a page.

    Args:
        svg: the file's text, as matplotlib writes it.
        prefix: beginning of every id in it, a different one for each figure of a page.
        label: description of the figure, for those who cannot see it.
    """
    root = ET.fromstring(svg)
    for element in root.iter():
        element.tag = _plain(element.tag)
        for name in list(element.attrib):
            if _plain(name) != name:
                element.set(_plain(name), element.attrib.pop(name))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)  # the page has its own style, which this one would change
    for group in list(root.iter("g")):
        if group.get("id", "").startswith(HOVER):
            _entitle(group, group.attrib.pop("id").removeprefix(HOVER).split(NEXT))
    _rename(root, prefix)
    for element in root.iter():
        for name in ("style", "fill", "stroke"):
            if value := element.get(name):
                painted = COLOUR.sub(lambda found: PAINT[found[0]], value)
                element.set(name, FONT.sub("", painted))
        for name in ("d", "x", "y", "transform"):
            if value := element.get(name):
                element.set(name, LONG.sub(r"\1", " ".join(value.split())))
        # Blanks between elements are only the file's layout; text elements have none.
        element.text, element.tail = _unless_blank(element.text), _unless_blank(element.tail)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": label})
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _unless_blank(words: str | None) -> str | None:
    return words if words and words.strip() else None


def _plain(name: str) -> str:
    """Return a name without its namespace; a page has none."""
    return name.rsplit("}", 1)[-1]


def _entitle(group: ET.Element, titles: list[str]) -> None:
    """Give each point of a line its title, or a shape its only title."""
    points = list(group.iter("use"))
    if not points:
        points = list(group.iter("path"))[:1]
    for point, words in zip(points, titles, strict=True):
        title = ET.SubElement(point, "title")
        title.text = words


def _rename(root: ET.Element, prefix: str) -> None:
    """Number the ids that something refers to, and drop the others."""
    used = {name for element in root.iter() for name in _referred(element)}
    new = {name: f"{prefix}-{number}" for number, name in enumerate(sorted(used))}
    for element in root.iter():
        if (name := element.attrib.pop("id", "")) in new:
            element.set("id", new[name])
        if href := element.get("href"):
            element.set("href", f"#{new[href.removeprefix('#')]}")
        for key in ("clip-path", "style"):
            if value := element.get(key):
                element.set(key, REFERENCE.sub(lambda found: f"url(#{new[found[1]]})", value))


def _referred(element: ET.Element) -> Iterator[str]:
    if href := element.get("href"):
        yield href.removeprefix("#")
    for key in ("clip-path", "style"):
        yield from REFERENCE.findall(element.get(key, ""))
