"""README and docs: the site builds, every link leads somewhere, and every name exists.

What the pages state is compared with the program: keys and defaults of the spec, options of the
command line, keys of the JSON, names of files, modules and functions.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import STABLE_OPTIONS, telescope
from conftest import ROOT
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rooms import ROOMS

from telescope.cli import app
from telescope.ladder.fit.laws import LAWS
from telescope.ladder.fit.priors import DEEPENINGS
from telescope.spec.spec import _TABLES
from telescope.spec.tables import AxisTable, ModelTable

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "results/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
PAGES += sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("results/reference/*/README.md"))
OURS = [page for page in PAGES if not page.startswith(("results/", "CHANGELOG"))]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
MADE = ("results/quickstart", "results/<sweep>", "results/<name>", "build/")
"""Paths that a user's run makes."""


@cache
def tokens(page: str) -> list[Token]:
    """A page's Markdown, with the tokens of its running text."""
    parsed = MarkdownIt().enable("table").parse((ROOT / page).read_text(encoding="utf-8"))
    return [each for token in parsed for each in (token, *(token.children or ()))]


def links(page: str) -> Iterator[str]:
    """Return the targets of a page's links and pictures."""
    for token in tokens(page):
        target = token.attrs.get("href" if token.type == "link_open" else "src")
        if token.type in ("link_open", "image") and isinstance(target, str):
            yield target


@cache
def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found = tokens(page)
    heads = [found[i + 1].content for i, t in enumerate(found) if t.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def code_spans(page: str) -> Iterator[str]:
    """Return the code spans of a page's text."""
    return (token.content for token in tokens(page) if token.type == "code_inline")


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            other = file.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(other), f"{page}: {target}"


def test_the_links_are_many_and_a_wrong_one_would_be_seen() -> None:
    targets = [target for page in OURS for target in links(page)]
    assert len(targets) > 80
    assert sum("#" in target for target in targets) > 15
    assert "a-wrong-one" not in anchors("docs/transfer.md")
    assert "a-longer-run" in anchors("docs/transfer.md")


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    reached = {target.partition("#")[0] for target in links("README.md")}
    assert {page for page in PAGES if page.startswith("docs/")} <= reached


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """With mkdocs' own check of links, anchors, and of the names that the API page shows."""
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(site),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (site / "docs" / "python.html").read_text()
    for name in ("Ladder", "Spec", "Shapes", "TelescopeSearch", "Transfer", "fold_readout"):
        assert name in api
    for page in site.rglob("*.html"):
        loaded = re.findall(r'(?:src|<link[^>]*href)="(https?:[^"]*)"', page.read_text())
        assert not loaded, f"{page.name} loads {loaded[0]}"
    for page in site.rglob("*.html"):
        assert 'class="arithmatex"' not in page.read_text(), f"{page.name}: a formula was left"


def test_the_pages_commands_are_real() -> None:
    """Every `telescope VERB` and `make TARGET` that a page shows as code exists."""
    code = [*(span for page in OURS for span in code_spans(page))]
    code += [token.content for page in OURS for token in tokens(page) if token.type == "fence"]
    text = "\n".join(code)
    verbs = set(re.findall(r"^(?:\$ )?telescope ([a-z][\w-]*)", text, re.MULTILINE))
    targets = set(re.findall(r"^make (\w[\w-]*)", text, re.MULTILINE))
    assert verbs == STABLE_OPTIONS.keys()
    assert {"quickstart", "test", "test-slow", "docs"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert f"\n{target}:" in makefile, target


def rows(page: str, section: str) -> list[list[str]]:
    """The rows of the tables of a section, without their heads."""
    text = (ROOT / page).read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    assert text, f"{page}: no section {section}"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [
        [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in lines
    ]
    rule = [i for i, row in enumerate(cells) if set("".join(row)) <= set("-:")]
    heads = {i - 1 for i in rule} | set(rule)
    return [row for i, row in enumerate(cells) if i not in heads]


def defaults_of(table: Any) -> dict[str, Any]:
    """Key → default of a table of the spec; ... where there is none."""
    if is_dataclass(table):
        return {f.name: ... if f.default is MISSING else f.default for f in fields(table)}
    return {
        name: ... if field.is_required() else field.default
        for name, field in table.model_fields.items()
    }


TABLES = {**_TABLES, "axes": AxisTable, "model": ModelTable}


@pytest.mark.parametrize("section", sorted(TABLES.keys() - {"data.sources"}))
def test_the_spec_page_has_every_key_with_its_default(section: str) -> None:
    stated = {
        name: default
        for keys, default, *_ in rows("docs/spec.md", section)
        for name in re.findall(r"`(\w+)`", keys)
    }
    known = defaults_of(TABLES[section])
    if section == "data":
        known["weight"] = defaults_of(TABLES["data.sources"])["weight"]
    if section == "model":
        known["vocab_size"] = ...  # a keyword of build, which the tokenizer gives
    assert stated.keys() == known.keys()
    for key, value in known.items():
        if value in (..., None, ()):
            assert not stated[key].startswith("`") or key in SAID_OTHERWISE, key
        else:
            literal = stated[key].strip("`").replace("true", "True").replace("false", "False")
            plain = list(value) if isinstance(value, tuple) else value
            assert eval(literal, {"__builtins__": {}}) == plain, key


SAID_OTHERWISE = {"tokenizer"}
"""Keys without a default in the code that act as if they had one."""


def test_the_command_line_page_has_every_option() -> None:
    stated: dict[str, set[str]] = {}
    every = set(STABLE_OPTIONS)
    for names, of, _ in rows("docs/cli.md", "Options"):
        verbs = set(re.findall(r"[\w-]+", of))
        if of.startswith("all but"):
            verbs = every - verbs
        for option in re.findall(r"--[\w-]+", names):
            stated.setdefault(option, set()).update(verbs & every)
    known: dict[str, set[str]] = {}
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands.keys() == every
    for verb, command in commands.items():
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if option.startswith("--") and option != "--help":
                    known.setdefault(option, set()).add(verb)
    assert {o: v for o, v in stated.items() if o not in ("--debug", "--version")} == known


def test_the_results_page_has_the_keys_of_the_json() -> None:
    """The page names every key of `show` and `transfer`, whose output is in files."""
    stated = {
        verb.strip("`"): set(re.findall(r"`(\w+)`", keys))
        for verb, keys in rows("docs/results.md", "JSON for scripts")
    }
    data = ROOT / "tests" / "data"
    show, transfer = (
        json.loads((data / f"quickstart.{verb}.json").read_text()) for verb in ("show", "transfer")
    )
    assert stated["show"] <= show.keys()
    assert stated["transfer"] <= transfer.keys()
    commands = {
        "plan": ("plan", "quickstart", "--set", "ladder.policy=paper"),
        "status": ("status", "results/reference/quickstart"),
    }
    for verb, command in commands.items():
        answer = json.loads(telescope(*command, "--json", cwd=ROOT).stdout)
        assert stated[verb] <= answer.keys(), verb
    text = (ROOT / "docs" / "results.md").read_text()
    kept = {"verdict", "predicted_excess_loss", "intervals", "evidence", "assumptions"}
    assert kept <= transfer["certificate"].keys()
    for key in (*transfer["groups"][0], *kept):
        assert f"`{key}`" in text, key


def test_the_map_has_every_room() -> None:
    (block,) = (t for t in tokens("CONTRIBUTING.md") if t.type == "fence" and t.info == "text")
    assert set(re.findall(r"^  (\w+)/", block.content, re.MULTILINE)) == set(ROOMS)


def test_every_path_that_a_page_names_exists() -> None:
    for page in OURS:
        for span in code_spans(page):
            path = span.partition(" ")[0].partition("::")[0]
            if path.split("/")[0] in FOLDERS and "/" in path and not path.startswith(MADE):
                assert list(ROOT.glob(path.rstrip("/"))), f"{page}: {span}"


def test_every_module_and_function_that_a_page_names_exists() -> None:
    names = {
        (page, span)
        for page in OURS
        for span in code_spans(page)
        if re.fullmatch(r"telescope(\.\w+)+(\(.*\))?", span)
    }
    for page, span in names:
        assert exists(span.partition("(")[0]), f"{page}: {span}"


def exists(name: str) -> bool:
    """Find a dotted name: the longest part that imports is a module, the rest are attributes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            hints = typing.get_type_hints(found) if isinstance(found, type) else {}
            if not hasattr(found, part):
                return part in hints
            found = getattr(found, part)
        return True
    return False


def test_a_name_that_is_not_there_is_seen() -> None:
    assert exists("telescope.records.Trial.lr")
    assert not exists("telescope.records.Trial.rate")
    assert not exists("telescope.nowhere.at_all")


def stated_constants() -> dict[str, str]:
    """Dotted name → value, of the tables of constants in docs/ladder.md."""
    found = {}
    for row in rows("docs/ladder.md", "Constants"):
        for place, cell in enumerate(row[:-1]):
            if re.fullmatch(r"`telescope(\.\w+)+`", cell):
                found[cell.strip("`")] = row[place + 1]
    return found


def ladder_constants() -> dict[str, Any]:
    """Dotted name → value, of every number and collection of numbers in the ladder."""
    found = {}
    for path in sorted((ROOT / "telescope" / "ladder").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in ast.walk(ast.Tuple(elts=targets)):  # a pair is set at once
                if isinstance(target, ast.Name) and target.id.isupper():
                    found[f"{name}.{target.id}"] = getattr(importlib.import_module(name), target.id)
    return {name: value for name, value in found.items() if is_numbers(value)}


def is_numbers(value: Any) -> bool:
    """Tell whether a constant is a number, or a tuple or table of numbers."""
    if isinstance(value, dict):
        return all(map(is_numbers, [*value, *value.values()]))
    if isinstance(value, tuple):
        return all(map(is_numbers, value))
    return isinstance(value, (int, float))


NOT_OF_THE_LADDER = ("telescope.ladder.portrait.",)
"""Modules that draw and decide nothing."""
IN_WORDS = {
    "telescope.ladder.fit.optimum.SIGNS",
    "telescope.ladder.fit.priors.DEEPENINGS",
    "telescope.ladder.fit.priors.LAW_PRIORS",
}
"""A table of signs, and one that stands in the section on the model."""


def test_the_ladder_page_has_every_constant_with_its_value() -> None:
    stated, known = stated_constants(), ladder_constants()
    known = {n: v for n, v in known.items() if not n.startswith(NOT_OF_THE_LADDER)}
    assert len(known) > 50
    assert stated.keys() == known.keys() - IN_WORDS
    for name, text in stated.items():
        value = float(Fraction(text)) if "/" in text else ast.literal_eval(text)
        assert value == known[name], name


def test_every_constant_of_the_ladder_has_a_status() -> None:
    statuses = {"derived", "measured here", "assumption"}
    for row in rows("docs/ladder.md", "Constants"):
        if len(row) == 6:
            assert row[-1] in statuses or row[-1].startswith("from paper"), row


def test_the_ladder_page_has_the_laws_with_their_probabilities() -> None:
    text = (ROOT / "docs" / "ladder.md").read_text()
    for law in LAWS:
        assert f"| {law.name} | {law.exponent:g} | {law.pace:g} | {law.prior:g} |" in text
    values = " | ".join(f"{deepening:g}".replace("-", "−") for deepening in DEEPENINGS)
    priors = " | ".join(f"{prior:g}" for prior in DEEPENINGS.values())
    assert f"| {values} |" in text
    assert f"| probability before any result | {priors} |" in text
