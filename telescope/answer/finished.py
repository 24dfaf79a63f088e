"""A sweep's results folder, read and replayed: what `show`, `transfer` and the Python API open.

What a stage's fit decided is kept beside the results, and so is what the database held: to open a
finished sweep again reads three small files, and imports neither the fit nor the database.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telescope.answer.derive import certificate_of, chosen_point, transfer
from telescope.ladder.ladder import Ladder, replay
from telescope.records import Axis, Certificate, Point, Result, Status, Trial
from telescope.spec.catalog import find_result
from telescope.spec.spec import Spec
from telescope.store.folder import DATABASE_FILE, Folder
from telescope.store.memory import Memory, code_of
from telescope.target.folder import ends_of
from telescope.transfer.settings import at_horizon

if TYPE_CHECKING:
    from telescope.ladder.outcome import Judgement
    from telescope.ladder.portrait import Portrait
    from telescope.store.store import Store
    from telescope.transfer.settings import Transfer
    from telescope.transfer.shapes import Shapes


def ladder_memory(folder: Folder) -> Memory:
    """Earlier decisions of a sweep's ladder, on the same results, under the same code."""
    code = code_of("ladder", "records", "store/store", "store/memory", libraries=("numpy",))
    return Memory(folder.memory_file, code)


@dataclass
class Kept:
    """The results of a sweep, wherever they are; its database is opened when it has to be.

    Attributes:
        folder: the sweep's.
        url: the storage; None: the file in the folder.
        name: the sweep's.
        axes: the spec's.
        fingerprint: of all that makes results comparable.
        memory: has what the file held, as long as it has not changed.
    """

    folder: Folder
    url: str | None
    name: str
    axes: tuple[Axis, ...]
    fingerprint: str
    memory: Memory

    def __post_init__(self) -> None:
        """Nothing is open yet."""
        self._store: Store | None = None

    @property
    def _file(self) -> Path:
        return self.folder.path / DATABASE_FILE

    def _opened(self) -> Store:
        from telescope.store.database import sqlite_url
        from telescope.store.store import Store, check_exists

        if self._store is None:
            url = self.url or sqlite_url(self.folder.path)
            if self.folder.exists:
                check_exists(url)
            self._store = Store(url, self.name, self.axes, self.fingerprint)
        return self._store

    def results(self) -> list[Result]:
        """Everything stored so far.

        Raises:
            ResumeError, StoreError: it is missing, another sweep's, or cannot be read.
        """
        content = None if self.url else _content(self._file)
        if content is None:
            return self._opened().results()
        of = (content, self.name, [axis.name for axis in self.axes], self.fingerprint)
        known = self.memory.recall(
            list[Result], of, lambda: self._opened().results(), only_latest=True
        )
        # Changed while it was read: what was read may be of either content.
        return known if _content(self._file) == content else self._opened().results()

    def add(self, result: Result) -> None:
        """Store one finished trial; see `Store.add`."""
        self._opened().add(result)

    def close(self) -> None:
        """Let go of the database."""
        if self._store is not None:
            self._store.close()
            self._store = None


def kept_beside(beside: Folder, name: str, axes: tuple[Axis, ...]) -> Kept:
    """Return the results of a folder beside a sweep's, which may not have been made yet.

    Raises:
        ResumeError: the sweep's record cannot be read.
    """
    record, folder = beside.read_spec(), Folder(beside.path / name)
    memory = ladder_memory(folder)
    return Kept(folder, None, record["spec"]["name"], axes, record["fingerprint"], memory)


def _content(database: Path) -> str | None:
    """A digest of a database file; None where there is none, or somebody is writing to it."""
    beside = (database.with_name(f"{database.name}{end}") for end in ("-journal", "-wal"))
    try:
        content = hashlib.sha256(database.read_bytes()).hexdigest()
    except OSError:
        return None
    return None if any(path.exists() for path in beside) else content


def given_trials(record: Mapping[str, Any]) -> list[Trial]:
    """The trials whose results were given to the ladder of a `spec.json`; none in older ones."""
    return [Trial.from_dict(trial) for trial in record.get("given", ())]


@dataclass(frozen=True)
class Finished:
    """A results folder, read and replayed."""

    folder: Folder
    spec: Spec
    ladder: Ladder
    results: list[Result]
    target_flops: float
    planned: Mapping[str, float] | None
    """Best, expected and worst cost that the plan gave, in target runs."""
    memory: Memory = field(default_factory=lambda: Memory(None, ""), compare=False)
    """Earlier decisions; whoever has asked for more than before lets it `keep` that."""

    @cached_property
    def certificate(self) -> Certificate | None:
        """The ladder's verdict on the target; None where its policy has none."""
        certificate = certificate_of(self.spec, self.ladder, rule_checked=self.rule_checked)
        self.memory.keep()
        return certificate

    @cached_property
    def portrait(self) -> Portrait:
        """The data of the figures."""
        portrait = self.ladder.portrait()
        self.memory.keep()
        return portrait

    @cached_property
    def judgements(self) -> list[Judgement]:
        """The target runs that have ended, each beside the loss predicted for its width and steps.

        Raises:
            ResumeError: the end of one cannot be read.
        """
        if not self.ladder.choices:
            return []
        from telescope.ladder.outcome import TargetEnd, judge  # imported for sweeps that have one

        judged = []
        for end in ends_of(self.folder.path):
            certificate = certificate_of(
                self.spec,
                self.ladder,
                width=end["width"],
                steps=end["steps"],
                rule_checked=self.rule_checked,
            )
            predicted = certificate.predicted_loss if certificate else None
            judged.append(judge(predicted, TargetEnd(end["run"], end["width"], end["loss"])))
        self.memory.keep()
        return judged

    @property
    def rule_checked(self) -> bool:
        """Tell whether a coordinate check of this very training has passed."""
        check = self.folder.read_check() or {}
        same = check.get("fingerprint") == self.folder.read_spec()["fingerprint"]
        return same and check.get("verdict") == "PASS"

    def target_point(self) -> Point | None:
        """The answer, its weight decay rescaled if the target has other steps; None without one."""
        if not self.ladder.choices:
            return None
        point = chosen_point(self.ladder, self.certificate)
        return at_horizon(point, self.spec.steps, self.spec.target.steps)

    def transfer(
        self,
        *,
        width: int | None = None,
        steps: int | None = None,
        shapes: Shapes | str | Path | None = None,
        roles: Mapping[str, str] | None = None,
        fold_readout: bool = False,
    ) -> Transfer:
        """The answer, handed over at a width; see `telescope.Ladder.transfer`."""
        return transfer(
            self.spec,
            self.ladder,
            width=width,
            steps=steps,
            rule_checked=self.rule_checked,
            shapes=shapes,
            roles=roles,
            fold_readout=fold_readout,
        )

    def cost_by_width(self) -> dict[int, float]:
        """Width → what its stored trials cost, in target runs; narrow first."""
        spent: dict[int, float] = {}
        for result in sorted(self.results, key=lambda r: r.trial.width):
            cost = result.flops
            if self.spec.cost:  # counted as planned: what its trials report may be of another kind
                ran = result.status is not Status.FAILED
                cost = self.ladder.spec.cost(result.trial.width) if ran else 0.0
            width = result.trial.width
            spent[width] = spent.get(width, 0.0) + cost / self.target_flops
        return spent

    def cost(self) -> dict[str, Any]:
        """The cost of all stored trials, and the plan's, in the keys of `show --json`."""
        flops = sum(result.flops for result in self.results)
        return {
            "flops": (flops or None) if self.spec.cost else flops,
            "seconds": sum(result.seconds for result in self.results),
            "over_target": sum(self.cost_by_width().values()),
            "planned": self.planned and dict(self.planned),
        }


def open_result(sweep: str | Path, results: Path) -> Finished:
    """Read a sweep's folder and replay its store; safe while a driver is running.

    Raises:
        SpecError: there is no such sweep.
        ResumeError: its files or its store cannot be read.
    """
    folder = Folder(find_result(sweep, results))
    record, memory = folder.read_spec(), ladder_memory(folder)
    spec = Spec.from_record(record["spec"], folder.path)
    axes, fingerprint = spec.ladder_spec.axes, record["fingerprint"]
    with closing(Kept(folder, record["storage"], spec.name, axes, fingerprint, memory)) as kept:
        known = kept.results()
    costs = {int(width): cost for width, cost in record.get("costs", {}).items()}
    ladder_spec = spec.ladder_spec_with(costs, record["target_flops"])
    ladder = replay(ladder_spec, known, given=given_trials(record), memory=memory)
    planned = record.get("planned")
    finished = Finished(folder, spec, ladder, known, record["target_flops"], planned, memory)
    memory.keep()
    return finished
