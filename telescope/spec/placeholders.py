"""The placeholders of a foreign trainer's command, such as ``{width}`` and ``{lr}``."""

from __future__ import annotations

import string
from collections.abc import Mapping

OWN = ("width", "seed", "base_width", "steps", "trial_folder", "python")
"""The placeholders that are not axes."""


def names_in(text: str) -> tuple[str, ...]:
    """Return the placeholders of a text, in order; ``{{`` and ``}}`` are literal braces.

    >>> names_in("--lr={lr} {{literal}} {lr}/{seed}")
    ('lr', 'lr', 'seed')

    Raises:
        ValueError: there is a lone brace, or something other than a plain name, such as
            ``{lr:.3f}`` or ``{}``.
    """
    found = []
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{{{shown}}} is no plain name")
        found.append(name)
    return tuple(found)


def filled(text: str, values: Mapping[str, object]) -> str:
    """Replace the placeholders of a text; numbers keep all their digits.

    >>> filled("--lr={lr} {{x}} {seed}", {"lr": 0.1, "seed": 3})
    '--lr=0.1 {x} 3'
    """
    return "".join(
        literal + ("" if name is None else str(values[name]))
        for literal, name, _, _ in string.Formatter().parse(text)
    )
