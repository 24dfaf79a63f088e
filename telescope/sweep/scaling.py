"""A scaling law measured: each optimizer tuned by a ladder, then trained at every size of a family.

The ladder of the spec's own optimizer is the spec's sweep, ``results/NAME``; another optimizer's is
``results/NAME/scaling/OPTIMIZER``. Every size is trained with the settings that a transfer gives
for its width and steps, in a folder of its own beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from telescope.answer.finished import Finished
from telescope.errors import RefusedError, SpecError
from telescope.files import write_json
from telescope.records import Result, Trial
from telescope.report.live import Screen
from telescope.report.scaling import ANSWER_FILE, FOLDER
from telescope.scaling.answer import Measured, analysed
from telescope.scaling.laws import PFLOPS_DAY
from telescope.spec.optimizers import optimizer_changes
from telescope.spec.scaling import ScalingTable, SizeTable
from telescope.spec.spec import Spec
from telescope.spec.variants import PLAIN, replaced
from telescope.store.folder import Folder
from telescope.store.memory import of_model
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.counting import ASSUMED_FLOP_RATE, required_tables
from telescope.sweep.family import Run, train_family
from telescope.sweep.fixed import with_target
from telescope.sweep.machine import workers as workers_at
from telescope.sweep.prepare import prepare
from telescope.sweep.run import Lent, Options, run, told_what_to_mend
from telescope.train.cost import StepCost

FIGURE_FILE = "scaling.png"


@dataclass(frozen=True)
class Size:
    """One size of the family, complete."""

    width: int
    depth: int | None
    """Keyword of the model file; None where neither the size nor [model] gives it."""
    batch_size: int
    steps: int
    tokens: int
    """Tokens of all steps."""

    @property
    def name(self) -> str:
        """Name of its folders, after the optimizer's: ``w64-d2-b16-s300``."""
        depth = "" if self.depth is None else f"-d{self.depth}"
        return f"w{self.width}{depth}-b{self.batch_size}-s{self.steps}"


@dataclass(frozen=True)
class Family:
    """A family of runs as the specs that [scaling] asks for."""

    spec: Spec
    table: ScalingTable
    tuned: Mapping[str, Spec]
    """Optimizer → the sweep that tunes it."""
    sizes: Mapping[Size, Mapping[str, Spec]]
    """Size → optimizer → the spec of its run; those of one size differ in the optimizer alone."""

    @classmethod
    def of(cls, spec: Spec) -> Family:
        """Make the specs.

        Raises:
            SpecError: there is no [scaling], or sizes or settings that cannot be; all are named.
        """
        if spec.trainer is not None:
            raise SpecError(
                f"{spec.name}: scaling: [trainer] trains this sweep, and has no placeholder for "
                "the optimizer and the batch size of a run; use the built-in trainer"
            )
        if (table := spec.scaling) is None:
            raise SpecError(
                f"{spec.name}: scaling: missing; a table [scaling] with sizes = [{{ width = 64, "
                "tokens = 1_000_000 }, ...] must be given"
            )
        faults: list[str] = []
        tuned: dict[str, Spec] = {}
        for name in table.optimizers:
            with _collected(faults, f"scaling.{name}"):
                tuned[name] = _tuned(spec, table, name)
        if faults:
            raise SpecError(*faults)
        sizes: dict[Size, dict[str, Spec]] = {}
        for number, asked in enumerate(table.sizes):
            size = _size(spec, asked)
            with _collected(faults, f"scaling.sizes.{number}"):
                if size in sizes:
                    raise SpecError("it has the width and steps of a size before, to the step")
                sizes[size] = {name: _of_size(one, size) for name, one in tuned.items()}
        if faults:
            raise SpecError(*faults)
        return cls(spec, table, tuned, sizes)


@contextmanager
def _collected(faults: list[str], key: str) -> Iterator[None]:
    """Collect the faults of the block inside, each after a key."""
    try:
        yield
    except SpecError as error:
        faults += [f"{key}: {fault}" for fault in error.faults]


def _tuned(spec: Spec, table: ScalingTable, name: str) -> Spec:
    """Return the sweep that tunes an optimizer: the spec itself for its own."""
    changes = optimizer_changes(name, spec.optimizer.rule, table.of(name))
    before = spec.as_dict()
    data = replaced(before, changes)
    made = Spec.from_dict(data, model_source=spec.model_source)
    if made.as_dict() == before:
        return spec
    return Spec.from_dict({**data, "name": name}, model_source=spec.model_source)


def _size(spec: Spec, asked: SizeTable) -> Size:
    """Complete a size by the spec."""
    if spec.train is None or spec.model is None:
        missing = "model" if spec.model is None else "train"
        raise SpecError(f"{missing}: missing; a table [{missing}] must be given to train models")
    depth = asked.depth or (spec.model.model_extra or {}).get("depth")
    batch_size = asked.batch_size or spec.train.batch_size
    per_step = batch_size * spec.train.sequence_length
    steps = max(1, round(asked.tokens / per_step))
    return Size(asked.width, depth, batch_size, steps, steps * per_step)


def _of_size(tuned: Spec, size: Size) -> Spec:
    """Return the spec of one run."""
    assert tuned.train is not None
    data = tuned.as_dict()
    # Resources by width are those of the widest width below; else only the base counts.
    below = tuned.ladder.widths if tuned.compute.is_by_width else tuned.ladder.widths[:1]
    widths = [width for width in below if width <= size.width]
    train = {
        "steps": size.steps,
        "batch_size": size.batch_size,
        "evals": min(tuned.train.evals, size.steps),
    }
    data |= {
        "name": f"{tuned.optimizer.name}-{size.name}",
        "ladder": data["ladder"] | {"widths": widths or [tuned.base_width]},
        "target": {"width": size.width},
        "train": data["train"] | train,
        "model": data["model"] | ({} if size.depth is None else {"depth": size.depth}),
    }
    return with_target(Spec.from_dict(data, model_source=tuned.model_source))


@dataclass(frozen=True)
class Planned:
    """One run of a size under one optimizer, and its cost."""

    spec: Spec
    cost: StepCost
    size: Size

    @classmethod
    def of(cls, spec: Spec, size: Size) -> Planned:
        """Count what a step costs; what the same model turned out to cost before is remembered.

        Raises:
            SpecError, ModelError: the model file does not take the keywords, or fails.
        """
        model, train = required_tables(spec)

        def count() -> StepCost:
            # Here, as torch takes seconds to import.
            from telescope.train.flops import step_cost
            from telescope.train.model import check_keywords

            check_keywords(model)
            base_width = spec.base_width
            return step_cost(model, train, spec.optimizer, width=size.width, base_width=base_width)

        of = ("size", model, train, spec.optimizer, size.width, spec.base_width)
        return cls(spec, of_model(StepCost, model, of, count), size)

    @property
    def flops(self) -> float:
        """FLOPs of the run, the optimizer included."""
        return self.cost.total * self.size.steps

    @property
    def flops_6nd(self) -> float:
        """6 · parameters without embeddings · tokens, as arXiv 2502.16982 counts."""
        return 6.0 * (self.cost.parameters - self.cost.embeddings) * self.size.tokens


def _differ(sizes: Iterable[Mapping[str, Planned]]) -> bool:
    """True if compute differs between sizes, for each optimizer, as FLOPs and as 6ND."""
    of = [
        [count for one in size.values() for count in (one.flops, one.flops_6nd)] for size in sizes
    ]
    return all(len(set(counts)) > 1 for counts in zip(*of, strict=True))


@dataclass(frozen=True)
class Plan:
    """The costs of a family, before anything trains."""

    family: Family
    ladders: Mapping[str, BuiltIn]
    sizes: Mapping[Size, Mapping[str, Planned]]
    target_flops: float
    """Of the spec's target run."""

    @classmethod
    def of(cls, family: Family) -> Plan:
        """Count everything.

        Raises:
            SpecError, ModelError, DataError: the spec, its model file or its corpus is wrong.
        """
        ladders = {name: _prepared(spec) for name, spec in family.tuned.items()}
        sizes = {
            size: {name: Planned.of(spec, size) for name, spec in specs.items()}
            for size, specs in family.sizes.items()
        }
        if not _differ(sizes.values()):
            raise SpecError(
                f"{family.spec.name}: scaling.sizes: all sizes cost the same compute, by their "
                "FLOPs or by 6ND; a law needs sizes of different compute"
            )
        own = ladders.get(family.spec.optimizer.name) or next(iter(ladders.values()))
        return cls(family, ladders, sizes, own.target_flops)

    @property
    def runs_flops(self) -> float:
        """FLOPs of all runs of the sizes."""
        seeds = len(self.family.table.seeds)
        return seeds * sum(one.flops for of in self.sizes.values() for one in of.values())

    def over_target(self, case: str) -> float:
        """Return the cost of everything, in target runs, in the "expected" or "worst" case."""
        ladders = sum(sweep.planned[case] * sweep.target_flops for sweep in self.ladders.values())
        return (ladders + self.runs_flops) / self.target_flops

    @property
    def refused(self) -> str | None:
        """The reason that it would not be run; None if it would."""
        for name, sweep in self.ladders.items():
            if refusal := sweep.refused:
                return f"the ladder of {name}: {refusal}"
        worst, most = self.over_target("worst"), self.family.spec.budget.max_over_target
        if worst <= most:
            return None
        return (
            f"the family may cost {worst:.3g} target runs, budget.max_over_target is {most:g}; "
            f"take fewer or smaller scaling.sizes, or fewer scaling.seeds, or set "
            f"budget.max_over_target = {worst * 1.05:.3g}"
        )

    def seconds(self, workers: int | None) -> tuple[float, str]:
        """Return the expected wall time, and what it assumes."""
        total = 0.0
        compute = self.family.spec.compute
        for sweep in self.ladders.values():
            at_once = workers_at(sweep.spec, workers, is_cluster=False)
            timed = sweep.as_plan(at_once, probe=False)["seconds"]
            total += timed["estimate"]
        for size, of in self.sizes.items():
            for one in of.values():
                at_once = workers_at(one.spec, workers, is_cluster=False)
                rate = compute.flop_rate or (
                    ASSUMED_FLOP_RATE * one.spec.compute.cpus_at(size.width)
                )
                total += len(self.family.table.seeds) * one.flops / rate / at_once[size.width]
        return total, timed["basis"]

    def as_dict(self, workers: int | None) -> dict[str, Any]:
        """The keys of `telescope scaling --plan --json`."""
        seconds, basis = self.seconds(workers)
        return {
            "name": self.family.spec.name,
            "optimizers": list(self.ladders),
            "seeds": list(self.family.table.seeds),
            "ladders": {
                name: {"expected": sweep.planned["expected"], "worst": sweep.planned["worst"]}
                for name, sweep in self.ladders.items()
            },
            "sizes": [_size_as_json(size, of) for size, of in self.sizes.items()],
            "over_target": {case: self.over_target(case) for case in ("expected", "worst")},
            "seconds": {"estimate": seconds, "basis": basis},
            "refused": self.refused,
        }


def _prepared(spec: Spec) -> BuiltIn:
    sweep = prepare(spec)
    assert isinstance(sweep, BuiltIn)
    return sweep


def _size_as_json(size: Size, of: Mapping[str, Planned]) -> dict[str, Any]:
    """One size's facts."""
    first = next(iter(of.values()))
    return {
        "width": size.width,
        "depth": size.depth,
        "batch_size": size.batch_size,
        "steps": size.steps,
        "tokens": size.tokens,
        **first.cost.parameters_as_json,
        "flops_6nd": first.flops_6nd,
        "flops": {name: one.flops for name, one in of.items()},
    }


def make_plan(spec: Spec, workers: int | None) -> dict[str, Any]:
    """Return the plan of the spec and of its variants as JSON values."""
    plans = {
        name: Plan.of(Family.of(one)).as_dict(workers) for name, one in spec.every_variant.items()
    }
    return {**plans.pop(PLAIN), "variants": plans}


def run_scaling(
    spec: Spec,
    options: Options,
    make_screen: Callable[[], Screen],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tune every optimizer, train every size, or go on with that, and fit the laws.

    The same for every variant of the spec, one after the other.

    Args:
        spec: with [scaling].
        options: the manner of the run; its `storage` is the sweep's own.
        make_screen: shows what happens.
        say: takes a line about what comes next.

    Returns:
        The answer as JSON values.

    Raises:
        RefusedError: a plan is over the budget, a ladder is stuck, or too few sizes have a loss.
        TelescopeError: see `run`.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    plans = {name: Plan.of(Family.of(one)) for name, one in spec.every_variant.items()}
    for plan in plans.values():
        if refusal := plan.refused:
            raise RefusedError(f"{plan.family.spec.name}: {refusal}")
    answers = {name: _run(plan, options, make_screen, say) for name, plan in plans.items()}
    return {**answers.pop(PLAIN), "variants": answers}


def _run(
    plan: Plan, options: Options, make_screen: Callable[[], Screen], say: Callable[[str], None]
) -> dict[str, Any]:
    """Run one variant."""
    family = plan.family
    place = Folder(options.results / family.spec.name / FOLDER)
    with told_what_to_mend(place), place.held(), ExitStack() as stack:
        # A session has room for the widths that it was opened for, where they differ in needs.
        shared = None if family.spec.compute.is_by_width else Lent(place.path, stack)
        sweeps = _prepared_runs(plan, is_cluster=options.ray_address is not None)
        tuned = {}
        for name, spec in family.tuned.items():
            say(f"{family.spec.name}: tuning {name}")
            own = replace(options, results=place.path, storage=None)
            finished = run(spec, options if spec is family.spec else own, make_screen, lent=shared)
            if finished.ladder.stuck:
                raise RefusedError(f"{spec.name}: stuck: {finished.ladder.stuck}")
            tuned[name] = finished
        runs = {
            (size, name): _run_of(place, size, sweep, tuned[name], family.table.seeds)
            for (size, name), sweep in sweeps.items()
        }
        say(f"{family.spec.name}: {len(plan.sizes)} sizes")
        # The longest first, so that the last hours do not wait for one of them.
        ordered = sorted(runs, key=lambda key: -plan.sizes[key[0]][key[1]].flops)
        known = train_family(
            [runs[key] for key in ordered],
            place,
            f"{family.spec.name}: sizes",
            options,
            make_screen,
            shared,
        )
        results = dict(zip(ordered, known, strict=True))
        answer = _answer(plan, tuned, runs, results)
        write_json(place.path / ANSWER_FILE, answer)
        from telescope.report.figures import write_laws_figure  # here, as a plan draws nothing

        write_laws_figure(place.path / FIGURE_FILE, answer)
        return answer


def _prepared_runs(plan: Plan, *, is_cluster: bool) -> dict[tuple[Size, str], BuiltIn]:
    """Prepare every run, and check its inputs before the first ladder takes hours.

    Raises:
        TelescopeError: see `run`.
    """
    sweeps = {
        (size, name): _prepared(one.spec)
        for size, of in plan.sizes.items()
        for name, one in of.items()
    }
    for sweep in sweeps.values():
        sweep.check_inputs(is_cluster=is_cluster)
    return sweeps


def _run_of(
    place: Folder, size: Size, sweep: BuiltIn, finished: Finished, seeds: Iterable[int]
) -> Run:
    """Return the trials of one size under one optimizer, with the settings of a transfer."""
    point = finished.transfer(width=size.width, steps=size.steps).point
    trials = tuple(Trial(size.width, point, seed) for seed in seeds)
    return Run(sweep, Folder(place.path / sweep.spec.name), trials)


Losses = Mapping[str, Mapping[int, Result | None]]
"""Optimizer → seed → result of one size."""


def _answer(
    plan: Plan,
    tuned: Mapping[str, Finished],
    runs: Mapping[tuple[Size, str], Run],
    results: Mapping[tuple[Size, str], Mapping[Trial, Result]],
) -> dict[str, Any]:
    """Fit the laws, and return everything as JSON values.

    A size counts with the seeds that have a loss under every optimizer.

    Raises:
        RefusedError: fewer than two sizes have one.
    """
    names = tuple(plan.ladders)
    measured: dict[Size, Losses] = {
        size: {
            name: {t.seed: results[size, name].get(t) for t in runs[size, name].trials}
            for name in names
        }
        for size in sorted(plan.sizes, key=lambda size: plan.sizes[size][names[-1]].flops)
    }
    seeds = {size: _complete(losses) for size, losses in measured.items()}
    usable = [size for size in measured if seeds[size]]
    missing = [line for size, losses in measured.items() for line in _missing(size, losses)]
    if len(usable) < 2:
        raise RefusedError(
            f"{plan.family.spec.name}: nothing to fit: {len(usable)} of {len(measured)} sizes have "
            f"a loss under every optimizer; {'; '.join(missing[:3])}"
        )
    if not _differ(plan.sizes[size] for size in usable):
        raise RefusedError(
            f"{plan.family.spec.name}: nothing to fit: the {len(usable)} sizes that have a loss "
            f"under every optimizer cost the same compute; {'; '.join(missing[:3])}"
        )

    def fitted(flops: Callable[[Planned], float]) -> dict[str, Any]:
        compute = {
            name: tuple(flops(plan.sizes[size][name]) / PFLOPS_DAY for size in usable)
            for name in names
        }
        losses = {
            name: tuple(
                tuple(_loss(measured[size][name][seed]) for seed in seeds[size]) for size in usable
            )
            for name in names
        }
        return analysed(Measured(names, compute, losses)).as_dict()

    laws = fitted(lambda one: one.flops)
    return {
        "name": plan.family.spec.name,
        "tuning": {name: _tuning(finished) for name, finished in tuned.items()},
        "sizes": [
            {
                **_size_as_json(size, plan.sizes[size]),
                "seeds": seeds[size],
                "runs": {name: _runs(runs[size, name], losses[name]) for name in names},
            }
            for size, losses in measured.items()
        ],
        "laws": laws,
        "laws_6nd": fitted(lambda one: one.flops_6nd),
        "missing": missing,
        "sentence": laws["sentence"],
    }


def _complete(losses: Losses) -> list[int]:
    """Return the seeds with a loss under every optimizer."""
    every = [{s for s, r in of.items() if r and r.loss is not None} for of in losses.values()]
    return [seed for seed in next(iter(losses.values())) if all(seed in of for of in every)]


def _loss(result: Result | None) -> float:
    assert result is not None
    assert result.loss is not None
    return result.loss


def _missing(size: Size, losses: Losses) -> Iterator[str]:
    """Say which runs of a size have no loss, and why."""
    for name, of in losses.items():
        for seed, result in of.items():
            if result is None or result.loss is None:
                why = f"{result.status}, {result.reason.splitlines()[0]}" if result else "not run"
                yield f"{name}-{size.name}, seed {seed}: {why}"


def _runs(run: Run, losses: Mapping[int, Result | None]) -> dict[str, Any]:
    """One size's runs under one optimizer."""
    return {
        "point": dict(run.trials[0].point),
        "losses": {str(seed): result and result.loss for seed, result in losses.items()},
        "statuses": {str(seed): result and str(result.status) for seed, result in losses.items()},
        "seconds": sum(result.seconds for result in losses.values() if result),
    }


def _tuning(finished: Finished) -> dict[str, Any]:
    """The ladder behind an optimizer's settings."""
    point, certificate = finished.target_point(), finished.certificate
    return {
        "folder": str(finished.folder.path),
        "width": finished.spec.target.width,
        "point": point and dict(point),
        "verdict": certificate and certificate.verdict,
        "trials": len(finished.results),
        "over_target": sum(finished.cost_by_width().values()),
    }
