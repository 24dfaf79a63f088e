"""A frontier's folder, read: every arm with its results, and the answer.

An arm is a sweep of one width in ``results/NAME/frontier/ARM``, whose folder ``repeats`` has its
chosen point with further seeds. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from telescope.answer.finished import Finished, kept_beside, open_result
from telescope.config import all_faults, require
from telescope.errors import SpecError
from telescope.files import write_json
from telescope.frontier.answer import answer
from telescope.frontier.arms import Arm, plan_arms
from telescope.frontier.curves import Envelope, envelope
from telescope.frontier.devices import Devices, NotKnownError, Step
from telescope.records import Result, Status, Trial, as_json
from telescope.spec.frontier import DevicesTable, FrontierTable
from telescope.spec.optimizers import optimizer_changes
from telescope.spec.placeholders import names_in
from telescope.spec.spec import Spec
from telescope.spec.tables import TrainerTable
from telescope.spec.variants import replaced
from telescope.store.folder import Folder
from telescope.store.memory import Memory, code_of

FOLDER = "frontier"
"""The folder of all arms in the sweep's."""
REPEATS = "repeats"
"""The folder of an arm's chosen point with further seeds, in the arm's."""
RECORD_FILE = "frontier.json"
"""The file in the folder of all arms with the spec, and what a step of each arm costs."""
ANSWER_FILE = "answer.json"
"""The file there with the last answer, the keys of `frontier --json`."""
FIGURE_FILE = "frontier.png"
MEMORY_FILE = "fits.json"
FORMAT = 1
"""Version of the record."""


def table_of(spec: Spec) -> FrontierTable:
    """Return the spec's table [frontier].

    Raises:
        SpecError: it has none.
    """
    if spec.frontier is None:
        raise SpecError(
            f"{spec.name}: frontier: missing; a table [frontier] with batch_sizes, tokens and "
            "steps must be given to compare optimizers"
        )
    return spec.frontier


def arm_specs(spec: Spec) -> dict[Arm, Spec]:
    """Return every arm with its sweep; two of one batch size differ in the optimizer alone.

    Raises:
        SpecError: the spec has no [frontier], or an arm's keys are wrong.
    """
    table = table_of(spec)
    arms = plan_arms(
        table.optimizers,
        table.batch_sizes,
        sequence_length=_sequence_length(spec),
        tokens=table.tokens,
        steps=table.steps,
    )
    made, faults = dict[Arm, Spec](), dict[str, list[str]]()
    for arm in arms:
        try:
            data = _foreign_arm(spec, arm) if spec.trainer else _own_arm(spec, arm)
            made[arm] = Spec.from_dict(data, model_source=spec.model_source)
        except SpecError as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(arm.name)
    if faults:
        raise SpecError(*(f"frontier, {', '.join(of)}: {fault}" for fault, of in faults.items()))
    return made


def _sequence_length(spec: Spec) -> int:
    """Return the tokens of a sequence, after a check that the arms can be told apart.

    Raises:
        SpecError: with every fault that [frontier] has next to the trainer.
    """
    table, given = table_of(spec), table_of(spec).sequence_length
    with all_faults():
        if spec.trainer is None:
            require(spec.train is not None, "train", None, "given, as a table")
            is_said = "left out: [train] has it"
            require(given is None, "frontier.sequence_length", given, is_said)
            return spec.train.sequence_length if spec.train else 1
        require(given is not None, "frontier.sequence_length", given, "given beside [trainer]")
        _check_foreign(table, spec.trainer)
    return given or 1


def _check_foreign(table: FrontierTable, trainer: TrainerTable) -> None:
    """Check that a foreign trainer is told optimizer, batch size and steps."""
    for name, example in (("optimizer", "'muon'"), ("batch_size", "16")):
        value = trainer.arguments.get(name)
        allowed = f"given, as {example}: the arms replace it, and the trainer has to be told"
        require(value is not None, f"trainer.arguments.{name}", value, allowed)
    batch_size = trainer.arguments.get("batch_size", 1)
    is_count = isinstance(batch_size, int) and batch_size >= 1
    require(is_count, "trainer.arguments.batch_size", batch_size, "an integer >= 1, sequences")
    require(trainer.steps is not None, "trainer.steps", None, "given: the arms replace it")
    used = {name for _, text in trainer.texts() for name in names_in(text)}
    if trainer.command is not None:
        require("steps" in used, "trainer.command", list(trainer.command), "with {steps} in it")
    for name in ("muon", "adamw"):
        own = table.of(name)
        keys = own.model_dump(exclude_none=True, exclude={"axes"}) if own else {}
        allowed = "left out: another trainer sets its optimizer itself; axes alone count"
        require(not keys, f"frontier.{name}", keys, allowed)


def _own_arm(spec: Spec, arm: Arm) -> dict[str, Any]:
    """Return the tables of an arm that telescope trains itself."""
    table = table_of(spec)
    changes = optimizer_changes(arm.optimizer, spec.optimizer.rule, table.of(arm.optimizer))
    data = replaced(spec.as_dict(), changes)
    train = {"steps": arm.steps, "batch_size": arm.batch_size, "schedule": "constant"}
    train |= {"evals": min(table.evals, arm.steps)}
    return {**data, "train": data["train"] | train, **_as_one_width(spec, arm)}


def _foreign_arm(spec: Spec, arm: Arm) -> dict[str, Any]:
    """Return the tables of an arm that another program trains."""
    assert spec.trainer is not None
    assert spec.cost is not None
    assert spec.trainer.steps is not None
    table = table_of(spec)
    axes = optimizer_changes(arm.optimizer, spec.optimizer.rule, table.of(arm.optimizer))["axes"]
    told = {"optimizer": arm.optimizer, "batch_size": arm.batch_size}
    trainer = {"arguments": told, "steps": arm.steps}
    data = replaced(spec.as_dict(), {"axes": axes, "trainer": trainer})
    if spec.cost.flops is not None:
        longer = arm.tokens / foreign_tokens(spec)
        flops = {width: flops * longer for width, flops in spec.cost.flops.items()}
        data["cost"] = {"flops": flops}
    return data | _as_one_width(spec, arm)


def foreign_tokens(spec: Spec) -> float:
    """Return the tokens of a run as a foreign spec describes it."""
    assert spec.trainer is not None
    steps, batch_size = spec.trainer.steps or 1, spec.trainer.arguments["batch_size"]
    return float(steps) * float(batch_size) * (table_of(spec).sequence_length or 1)


def _as_one_width(spec: Spec, arm: Arm) -> dict[str, Any]:
    """Return the tables that make an arm a sweep of one width, whose budget counts trials."""
    table, width = table_of(spec), table_of(spec).width or spec.base_width
    ladder = {"widths": [width], "policy": "adaptive", "until": "predicted"}
    return {
        "name": arm.name,
        "ladder": spec.as_dict()["ladder"] | ladder,
        "target": {"width": width},
        "budget": {"max_over_target": float(table.trials)},
    }


@dataclass(frozen=True)
class ArmResults:
    """The content of an arm's folder."""

    arm: Arm
    finished: Finished
    repeats: tuple[Result, ...]
    """Of the chosen point with further seeds, without curves."""

    @property
    def _parts(self) -> tuple[tuple[Folder, Sequence[Result]], ...]:
        """The folders of tuning and of repeats, each with its results."""
        folder = self.finished.folder
        return (folder, self.finished.results), (Folder(folder.path / REPEATS), self.repeats)

    @property
    def results(self) -> list[Result]:
        """All results, with their curves."""
        return [
            replace(result, curve=folder.read_curve(result.trial))
            for folder, results in self._parts
            for result in results
        ]

    @property
    def stuck(self) -> str | None:
        """The reason that it has no choice and gets none; None while it may."""
        return self.finished.ladder.stuck

    def missing(self, seeds: int) -> list[Trial]:
        """List the trials of the chosen point that neither tuning nor repeats have trained.

        Args:
            seeds: number of seeds that the chosen point is to have.
        """
        if not self.finished.ladder.choices:
            return []
        first, choice = self.finished.spec.ladder.seeds[0], self.finished.ladder.choices[-1]
        known = {
            result.trial
            for result in (*self.finished.results, *self.repeats)
            if result.status is not Status.FAILED
        }
        wanted = (Trial(choice.width, choice.point, n) for n in range(first, first + seeds))
        return [trial for trial in wanted if trial not in known]

    def step(self, facts: Mapping[str, Any]) -> Step | None:
        """Return the cost of a step; None before a trial has a loss.

        Args:
            facts: those of the record about the arm.
        """
        losses = [result.loss for result in (*self.finished.results, *self.repeats)]
        if all(loss is None for loss in losses):
            return None
        known = {key: facts[key] for key in Step.__dataclass_fields__ if key in facts}
        return Step(self._step_seconds(), **known)

    def _step_seconds(self) -> float | None:
        """Return the seconds of a step of a trial that trains alone; None if unknown.

        The seconds of a trial in a pack are its share of the pack's, and a pack may take no longer
        than one trial. So if all trials were in packs, the probes before the packs count.
        """
        alone, probed = list[float](), list[float]()
        for folder, results in self._parts:
            timing = folder.timing()
            probed += timing.alone
            alone += [
                result.seconds / self.arm.steps
                for result in results
                if result.loss is not None and str(result.trial) not in timing.packed
            ]
        # The median: a machine that was busy for a while slows down some of them.
        return median(alone or probed) if alone or probed else None


def read_arm(arm: Arm, place: Path) -> ArmResults | None:
    """Read one arm's folder; None if it has not been started."""
    folder = place / arm.name
    if not Folder(folder).exists:
        return None
    finished = open_result(folder, place)
    return ArmResults(arm, finished, tuple(_repeats(finished)))


def _repeats(finished: Finished) -> list[Result]:
    """Return the results of an arm's repeats so far."""
    if not (finished.folder.path / REPEATS).is_dir():
        return []
    axes = finished.spec.ladder_spec.axes
    with closing(kept_beside(finished.folder, REPEATS, axes)) as kept:
        known = kept.results()
        kept.memory.keep()
        return known


def digest_of(spec: Spec) -> str:
    """Return a digest of a spec with its [frontier] and its model file."""
    whole = {**spec.as_dict(), "frontier": table_of(spec).model_dump(mode="json")}
    for key in ("compute", "budget"):
        whole.pop(key, None)
    text = json.dumps([whole, spec.model_source], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_record(spec: Spec, facts: Mapping[str, Mapping[str, Any]], place: Path) -> None:
    """Write the record of a frontier: whose it is, and what a step of each arm costs.

    Args:
        spec: with [frontier].
        facts: name of an arm → fields of `Step`, as far as they are known.
        place: the folder of all arms.
    """
    record = {"format": FORMAT, "name": spec.name, "digest": digest_of(spec), "arms": facts}
    write_json(place / RECORD_FILE, record)


def read_record(place: Path) -> dict[str, Any]:
    """Return what `write_record` wrote; {} if there is none, or it is damaged."""
    with suppress(OSError, ValueError):
        record = json.loads((place / RECORD_FILE).read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("format") == FORMAT:
            return record
    return {}


def read_answer(place: Path) -> dict[str, Any] | None:
    """Return the last answer of a frontier; None if there is none, or it is damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((place / ANSWER_FILE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and "sentence" in found else None
    return None


def answer_if_finished(spec: Spec, results: Path) -> dict[str, Any] | None:
    """Return the answer of a frontier with nothing left to train; None otherwise.

    Args:
        spec: with [frontier].
        results: the folder of all results.
    """
    place = results / spec.name / FOLDER
    if read_record(place).get("digest") != digest_of(spec):
        return None
    arms = [read_arm(arm, place) for arm in arm_specs(spec)]
    started = [arm for arm in arms if arm is not None]
    seeds = table_of(spec).repeats
    is_whole = len(started) == len(arms) and all(
        not arm.stuck and arm.finished.ladder.is_finished and not arm.missing(seeds)
        for arm in started
    )
    return answer_of(spec, started, place) if is_whole else None


def answer_of(spec: Spec, arms: Sequence[ArmResults], place: Path) -> dict[str, Any]:
    """Return what the arms say, as JSON values.

    Args:
        spec: with [frontier].
        arms: those that have been started, in the order of the plan.
        place: the folder of all arms.

    Raises:
        SpecError: the device model needs what is not known of these runs.
    """
    table, facts = table_of(spec), read_record(place).get("arms", {})
    memory = Memory(
        place / MEMORY_FILE,
        code_of("frontier", "ladder", "records", libraries=("numpy", "scipy")),
    )
    fits = {arm.arm: _envelope(arm, memory) for arm in arms}
    memory.keep()
    known = {arm: fit for arm, fit in fits.items() if fit is not None}
    steps = {arm.arm: arm.step(facts.get(arm.arm.name, {})) for arm in arms}
    own = table.devices or DevicesTable()
    devices = Devices(own.counts, own.flops_per_second, own.bandwidth)
    try:
        said = answer(
            known,
            {arm: step for arm, step in steps.items() if step is not None},
            devices,
            table.losses,
            table.optimizers,
        )
    except NotKnownError as error:
        raise SpecError(f"{spec.name}: {error}") from error
    found = {
        "name": spec.name,
        **said.as_dict(),
        "arms": [_arm_as_json(arm, fits[arm.arm]) for arm in arms],
        "stuck": [{"arm": arm.arm.name, "reason": arm.stuck} for arm in arms if arm.stuck],
    }
    write_json(place / ANSWER_FILE, found)
    return found


def _envelope(arm: ArmResults, memory: Memory) -> Envelope | None:
    """Return an arm's fit, from memory where it was made before."""
    spec, results = arm.finished.ladder.spec, arm.results
    content = sorted((replace(r, worker="") for r in results), key=lambda r: str(r.trial))
    return memory.recall(
        Envelope | None,
        (spec, content, arm.arm.batch_tokens),
        lambda: envelope(spec, results, arm.arm.batch_tokens),
    )


def _arm_as_json(arm: ArmResults, fit: Envelope | None) -> dict[str, Any]:
    """Return an arm's facts as JSON values."""
    finished, facts = arm.finished, arm.arm
    choice = finished.ladder.choices[-1] if finished.ladder.choices else None
    results = [*finished.results, *arm.repeats]
    return {
        "optimizer": facts.optimizer,
        "batch_size": facts.batch_size,
        "batch_tokens": facts.batch_tokens,
        "steps": facts.steps,
        "tokens": facts.tokens,
        "trials": len(finished.results),
        "repeats": len(arm.repeats),
        "point": choice and dict(choice.point),
        "intervals": choice and as_json(choice.intervals),
        "at_edge": list(choice.at_edge) if choice else [],
        "flops": sum(result.flops for result in results),
        "seconds": sum(result.seconds for result in results),
        "envelope": fit and as_json(vars(fit)),
    }
