"""Find sweep files by path or bundled name, and results folders by name or path."""

from __future__ import annotations

import codecs
import io
import tomllib
from pathlib import Path
from typing import Any

from telescope.errors import SpecError, did_you_mean

LONG_INTEGER = "an integer has more digits than any key allows"
SPEC_FILE = "spec.json"
"""The resolved spec in a results folder; a folder with this file is a sweep's."""
KEPT_MODEL_FILE = "model.py"
"""The model file as it was run, in the results folder."""


def bundled() -> Path:
    """Return the folder with `models/` and `sweeps/`: in an installed wheel, or the repository."""
    package = Path(__file__).parent.parent
    wheel = package / "bundled"
    return wheel if wheel.is_dir() else package.parent


def bundled_sweeps() -> list[str]:
    """Return the names of the bundled sweeps."""
    return sorted(path.stem for path in (bundled() / "sweeps").glob("*.toml"))


def find_sweep(sweep: str | Path) -> Path:
    """Find the TOML file of a sweep.

    Args:
        sweep: a path, or the name of a bundled sweep.

    Raises:
        SpecError: there is no such file or name.
    """
    path = Path(sweep)
    if path.is_file():
        return path
    if path.is_dir():
        raise SpecError(f"{sweep}: is a folder; name a TOML file")
    inside = bundled() / "sweeps" / f"{sweep}.toml"
    if path.name == str(sweep) and inside.is_file():
        return inside
    known = [*bundled_sweeps(), *(str(near) for near in path.parent.glob("*.toml"))]
    hint = did_you_mean(str(sweep), known) or "; `telescope init` writes a starter"
    names = ", ".join(bundled_sweeps())
    raise SpecError(f"{sweep}: no such file, nor a bundled sweep ({names}){hint}")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        SpecError: it cannot be read or is not TOML; the message gives line and column.
    """
    try:
        return tomllib.loads(_text_of(path))
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise SpecError(f"{path}: not valid TOML: nested too deeply") from error
    except SpecError:
        raise
    except ValueError as error:  # of Python's limit to the digits of an integer
        raise SpecError(f"{path}: {LONG_INTEGER}") from error


def _text_of(path: Path) -> str:
    """Read a UTF-8 text file, without a byte-order mark.

    Raises:
        SpecError: it cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    zeros = [byte == 0 for byte in raw[:4]]
    is_wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if is_wide or zeros in ([True, False] * 2, [False, True] * 2):
        raise SpecError(
            f"{path}: cannot be read: it is UTF-16 text, must be UTF-8; save it as UTF-8, or "
            "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
        )
    try:
        return io.StringIO(raw.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{path}: cannot be read: byte {error.start}: no UTF-8 text; save it as UTF-8"
        ) from error


def read_model_file(file: str, folder: Path) -> tuple[str, str]:
    """Read a model file, whose path is relative to the sweep's folder; return its name and text.

    Raises:
        SpecError: it cannot be read.
    """
    path = folder / file
    try:
        return path.name, path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise SpecError(
            f"model.file: cannot read {path} ({reason}); give a path relative to the sweep file"
        ) from error


def find_result(sweep: str | Path, results: Path) -> Path:
    """Find the results folder of a sweep that has been run.

    Args:
        sweep: its name under `results`, or a path to the folder.
        results: the folder of all results.

    Raises:
        SpecError: there is no such folder, or it has no sweep.
    """
    for folder in (results / sweep, Path(sweep)):
        if (folder / SPEC_FILE).is_file():
            return folder
    there = [folder.name for folder in list_results(results)]
    raise SpecError(
        f"{sweep}: no sweep of that name under {results} (there: {', '.join(there) or 'none'}), "
        f"nor a path to one{did_you_mean(Path(sweep).name, there)}"
    )


def list_results(results: Path) -> list[Path]:
    """Return the results folders under `results`, sorted by name."""
    return sorted(path.parent for path in results.glob(f"*/{SPEC_FILE}"))
