"""The code blocks of README and docs: found, run, and their printed output renewed.

    python docs/blocks.py            print the `console` blocks of all pages anew
    python docs/blocks.py --slow     those that take long too

A page runs from top to bottom in a folder of its own, which has `models/`, `examples/` and
`results/reference/` of this checkout:

- ``python title="x.py"``, ``toml title=…`` and ``json title=…`` are written to that file;
- other `python` blocks of a page run in one interpreter, `sh` blocks in bash;
- `console` has commands behind ``$ ``, each with its output; a line ``...`` stands for any lines;
- other `toml` and `json` blocks are parsed.

A comment before a block says what differs: ``<!-- not run: REASON -->``, ``<!-- slow: REASON -->``
(run by `make test-slow`), ``<!-- width: COLUMNS -->`` (of the terminal, 80 if left out).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("models", "examples", "results/reference")
"""Files and folders of the checkout that a page's folder has."""
REMARK = re.compile(r"<!--\s*(not run|slow|width):\s*(.*?)\s*-->", re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what the comments before it say."""

    page: str
    """The page's path in the repository."""
    line: int
    """The line of its opening fence, from 1."""
    language: str
    title: str | None
    """The file that it is written to."""
    code: str
    remarks: dict[str, str]

    @property
    def where(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """The pages whose blocks are run, by their paths in the repository."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
    return [path.relative_to(ROOT).as_posix() for path in [*found, *sorted(ROOT.glob("docs/*.md"))]]


def blocks_of(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    remarks: dict[str, str] = {}
    for token in MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type == "html_block":
            remarks |= dict(REMARK.findall(token.content))
        elif token.type == "fence":
            assert token.map is not None
            title = TITLE.search(token.info)
            yield Block(
                page=page,
                line=token.map[0] + 1,
                language=token.info.split(maxsplit=1)[0] if token.info.strip() else "",
                title=title[1] if title else None,
                code=token.content,
                remarks=remarks,
            )
            remarks = {}
        else:
            remarks = {}


def fill(folder: Path) -> None:
    """Put into a page's folder what it has of the checkout."""
    for name in LINKED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / name)


def environment(columns: int = 80) -> dict[str, str]:
    """Return the environment of a block: this checkout's telescope, a terminal of some width."""
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": str(columns),
        "NO_COLOR": "1",
        "PYTHONUTF8": "1",
    }


def run_shell(code: str, folder: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """Run shell lines; the first that fails ends them."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=environment(columns),
        capture_output=True,
        text=True,
    )


Shell = Callable[[str, Path, int], subprocess.CompletedProcess[str]]


def printed(block: Block, folder: Path, shell: Shell = run_shell) -> str:
    """Run a `console` block's commands; returns the block as it reads now.

    Args:
        block: the block.
        folder: its page's folder.
        shell: runs a line, as `run_shell` does.

    Raises:
        RuntimeError: a command ended with an exit code other than 0.
    """
    columns, lines = int(block.remarks.get("width", "80")), []
    for command in re.findall(r"^\$ (.*)$", block.code, re.MULTILINE):
        done = shell(command, folder, columns)
        if done.returncode:
            raise RuntimeError(f"{block.where}: {command}: {done.stderr or done.stdout}")
        output = "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")
        lines += [f"$ {command}", output]
    return "\n".join(lines) + "\n"


def renew(page: str, *, slow: bool) -> bool:
    """Print a page's `console` blocks anew; returns whether one has changed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    before = text
    with tempfile.TemporaryDirectory() as place:
        fill(Path(place))
        for block in blocks_of(page):
            skipped = "not run" in block.remarks or ("slow" in block.remarks and not slow)
            if block.language != "console" or skipped:
                continue
            if "\n...\n" in block.code:
                print(f"{block.where}: is shortened by hand; renew it by hand", file=sys.stderr)
                continue
            fence = "```console\n"
            text = text.replace(fence + block.code, fence + printed(block, Path(place)))
    if text != before:
        (ROOT / page).write_text(text, encoding="utf-8")
    return text != before


def main() -> None:
    """Renew all pages, and name those that have changed."""
    parser = argparse.ArgumentParser(description="Print the console blocks of the pages anew.")
    parser.add_argument("--slow", action="store_true", help="those that take long too")
    slow = parser.parse_args().slow
    for page in pages():
        if renew(page, slow=slow):
            print(f"renewed {page}")


if __name__ == "__main__":
    main()
