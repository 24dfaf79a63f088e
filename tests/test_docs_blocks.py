"""Every block of README and docs runs as it stands there, or says that it does not.

`docs/blocks.py` says how a page runs. Here `telescope run` trains in one process, without Ray, and
what needs nothing of a shell runs in this one, which has torch loaded already; `make test-slow`
runs the pages whole, as they are.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import Block, Shell, blocks_of, fill, pages, printed, run_shell
from commands import telescope
from conftest import GPT

from telescope import Spec

LANGUAGES = {"python", "sh", "console", "toml", "json", "text"}
BLOCKS = [block for page in pages() for block in blocks_of(page)]
SLOW_PAGES = sorted({block.page for block in BLOCKS if "slow" in block.remarks})
NOT_RUN = {
    "CONTRIBUTING.md": 2,
    "README.md": 1,
    "docs/audit.md": 1,
    "docs/clusters.md": 3,
    "docs/containers.md": 3,
    "docs/exports.md": 1,
    "docs/frontier.md": 1,
    "docs/launch.md": 2,
    "docs/own-loop.md": 1,
    "docs/own-trainer.md": 1,
    "docs/quickstart.md": 1,
    "docs/slurm.md": 3,
    "docs/transfer.md": 1,
    "examples/README.md": 2,
}
"""Page → its blocks that nothing runs."""


def test_every_block_has_a_language_that_is_run() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block.where}: {block.language or 'no language'}"


def test_blocks_that_are_not_run_say_why_and_are_few() -> None:
    counts: dict[str, int] = {}
    for block in BLOCKS:
        if "not run" in block.remarks:
            counts[block.page] = counts.get(block.page, 0) + 1
            assert len(block.remarks["not run"]) > 10, block.where
    assert counts == NOT_RUN


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A page's folder, which is the current one, and whose modules are forgotten in the end."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith((str(tmp_path), str(GPT.parent))) or name == "models":
            del sys.modules[name]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", pages())
def test_a_page_runs(page: str, folder: Path) -> None:
    run_page(page, folder, slow=False)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("page", SLOW_PAGES)
def test_a_page_runs_whole(page: str, folder: Path) -> None:
    run_page(page, folder, slow=True)


def run_page(page: str, folder: Path, *, slow: bool) -> None:
    """Run a page from top to bottom; its TOML is checked last, when its files are there."""
    names: dict[str, Any] = {"__name__": "__page__"}
    blocks = [
        block
        for block in blocks_of(page)
        if "not run" not in block.remarks and (slow or "slow" not in block.remarks)
    ]
    for block in blocks:
        if block.title:
            write(block, folder)
        elif block.language == "python":
            exec(compile(block.code, block.where, "exec"), names)
        elif block.language == "sh":
            code = block.code if slow else without_ray(block.code)
            done = (run_shell if slow else run_here)(code, folder)
            assert done.returncode == 0, f"{block.where}\n{done.stdout}\n{done.stderr}"
        elif block.language == "console":
            check_output(block, folder, run_shell if slow else run_here)
        elif block.language == "json":
            json.loads(block.code)
    for block in blocks:
        if block.language == "toml":
            check_toml(block, folder)


def write(block: Block, folder: Path) -> None:
    """Write a block to the file that it names; it must be what its suffix says."""
    assert block.title is not None
    (folder / block.title).write_text(block.code, encoding="utf-8")
    match block.language:
        case "python":
            compile(block.code, block.where, "exec")
        case "toml":
            tomllib.loads(block.code)
        case "json":
            json.loads(block.code)
        case _:
            pytest.fail(f"{block.where}: {block.language} has no file")


def without_ray(code: str) -> str:
    """Let `telescope run` train in its own process, one trial after the other."""
    return re.sub(
        r"^telescope run ", "telescope run --dispatcher inline ", code, flags=re.MULTILINE
    )


def run_here(code: str, folder: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """Run lines in this process if each is a `telescope` command and no more; else in bash."""
    lines = [line for line in code.splitlines() if shlex.split(line, comments=True)]
    words = [shlex.split(line, comments=True) for line in lines]
    plain = all(line[0] == "telescope" and not set("".join(line)) & set(SHELL) for line in words)
    if not plain or any(line.endswith("\\") for line in lines):
        return run_shell(code, folder, columns)
    outs, errors = [], []
    for _, *arguments in words:
        done = telescope(*arguments, cwd=folder, columns=columns)
        outs.append(done.stdout)
        errors.append(done.stderr)
        if done.returncode:
            break
    return subprocess.CompletedProcess(code, done.returncode, "".join(outs), "".join(errors))


SHELL = "|;&<>$`*?~(){}"
"""Characters that a shell makes something of."""


def check_output(block: Block, folder: Path, shell: Shell = run_here) -> None:
    """Compare what a block shows with what its commands print; long ones but for their numbers."""
    now, shown = printed(block, folder, shell), block.code
    if "slow" in block.remarks:
        now, shown = (re.sub(r"[-+]?\d[\d.,]*", "#", text) for text in (now, shown))
        now, shown = (re.sub(r" +|─+", " ", text) for text in (now, shown))
    pattern = re.escape(shown).replace(re.escape("\n...\n"), r"\n(?:.*\n)*?")
    stale = f"{block.where} is not what its command prints now; `python docs/blocks.py` renews it"
    assert re.fullmatch(pattern, now), f"{stale}. Now:\n{now}"


def check_toml(block: Block, folder: Path) -> None:
    """Read a spec, or a part of one, which is completed to a whole."""
    if block.title:
        if "model" in (data := tomllib.loads(block.code)):
            model = folder / data["model"]["file"]
            if not model.exists():
                model.write_text(GPT.read_text())
        Spec.load(str(folder / block.title))
        return
    data = tomllib.loads(block.code)
    whole: dict[str, Any] = {
        "name": "part",
        "ladder": {"widths": [32, 64, 128]},
        "target": {"width": 256},
        "axes": {
            "lr": {"low": 0.01, "high": 0.1, "points": 3},
            "weight_decay": {"low": 0.01, "high": 0.1, "points": 3},
        },
    }
    if "trainer" not in data and "cost" not in data:
        whole |= {
            "model": {"file": str(GPT), "depth": 1, "head_dim": 16},
            "train": {"steps": 4, "batch_size": 4, "sequence_length": 16},
            "data": {"source": "python-stdlib"},
        }
    elif "cost" not in data:
        whole["cost"] = {"parameters": {"32": 1, "64": 4, "128": 16, "256": 64}}
    assert os.getcwd() == str(folder)
    Spec.from_dict({**whole, **data})


def test_a_wrong_block_is_found(folder: Path) -> None:
    """The checks above can fail: a misspelt key, another output, a command that fails."""

    def block(language: str, code: str) -> Block:
        return Block("page.md", 1, language, None, code, {})

    with pytest.raises(Exception, match="wormup"):
        check_toml(block("toml", "[axes.lr]\nvalue = 1.0\n[train]\nwormup = 1\n"), folder)
    with pytest.raises(AssertionError, match="is not what its command prints"):
        check_output(block("console", "$ echo one\ntwo\n"), folder)
    check_output(block("console", "$ printf 'one\\ntwo\\nthree\\n'\none\n...\nthree\n"), folder)
    with pytest.raises(RuntimeError, match=r"page\.md:1: false"):
        check_output(block("console", "$ false\n"), folder)
