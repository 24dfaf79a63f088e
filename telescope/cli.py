"""The commands: parse, call, print. `telescope.report.terminal` formats the output for people.

Every slow import is inside the command that needs it, so that `--help`, `ls` and `status` answer at
once.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import telescope
from telescope.errors import RefusedError, SpecError, TelescopeError
from telescope.files import is_private, stand_in
from telescope.streams import open_streams, reader_needed, use_utf8_names

if TYPE_CHECKING:
    from telescope.answer.finished import Finished
    from telescope.config import DataConfig
    from telescope.spec.spec import Spec
    from telescope.transfer.settings import Transfer

app = typer.Typer(
    name="telescope",
    help="Tune Muon's learning rate and weight decay on small muP models, width by width, and "
    "transfer them to the one large run.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 bad usage or input, 130 interrupted. "
    "--debug shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="A TOML file, or the name of a bundled sweep.")
]
SweepArgument = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A name under the results folder, or a path to one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key: axes.lr.points=5. Repeatable."
    ),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Run under another name.")]
ResultsOption = Annotated[
    Path, typer.Option("--results", metavar="DIR", help="The folder of all results.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Trials at once; overrides compute.workers.")
]
DispatcherOption = Annotated[
    str, typer.Option(help="ray, or inline: one trial after the other in this process.")
]
StorageOption = Annotated[
    str | None, typer.Option(help="An Optuna RDB URL; left out, SQLite beside the results.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="A running Ray cluster; left out, local Ray is started.")
]
LogOption = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="TRACKER",
        help="tensorboard, wandb, mlflow or trackio; overrides log.to. Repeatable.",
    ),
]
PlanOption = Annotated[bool, typer.Option("--plan", help="Say what it will cost; train nothing.")]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON to a file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RESULTS = Path("results")
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
FITTING = (
    *("audit", "compare", "frontier", "launch", "plan", "report", "run", "scaling", "show"),
    "transfer",
)
"""Commands that may fit a ladder."""
SET_BY_SLURM = {
    *("results", "name", "workers", "dispatcher", "ray_address", "storage", "overrides"),
    *("cpus_per_worker", "gpus_per_worker", "prepare", "as_json"),
}
"""Parameters of run and launch that a script of `slurm` sets."""
WATCH_SECONDS = 0.5
"""Pause between two readings of a heartbeat."""


def _print_version(wanted: bool) -> None:
    if wanted:
        _say(f"telescope {telescope.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Take the options that come before a verb."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The spec to write, FILE.toml.")] = Path(
        "sweep.toml"
    ),
    command: Annotated[
        bool,
        typer.Option("--command", help="For a training script of your own, with one that runs."),
    ] = False,
) -> None:
    """Write a commented starter spec, and beside it the model file or the trainer that it names."""
    from telescope.spec.catalog import bundled

    if path.suffix != ".toml":
        raise SpecError(f"{path}: must end in .toml, as every verb expects of a spec: {path}.toml")
    here = Path(__file__).parent / "spec"
    source = here / "starter_trainer.py" if command else bundled() / "models" / "gpt.py"
    beside = path.parent / ("train.py" if command else "gpt.py")
    if path.exists():
        raise SpecError(f"{path}: exists already; give another path")
    if beside.exists() and beside.read_bytes() != source.read_bytes():
        raise SpecError(f"{beside}: is there already and is another file; use another folder")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "sweep"
    starter = here / ("starter_command.toml" if command else "starter.toml")
    text = starter.read_text(encoding="utf-8").replace("STARTER_NAME", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        shutil.copyfile(source, beside)
    except OSError as error:
        raise SpecError(f"{path}: cannot be written: {error.strerror}") from error
    _say(f"wrote {path} and {beside}; next: telescope plan {shlex.quote(str(path))}")


@app.command()
def plan(
    spec: SpecArgument,
    overrides: SetOption = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Time a few real steps at every width first.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Say also what the target run needs on so many devices."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a sweep will cost: trials, parameters, FLOPs, time, share of the target run."""
    loaded = _load(spec, overrides, None)
    _make_tokens(loaded)
    from telescope.sweep.planning import make_plan

    plan, warning = make_plan(loaded, probe=probe, devices=devices)
    if as_json:
        _print_json({**plan, "refused": warning})
        return
    from telescope.report.terminal import print_plan

    print_plan(_console(), plan, warning)


@app.command()
def check(
    spec: SpecArgument,
    results: ResultsOption = RESULTS,
    name: NameOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Coordinate check: does anything in the model grow or shrink with the width as it trains?

    Trains a few steps at four widths from the base width on; PASS, or FAIL and exit code 1.
    """
    loaded = _load(spec, overrides, name)
    if loaded.trainer:
        raise SpecError(
            f"{loaded.name}: no coordinate check: [trainer] trains it, so there is no model of "
            "ours to check"
        )
    _make_tokens(loaded)
    from telescope.store.folder import Folder
    from telescope.sweep.checking import check_in_full, check_title, describe_verdict

    folder = Folder(results / loaded.name)
    from telescope.report.progress import progress_bar

    with progress_bar(f"{loaded.name}: coordinate check") as progress:
        measured, kept = check_in_full(loaded, folder, lambda line: _say(line, err=True), progress)
    if as_json:
        _print_json(measured.as_dict())
    else:
        from telescope.report.terminal import print_check

        console = _console()
        print_check(console, measured, check_title(loaded))
        console.print(
            f"verdict    {measured.verdict}: {describe_verdict(measured)}", soft_wrap=True
        )
        if kept:
            console.print(f"figure     {folder.path / 'coordcheck.png'}", soft_wrap=True)
    if not measured.passed:
        raise typer.Exit(1)


@app.command()
def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC|FILES...", help="A sweep, whose data it is, or files and globs."
        ),
    ],
    vocabulary: Annotated[
        int, typer.Option("--vocab-size", help="Token ids, the 256 bytes included.")
    ],
    out: Annotated[Path, typer.Option(help="The tokenizer to write.")] = Path("tokenizer.json"),
    shards: Annotated[
        Path | None, typer.Option(help="Write the tokens too: train.bin and val.bin, as nanoGPT's.")
    ] = None,
    field: Annotated[
        str, typer.Option(help="Of FILES: the field or column with the text.")
    ] = "text",
    overrides: SetOption = None,
) -> None:
    """Train a small byte-level BPE on a corpus, without what is held out of it."""
    from telescope.report.progress import progress_bar

    config = _corpus_of(sources, field, overrides)
    from telescope.data.tokenizing import check_shards, make_tokenizer, write_shards

    if shards:
        check_shards(config, shards)
    with progress_bar("reading", "merging pairs …") as progress:
        line = make_tokenizer(config, vocabulary, out, progress)
    _say(line)
    if shards:
        with progress_bar("tokenizing") as progress:
            line = write_shards(config, out, shards, progress)
        _say(line)


@app.command()
def run(
    spec: SpecArgument,
    results: ResultsOption = RESULTS,
    name: NameOption = None,
    workers: WorkersOption = None,
    dispatcher: Annotated[
        str,
        typer.Option(
            help="ray; workers, which join by `telescope worker`; or inline: one trial after the "
            "other in this process."
        ),
    ] = "ray",
    ray_address: AddressOption = None,
    storage: StorageOption = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Make a short coordinate check before the first trial."
        ),
    ] = True,
    accept_trainer: Annotated[
        bool,
        typer.Option(
            "--accept-trainer",
            help="Say that an edited trainer trains as before: finished trials still count.",
        ),
    ] = False,
    log: LogOption = None,
    overrides: SetOption = None,
) -> None:
    """Run a telescoping sweep, or go on with it where it stopped."""
    _check_dispatcher(dispatcher, ("ray", "inline", "workers"))
    overrides = [*(overrides or ()), *([f"log.to={json.dumps(log)}"] if log else ())]
    loaded, results = _load_or_kept(spec, overrides, name, results)
    console = _console()
    if console.is_terminal:
        what = "trainer" if loaded.trainer else "model and the corpus"
        console.print(f"{loaded.name}: checking the {what} …", style="dim")
    _make_tokens(loaded)
    with _interruptible(f"{loaded.name}: interrupted; the same command goes on where it stopped"):
        from telescope.report.live import make_screen
        from telescope.report.terminal import print_answer
        from telescope.sweep.run import Options
        from telescope.sweep.run import run as run_sweep

        options = Options(results, workers, dispatcher, ray_address, storage, check, accept_trainer)
        finished = run_sweep(loaded, options, lambda: make_screen(console))
    if stuck := finished.ladder.stuck:
        _say(f"telescope: {loaded.name}: stuck: {stuck}", err=True)
        raise typer.Exit(1)
    print_answer(console, finished, finished.transfer())


@app.command()
def worker(
    sweep: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A sweep that runs, or soon will: its name, or a path to its folder.",
        ),
    ],
    storage: StorageOption = None,
    results: ResultsOption = RESULTS,
    wait: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="Longest wait for a driver or a database that is away."
        ),
    ] = 600.0,
) -> None:
    """Join a sweep that runs with --dispatcher workers, and train its trials until it ends.

    On SIGTERM or Ctrl-C the trial in training is given back at once.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from telescope.sweep.joining import join

    if os.sep in sweep:
        results, sweep = Path(sweep).parent, Path(sweep).name
    try:
        join(sweep, storage, results, patience=wait, note=_say)
    except KeyboardInterrupt:
        _say(f"{sweep}: interrupted; what was not delivered is on offer again", err=True)
        raise typer.Exit(130) from None


@app.command()
def status(
    sweep: SweepArgument,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Say it again whenever it changes, until it has ended.")
    ] = False,
) -> None:
    """Say how far a sweep is; works from another terminal while it runs."""
    from telescope.report.status import describe_status, describe_targets, read_status

    state = read_status(sweep, results)
    while watch and state["state"] == "running":
        if as_json:
            _say(json.dumps(state, allow_nan=False))
        else:
            _say(describe_status(state))
        before = state["done"], state["running"], state["state"]
        while (state["done"], state["running"], state["state"]) == before:
            time.sleep(WATCH_SECONDS)
            state = read_status(sweep, results)
    if as_json:
        _print_json(state)
        return
    for line in (describe_status(state), *describe_targets(state.get("targets", ()))):
        _say(line)


@app.command()
def show(
    sweep: SweepArgument,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every trial as CSV.")] = False,
) -> None:
    """Show the choice per width and why, and the answer for the target."""
    finished = _open(sweep, results)
    if as_csv:
        from telescope.report.frames import trials_frame

        frame = trials_frame(finished.ladder, finished.results)
        _say(frame.to_csv(index=False), nl=False)
    elif as_json:
        from telescope.report.terminal import show_as_json

        _print_json(show_as_json(finished))
    else:
        from telescope.report.terminal import print_answer

        print_answer(_console(), finished)


@app.command()
def transfer(
    sweep: SweepArgument,
    width: Annotated[int | None, typer.Option(min=1, help="Left out, the spec's target.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the target run; rescales the weight decay.")
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A JSON file of parameter shapes; overrides trainer.shapes."
        ),
    ] = None,
    roles: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=ROLE",
            help="A role for names in the shapes, as '*.down.weight=residual'; may be repeated.",
        ),
    ] = None,
    fold_readout: Annotated[
        bool,
        typer.Option("--fold-readout", help="For code without mup's multiplier on the logits."),
    ] = False,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Another trainer's words: torch, hf, megatron, megatron-bridge, torchtitan, "
            "deepspeed, deepspeed-json, optax, maxtext, levanter; or json.",
        ),
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            help="Write the closest settings where the trainer has one for groups that differ.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the JSON, or the format, to a file.")
    ] = None,
) -> None:
    """Give the target run's settings: one group per (role, shape), drop-in for torch.optim."""
    foreign = _foreign_format(format, as_json, approximate)
    finished = _open(sweep, results)
    settings = finished.transfer(
        width=width,
        steps=steps,
        shapes=shapes,
        roles=_roles(roles or []),
        fold_readout=fold_readout,
    )
    exported = _exported(finished.spec, settings, foreign, approximate) if foreign else None
    if out:
        if exported is None:
            _write_json(out, settings.as_dict())
        else:
            _write_text(out, exported)
    if as_json or (format == "json" and not out):
        _print_json(settings.as_dict())
    elif out:
        _say(f"wrote {out}")
    elif exported is not None:
        _say(exported, nl=False)
    else:
        from telescope.report.terminal import print_transfer

        print_transfer(_console(), settings, finished.spec)
    if settings.certificate and settings.certificate.verdict == "FAIL":
        reasons = "; ".join(settings.certificate.problems)
        raise RefusedError(
            f"{finished.spec.name}: certificate FAIL at width {settings.width}: the settings are "
            f"given, and not to be relied on: {reasons}"
        )


def _roles(options: list[str]) -> dict[str, str]:
    """Parse the patterns of --roles, in their order."""
    faults = [f"--roles: got {o!r}, must be PATTERN=ROLE" for o in options if "=" not in o]
    if faults:
        raise SpecError(*faults)
    pairs = [option.rpartition("=")[::2] for option in options]
    roles = {pattern.strip(): role.strip() for pattern, role in pairs}
    if len(roles) < len(pairs):
        raise SpecError("--roles: a pattern is given twice; leave one of the two out")
    return roles


@app.command()
def export_model(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A target run: SWEEP if it has one, SWEEP/RUN, or the run's folder."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The folder to write; it must be new or empty.")
    ],
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="hf, for Hugging Face transformers."),
    ] = "hf",
    step: Annotated[
        int | None, typer.Option(min=0, help="The checkpoint's; left out, the last one.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The run's tokenizer, if its file has moved."),
    ] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Write a target run's model for other programs: weights, config and tokenizer."""
    if to != "hf":
        raise SpecError(f"--to: got {to!r}, must be hf")
    from telescope.target.export import export_run, find_run

    facts = export_run(find_run(run, results), out, step=step, tokenizer=tokenizer)
    _say(
        f"wrote {out}: {facts['layout']}, {facts['parameters']:,} parameters, step {facts['step']} "
        f"of {facts['steps']}" + f" ({facts['state']})" * (facts["state"] != "finished")
    )
    _say(f"logits as the model's, within {facts['difference']:.1g} of the largest")
    if facts["tokenizer"] is None:
        _say("no tokenizer: the run's data are tokens; --tokenizer FILE adds it")


@app.command()
def launch(
    sweep: SweepArgument,
    width: Annotated[int | None, typer.Option(min=1, help="Left out, the spec's target.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the run; rescales the weight decay.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation and data order.")] = 0,
    run: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run; left out, width-W.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ranks; left out, one per GPU, or one on the CPU.")
    ] = None,
    cpus_per_worker: Annotated[
        int | None, typer.Option(min=1, help="Left out, an even share of this machine's.")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="Left out, 1 where there are GPUs.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; left out, local Ray is started.")
    ] = None,
    micro_batch: Annotated[
        int,
        typer.Option(min=0, help="Most sequences of a rank's forward pass; 0: all of its rows."),
    ] = 0,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16; left out, as in the sweep.")
    ] = None,
    clip: Annotated[
        float, typer.Option(min=0, help="Largest norm of all gradients together; 0: no clipping.")
    ] = 0.0,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; left out, as in the sweep."),
    ] = None,
    activation_checkpointing: Annotated[
        bool,
        typer.Option("--activation-checkpointing", help="Compute layers twice, to save memory."),
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Divide the parameters over the ranks too (FSDP2).")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: a twentieth of the run.")
    ] = 0,
    keep_every: Annotated[
        int, typer.Option(min=0, help="Keep checkpoints at multiples of this many steps for good.")
    ] = 0,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Launch although the certificate says FAIL.")
    ] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Write the run's folder, for torchrun; train nothing.")
    ] = False,
    log: LogOption = None,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
) -> None:
    """Train the target with the sweep's answer, or go on with it where it stopped."""
    if precision not in (None, "fp32", "bf16"):
        raise SpecError(f"--precision: got {precision!r}, must be 'fp32' or 'bf16'")
    finished = _open(sweep, results)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as on Ctrl-C: a batch system's end
    from telescope.sweep import launching
    from telescope.sweep.launch_asked import Launch
    from telescope.target.record import Manner

    asked = Launch(
        width=width,
        steps=steps,
        seed=seed,
        run=run,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        ray_address=ray_address,
        precision=precision,  # type: ignore[arg-type]  # checked above
        compile=compile,
        clip=clip,
        unproven=unproven,
        manner=Manner(
            micro_batch=micro_batch,
            checkpoint_every=checkpoint_every,
            keep_every=keep_every,
            activation_checkpointing=activation_checkpointing,
            shard=shard,
        ),
    )
    from telescope.sweep.tracking import logged_target, trackers

    to = trackers(finished.spec, log)
    folder = launching.prepare(finished, asked)
    if prepare:
        _say(f"wrote {folder.path}; next: torchrun -m telescope.target {folder.path}")
        return
    from telescope.report.progress import run_progress

    console, title = _console(), f"{finished.spec.name}/{folder.path.name}"
    with run_progress(console if not as_json else _console(err=True), title) as progress:
        try:
            with logged_target(finished, to, folder, lambda line: _say(line, err=True)):
                result = launching.launch(folder, finished, asked, progress)
        except KeyboardInterrupt:
            _say(f"{title}: interrupted; the same command goes on where it stopped", err=True)
            raise typer.Exit(130) from None
    if as_json:
        _print_json(result)
    else:
        from telescope.report.terminal import print_result

        print_result(console, result, folder.path)
    if result["diverged"]:
        raise typer.Exit(1)


@app.command()
def audit(
    sweep: SweepArgument,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials at the target's width; those done before count.")
    ] = 8,
    results: ResultsOption = RESULTS,
    workers: WorkersOption = None,
    dispatcher: DispatcherOption = "ray",
    ray_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the answer and its neighbours at the target's width, and say what the answer costs.

    Exit code 1 where that is more than the certificate said.
    """
    _check_dispatcher(dispatcher, ("ray", "inline"))
    finished = _open(sweep, results)
    _make_tokens(finished.spec)
    console = _console()
    with _interruptible(f"{finished.spec.name}: interrupted; the same command goes on"):
        from telescope.report.live import QuietScreen, make_screen
        from telescope.report.terminal import print_audit
        from telescope.sweep.auditing import FOLDER
        from telescope.sweep.auditing import audit as audit_sweep
        from telescope.sweep.run import Options

        options = Options(workers=workers, dispatcher=dispatcher, ray_address=ray_address)
        found = audit_sweep(
            finished, trials, options, lambda: QuietScreen() if as_json else make_screen(console)
        )
    if as_json:
        _print_json({"name": finished.spec.name, **found.as_dict()})
    else:
        print_audit(console, found, finished.folder.path / FOLDER)
    if found.verdict == "broken":
        raise typer.Exit(1)


@app.command()
def frontier(
    spec: SpecArgument,
    results: ResultsOption = RESULTS,
    name: NameOption = None,
    workers: WorkersOption = None,
    dispatcher: DispatcherOption = "ray",
    ray_address: AddressOption = None,
    overrides: SetOption = None,
    plan: PlanOption = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --plan: time a few real steps of every arm first.")
    ] = False,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Compare Muon with AdamW over batch sizes: tokens to a loss, critical batches, devices."""
    _check_dispatcher(dispatcher, ("ray", "inline"))
    if probe and not plan:
        raise SpecError("--probe: is for --plan, which trains nothing otherwise")
    every = _load(spec, overrides, name).every_variant
    for variant in every.values():
        _make_tokens(variant)
    from telescope.report.frontier import print_frontier_plan
    from telescope.spec.variants import PLAIN

    console = _console()
    if plan:
        from telescope.sweep.frontier import make_plan

        plans = {label: make_plan(its, workers, probe=probe) for label, its in every.items()}
        plain = plans.pop(PLAIN)

        def show() -> None:
            for planned in (plain, *plans.values()):
                print_frontier_plan(console, planned)

        _give({**plain, "variants": plans}, out, as_json, show)
        return
    options = {"workers": workers, "dispatcher": dispatcher, "ray_address": ray_address}
    found = _frontiers(every, results, options, console, quiet=as_json)
    plain = found.pop(PLAIN)
    _give(
        {**plain, "variants": found},
        out,
        as_json,
        lambda: _print_frontiers(console, plain, found, results),
    )
    if any(answer["stuck"] for answer in (plain, *found.values())):
        raise typer.Exit(1)


def _frontiers(
    every: Mapping[str, Spec],
    results: Path,
    options: Mapping[str, Any],
    console: Any,
    *,
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """Train what the frontiers miss; return the answer of each, with its figure drawn."""
    from telescope.answer.frontier import FIGURE_FILE, FOLDER, answer_if_finished

    known = {label: answer_if_finished(its, results) for label, its in every.items()}
    if waiting := [its for label, its in every.items() if not known[label]]:
        from telescope.sweep.frontier import check_budgets

        check_budgets(waiting, options["workers"])  # of all, before the first one trains
    found = {}
    for label, its in every.items():
        found[label] = known[label] or _run_frontier(its, results, options, console, quiet=quiet)
        figure = results / its.name / FOLDER / FIGURE_FILE
        if not figure.is_file():  # somebody has taken it away
            from telescope.report.frontier_figures import write_frontier_figure

            write_frontier_figure(figure, found[label])
    return found


def _run_frontier(
    spec: Spec, results: Path, options: Mapping[str, Any], console: Any, *, quiet: bool
) -> dict[str, Any]:
    """Train what a frontier misses; return its answer."""
    with _interruptible(f"{spec.name}: interrupted; the same command goes on"):
        from telescope.report.live import QuietScreen, make_screen
        from telescope.sweep.frontier import run_frontier
        from telescope.sweep.run import Options

        return run_frontier(
            spec,
            Options(results, **options),
            lambda: QuietScreen() if quiet else make_screen(console),
            lambda line: _say(line, err=quiet),
        )


def _print_frontiers(
    console: Any, plain: Mapping[str, Any], variants: Mapping[str, Any], results: Path
) -> None:
    """Print the answer of a spec and those of its variants."""
    from telescope.answer.frontier import FIGURE_FILE, FOLDER
    from telescope.report.frontier import print_frontier, print_variants
    from telescope.spec.variants import PLAIN

    for answer in (plain, *variants.values()):
        print_frontier(console, answer)
        figure = results / answer["name"] / FOLDER / FIGURE_FILE
        console.print(f"figure     {figure}", soft_wrap=True)
    if variants:
        print_variants(console, {PLAIN: plain, **variants})


@app.command()
def scaling(
    spec: SpecArgument,
    results: ResultsOption = RESULTS,
    name: NameOption = None,
    workers: WorkersOption = None,
    dispatcher: DispatcherOption = "ray",
    ray_address: AddressOption = None,
    overrides: SetOption = None,
    plan: PlanOption = False,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Fit the scaling laws of Muon and AdamW to a family of sizes, and compare their FLOPs."""
    _check_dispatcher(dispatcher, ("ray", "inline"))
    loaded = _load(spec, overrides, name)
    for variant in loaded.every_variant.values():
        _make_tokens(variant)
    from telescope.report.scaling import print_scaling, print_scaling_plan
    from telescope.sweep import scaling as family
    from telescope.sweep.run import Options

    console = _console()
    if plan:
        planned = family.make_plan(loaded, workers)
        _give(planned, out, as_json, lambda: print_scaling_plan(console, planned))
        return
    options = Options(results, workers, dispatcher, ray_address)
    with _interruptible(f"{loaded.name}: interrupted; the same command goes on"):
        from telescope.report.live import QuietScreen, make_screen

        found = family.run_scaling(
            loaded,
            options,
            lambda: QuietScreen() if as_json else make_screen(console),
            lambda line: _say(line, err=as_json),
        )
    _give(found, out, as_json, lambda: print_scaling(console, found))


@app.command()
def slurm(
    spec: SpecArgument,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTIONS", help="Options of run, or with --launch of launch."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="A Ray cluster in one allocation; no array.")
    ] = False,
    launch: Annotated[
        bool, typer.Option("--launch", help="The target run of a finished sweep, by torchrun.")
    ] = False,
    storage: Annotated[
        str | None, typer.Option(help="The workers' database, a URL without password.")
    ] = None,
    workers: WorkersOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of --ray and --launch.")] = 1,
    partition: Annotated[str | None, typer.Option(help="As in sbatch.")] = None,
    account: Annotated[str | None, typer.Option(help="As in sbatch.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 4:00:00 or 1-12.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of a node, such as 64G.")] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="Of a worker, or a node; left out, by the spec.")
    ] = None,
    gpus_per_task: Annotated[
        int | None, typer.Option(min=0, help="Of a worker, or a node; left out, by the spec.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="Another option of sbatch: --sbatch=--qos=high."),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="A line of bash that runs first: 'module load cuda'."),
    ] = None,
    overrides: SetOption = None,
    name: NameOption = None,
    results: ResultsOption = RESULTS,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The script; left out, NAME.sbatch.")
    ] = None,
) -> None:
    """Write a SLURM script: for a sweep, or with --launch for its target run."""
    if ray and launch:
        raise SpecError("--ray: is given with --launch, which starts its ranks by torchrun")
    given = {"partition": partition, "account": account, "time": time, "mem": mem}
    loaded, results = _load_or_kept(spec, overrides, name, results)
    options = _parsed("launch" if launch else "run", loaded.name, more or [])
    from telescope.slurm.script import Asked, script
    from telescope.sweep import batch

    job = batch.make_job(
        batch.Batch(
            kind="launch" if launch else "ray" if ray else "workers",
            spec=loaded,
            given=str(Path(spec).resolve()) if Path(spec).exists() else spec,
            results=results.resolve(),
            overrides=overrides or (),
            storage=storage,
            workers=workers,
            nodes=nodes,
            asked=Asked(
                **given,
                cpus_per_task=cpus_per_task,
                gpus_per_task=gpus_per_task,
                sbatch=sbatch or (),
                setup=setup or (),
            ),
            more=more or (),
        ),
        options,
    )
    out = out or Path(f"{job.name}.sbatch")
    _write_new(out, script(job))
    _say(f"wrote {out}; next: sbatch {shlex.quote(str(out))}")


@app.command()
def report(
    sweeps: Annotated[
        list[str],
        typer.Argument(metavar="SWEEP...", help="Names under the results folder, or paths."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Left out, report.html in the sweep's folder; of several, in this one.",
        ),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    results: ResultsOption = RESULTS,
) -> None:
    """Write a report to look at and to send: one HTML file that asks for nothing from anywhere.

    Several sweeps stand side by side, if their losses can be compared.
    """
    from telescope.spec.catalog import find_result

    for sweep in sweeps:
        find_result(sweep, results)
    from telescope.sweep.reporting import write_report

    path = write_report(sweeps, results, out)
    _say(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")
    if open_it:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            _say(f"telescope: no browser found; open {path} in one", err=True)


@app.command()
def ls(results: ResultsOption = RESULTS, as_json: JsonOption = False) -> None:
    """List the sweeps there are: answer, verdict, cost and age."""
    from telescope.spec.catalog import list_results

    folders = list_results(results)
    if not folders and not as_json:
        _say(f"no sweeps under {results}; start one with `telescope run`")
        return
    from telescope.sweep.overview import summary

    rows = [summary(folder, results, time.time()) for folder in folders]
    if as_json:
        _print_json(rows)
        return
    from telescope.report.terminal import print_sweeps

    print_sweeps(_console(), rows)


@app.command()
def compare(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP SWEEP...", help="Two or more.")],
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
) -> None:
    """Show several sweeps side by side: losses, answers, and what differs in their training."""
    if len(sweeps) < 2:
        raise SpecError(f"compare: got {sweeps[0]} alone, must be two sweeps or more")
    from telescope.spec.catalog import find_result

    for sweep in sweeps:
        find_result(sweep, results)
    from telescope.sweep.overview import compare as compare_sweeps

    comparison = compare_sweeps(sweeps, results)
    if as_json:
        _print_json(comparison)
        return
    from telescope.report.terminal import print_comparison

    print_comparison(_console(), comparison)


def _load(spec: str, overrides: list[str] | None, name: str | None) -> Spec:
    """Load the spec with the command line's overrides."""
    from telescope.spec.spec import Spec

    named = [f"name={json.dumps(name)}"] if name else []
    return Spec.load(spec, [*(overrides or ()), *named])


def _load_or_kept(
    spec: str, overrides: list[str] | None, name: str | None, results: Path
) -> tuple[Spec, Path]:
    """Load the spec of a file or of a started sweep; return it with the folder of results.

    A file or a bundled sweep of that name comes first.
    """
    from telescope.spec.catalog import SPEC_FILE, bundled_sweeps

    folders = [Path(spec), *([] if spec in bundled_sweeps() else [results / spec])]
    folder = next((f for f in folders if (f / SPEC_FILE).is_file()), None)
    if folder is None or Path(spec).is_file():
        return _load(spec, overrides, name), results
    from telescope.spec.spec import Spec
    from telescope.store.folder import Folder

    named = [f"name={json.dumps(name)}"] if name else []
    kept = Spec.kept(Folder(folder).read_spec()["spec"], folder, [*(overrides or ()), *named])
    if not name and folder.resolve().name != kept.name:
        raise SpecError(
            f"{folder}: is the folder of a sweep named {kept.name}; rename it back, or run it anew "
            "under another --name"
        )
    return kept, folder.resolve().parent if folder == Path(spec) else folder.parent


def _check_dispatcher(name: str, known: Sequence[str]) -> None:
    """Refuse a dispatcher that there is not."""
    if name not in known:
        *others, last = map(repr, known)
        raise SpecError(f"--dispatcher: got {name!r}, must be {', '.join(others)} or {last}")


def _corpus_of(sources: list[str], field: str, overrides: list[str] | None) -> DataConfig:
    """Return the data of a sweep or of files, as bytes, because the tokenizer is yet to be made."""
    from telescope.config import DataConfig
    from telescope.spec.catalog import bundled_sweeps

    if len(sources) == 1 and (sources[0].endswith(".toml") or sources[0] in bundled_sweeps()):
        if field != "text":
            raise SpecError("--field: is for files; of a sweep, use --set data.field=...")
        return _load(sources[0], [*(overrides or ()), "data.tokenizer=bytes"], None).data
    if overrides:
        raise SpecError("--set: is for a sweep; these are files")
    try:
        return DataConfig(source=sources[0] if len(sources) == 1 else tuple(sources), field=field)
    except SpecError as error:
        raise SpecError(f"tokenize: {error}") from error


def _make_tokens(spec: Spec) -> None:
    """Tokenize new documents, with a progress bar, so that workers find the tokens."""
    from telescope.data.tokenizing import needs_tokenizing

    if needs_tokenizing(spec.data):
        from telescope.data.corpus import read_corpus
        from telescope.report.progress import progress_bar

        _say_where_tokens_are_kept()
        with progress_bar(f"{spec.name}: tokenizing") as progress:
            read_corpus(spec.data, progress)


def _say_where_tokens_are_kept() -> None:
    """Print the cache folder if the home folder cannot be written."""
    from telescope.data.cache import cache_folder

    if is_private(folder := cache_folder()):
        _say(
            f"telescope: the home folder cannot be written: tokens are kept in {folder}, which may "
            "be emptied; TELESCOPE_CACHE names another place",
            err=True,
        )


def _open(sweep: str, results: Path) -> Finished:
    """Open a sweep's results; report an unknown name before any slow import."""
    from telescope.spec.catalog import find_result

    folder = find_result(sweep, results)
    from telescope.answer.finished import open_result

    return open_result(folder, results)


def _say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text in the stream's encoding; typer's `echo` writes UTF-8 even on ASCII streams."""
    print(text, end="\n" if nl else "", file=sys.stderr if err else sys.stdout, flush=True)


def _print_json(data: Any) -> None:
    _say(json.dumps(data, indent=2, allow_nan=False))


@contextmanager
def _interruptible(said: str) -> Iterator[None]:
    """End with exit code 130 and a line on Ctrl-C, and when whoever reads the output has left.

    So does SIGTERM, by which a batch system ends a job. Everything is kept.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with reader_needed():
            yield
    except KeyboardInterrupt:
        _say(said, err=True)
        raise typer.Exit(130) from None


def _give(
    data: Mapping[str, Any], out: Path | None, as_json: bool, show: Callable[[], None]
) -> None:
    """Write an answer to the file of `--out`, and print it: as JSON, or for people by `show`."""
    if out:
        _write_json(out, data)
    if as_json:
        _print_json(data)
    else:
        show()


def _write_json(out: Path, data: Mapping[str, Any]) -> None:
    from telescope.files import write_json

    try:
        write_json(out, data)
    except OSError as error:
        raise SpecError(f"--out {out}: cannot be written: {error.strerror}") from error


def _write_text(out: Path, text: str) -> None:
    from telescope.files import write_atomic

    try:
        write_atomic(out, text)
    except OSError as error:
        raise SpecError(f"--out {out}: cannot be written: {error.strerror}") from error


def _write_new(out: Path, text: str) -> None:
    """Write a file that its reader may edit; another one of that name is kept."""
    if out.is_file() and out.read_text("utf-8", errors="replace") != text:
        raise SpecError(f"{out}: is there already and is another file; remove it, or use --out")
    _write_text(out, text)


def _parsed(verb: str, argument: str, options: Sequence[str]) -> dict[str, Any]:
    """Return the options of a verb as its own parser reads them: name → value.

    Raises:
        SpecError: among them is one that the script sets by itself.
    """
    command = cast(Any, typer.main.get_command(app)).commands[verb]
    context = command.make_context(f"-- of {verb}", [argument, *options])
    for parameter in command.params:
        source = context.get_parameter_source(parameter.name)
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and parameter.name in SET_BY_SLURM:
            raise SpecError(f"{parameter.opts[0]}: must not be after --; the script says it itself")
    parsed: dict[str, Any] = context.params
    return parsed


def _foreign_format(format: str | None, as_json: bool, approximate: bool) -> str | None:
    """The trainer's format that is asked for; None where it is telescope's own JSON, or none.

    Raises:
        SpecError: there is no such format, or the options do not go together.
    """
    if format is not None:
        from telescope.export.formats import check_format

        check_format(format)
    foreign = None if format == "json" else format
    if foreign and as_json:
        raise SpecError(f"--json: left out beside --format {foreign}, which is no JSON of ours")
    if approximate and not foreign:
        raise SpecError("--approximate: is for the --format of a trainer; the JSON is exact")
    return foreign


def _exported(spec: Spec, settings: Transfer, format: str, approximate: bool) -> str:
    """The settings in a trainer's format."""
    from telescope.export.formats import export
    from telescope.export.handover import Handover

    handover = Handover(spec.name, settings, spec.optimizer, spec.base_width, approximate)
    return export(handover, format)


def _console(*, err: bool = False) -> Any:
    """Return the console for people: as wide as the terminal, of fixed width in a pipe."""
    from rich.console import Console

    # The output has data such as a model file's error, whose brackets are not markup.
    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 110
    return Console(width=width, markup=False, highlight=False, stderr=err)


def _verb_of(context: Any) -> list[str]:
    """Return the command of a usage error as a list of one; empty if there is none."""
    name = getattr(context, "info_name", None)
    return [name] if name in _verbs() else []


def _verbs() -> list[str]:
    callbacks = [command.callback for command in app.registered_commands if command.callback]
    return [callback.__name__.replace("_", "-") for callback in callbacks]


def _fit_with_one_thread(arguments: Sequence[str]) -> None:
    """Load numpy so that its BLAS uses one thread in this process, but not in its children.

    OpenBLAS reads the variable once, when it is loaded. A fit solves systems of a few dozen rows: a
    second thread doubles the CPU time, which the trials then lack, and gains nothing. A trainer
    inside this process keeps all its threads.
    """
    trains_here = any("inline" in argument for argument in arguments)
    if not arguments or arguments[0] not in FITTING or trains_here or BLAS_THREADS in os.environ:
        return
    os.environ[BLAS_THREADS] = "1"
    try:
        importlib.import_module("numpy")
    finally:
        del os.environ[BLAS_THREADS]  # child processes would inherit it


def main() -> None:
    """Run the command line; turn errors into one line and an exit code."""
    use_utf8_names()
    open_streams()
    stand_in()
    # --debug is accepted anywhere, because users add it to a command that has just failed.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        _fit_with_one_thread(arguments)
        code = app(arguments, standalone_mode=False)
    except TelescopeError as error:
        if debug:
            raise
        for fault in error.faults if isinstance(error, SpecError) else [str(error)]:
            line = " ".join(fault.splitlines())  # a given name may have a newline
            _say(f"telescope: {line}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _say(f"telescope: {where}{error.strerror or error}; --debug shows where", err=True)
        code = 2
    except Exception as error:
        # typer's usage errors are in a private module; only they have `format_message`.
        message = getattr(error, "format_message", None)
        if debug:
            raise
        if message is None:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            _say(f"telescope: a bug in telescope: {text}; --debug shows where", err=True)
        elif problem := message().rstrip("."):  # empty if the help has been shown instead
            context = getattr(error, "ctx", None)
            path = " ".join(["telescope", *_verb_of(context)])
            _say(f"telescope: {problem}; see {path} --help", err=True)
        code = 2
    sys.exit(code or 0)
