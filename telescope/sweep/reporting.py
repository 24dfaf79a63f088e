"""The report as people call it: reads sweeps, refuses those that say nothing together, writes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from telescope.answer.finished import Finished, open_result
from telescope.answer.frontier import FOLDER, read_answer
from telescope.check.verdict import CoordCheck
from telescope.errors import SpecError, TelescopeError
from telescope.files import write_atomic
from telescope.report.page import Shown, render
from telescope.report.scaling import read_scaling
from telescope.spec.catalog import bundled_sweeps
from telescope.sweep.comparing import differences, is_data_seen
from telescope.transfer.settings import Transfer

REPORT_FILE = "report.html"


def write_report(sweeps: Sequence[str | Path], results: Path, out: Path | None) -> Path:
    """Write the report of one sweep, or of several side by side.

    Args:
        sweeps: names or paths, one or more; of the same twice, one counts.
        results: the folder of all results.
        out: the file; left out, `report.html` in the sweep's folder, or in the current one for
            several.

    Raises:
        SpecError: there is no such sweep, or the file cannot be written.
        ResumeError: a sweep's files or its store cannot be read.
        RefusedError: the sweeps' losses cannot be compared.
    """
    opened = {f.folder.path.resolve(): f for f in (open_result(s, results) for s in sweeps)}
    return write_page(list(opened.values()), out)


def write_page(sweeps: Sequence[Finished], out: Path | None) -> Path:
    """Write the report of opened sweeps; see `write_report`."""
    page = page_of(sweeps)
    out = out or (sweeps[0].folder.path / REPORT_FILE if len(sweeps) == 1 else Path(REPORT_FILE))
    try:
        write_atomic(out, page)
    except OSError as error:
        raise SpecError(
            f"--out {out}: cannot be written: {error.strerror}; give another file"
        ) from error
    return out


def page_of(sweeps: Sequence[Finished]) -> str:
    """The report as HTML.

    Raises:
        RefusedError: the sweeps' losses cannot be compared.
    """
    names = _names(sweeps)
    records = {name: sweep.folder.read_spec() for name, sweep in names.items()}
    unlike = differences(records)
    shown = [_shown(name, sweep) for name, sweep in names.items()]
    return render(shown, unlike, seen=is_data_seen(records))


def _names(sweeps: Sequence[Finished]) -> dict[str, Finished]:
    """Sweeps by name, and by folder where two have the same name."""
    names = [sweep.spec.name for sweep in sweeps]
    return {
        name if names.count(name) == 1 else str(sweep.folder.path): sweep
        for name, sweep in zip(names, sweeps, strict=True)
    }


def _shown(name: str, sweep: Finished) -> Shown:
    settings, no_settings = _settings(sweep)
    check, no_check = _check(sweep)
    found = read_scaling(sweep.folder.path)
    frontier = read_answer(sweep.folder.path / FOLDER)
    command = _run_command(sweep)
    return Shown(name, sweep, settings, no_settings, check, no_check, command, found, frontier)


def _settings(sweep: Finished) -> tuple[Transfer | None, str]:
    """The target's settings, or why there are none."""
    try:
        return sweep.transfer(), ""
    except TelescopeError as error:
        return None, " ".join(str(error).split())


def _check(sweep: Finished) -> tuple[CoordCheck | None, str]:
    """The coordinate check of this very training, or why there is none."""
    record = sweep.folder.read_check()
    if record is None:
        return None, "no coordinate check was made; `telescope check` makes one"
    if record.get("fingerprint") != sweep.folder.read_spec()["fingerprint"]:
        return None, "the check that is kept is of other training; `telescope check` makes another"
    if record["verdict"] is None:
        return None, f"no coordinate check: {record.get('reason') or 'no reason is kept'}"
    try:
        return CoordCheck.from_dict(record), ""
    except (KeyError, TypeError, ValueError, AttributeError):
        kept = sweep.folder.path / "coordcheck.json"
        return None, f"verdict {record['verdict']}; the rest of {kept} cannot be read"


def _run_command(sweep: Finished) -> str:
    """The command that runs the sweep: its bundled name, or a file with the spec of the report.

    "" where telescope does not train it: a program that asks and tells does.
    """
    if not (sweep.spec.trainer or sweep.spec.model):
        return ""
    name = sweep.spec.name
    spec = name if name in bundled_sweeps() else f"{name}.toml"
    folder = sweep.folder.path.parent
    where = "" if folder == Path("results") else f" --results {shlex.quote(str(folder))}"
    return f"telescope run {shlex.quote(spec)}{where}"
