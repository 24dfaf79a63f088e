"""Hooks of mkdocs: the site has the repository's own layout, and formulas that need no script.

Pages lie in the site where they lie in the repository, so one relative link works on a code host
and in the site alike.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/*.md",
    "docs/*.css",
    "examples/README.md",
    "examples/*/*.*",
    "models/*.py",
    "sweeps/*.toml",
    "results/README.md",
    "results/reference/*/*.md",
    "results/reference/*/*.png",
)
"""Content of the site: its pages, and the files that they link to."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
"""A formula as pymdownx.arithmatex leaves it."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replace the files of `docs/` by those of the repository, under their paths in it."""
    from_docs = [file for file in files if file.src_dir == config.docs_dir]
    for file in from_docs:
        files.remove(file)
    paths = sorted({path for pattern in PUBLISHED for path in ROOT.glob(pattern)})
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Turn the page's LaTeX into MathML, which browsers show by themselves."""
    return FORMULA.sub(_as_mathml, content)


def _as_mathml(formula: re.Match[str]) -> str:
    """Return one formula as MathML, on a line of its own if it is a block."""
    display = "block" if formula[1] == "div" else "inline"
    return str(convert(html.unescape(formula[2]).strip(), display=display))
