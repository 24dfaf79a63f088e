"""The two techniques of Moonlight's paper on the small mixture of experts, and its speed.

    python benchmarks/moonlight.py decay      weight decay on and off over a long run
    python benchmarks/moonlight.py rms        the size of Muon's update
    python benchmarks/moonlight.py speed      the routed layer, and Muon over stacks of experts
    python benchmarks/moonlight.py report     the tables of the first two, and the figure; seconds

The model, the data and the training are those of `sweeps/moonlight-small.toml`; one thread. `decay`
and `rms` append each finished run to a table in `results/reference/moonlight`, and train what it
misses. `speed` prints ratios of median times, measured in turns.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from muon import timed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from telescope.records import Point, Trial
from telescope.rules.scaling import RMS_MATCH
from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.train.loop import DIVERGED_ABOVE, Setup, held_out_loss_of, set_up, take_step
from telescope.train.muon import Muon

FOLDER = Path(__file__).parent.parent / "results" / "reference" / "moonlight"
LR, WEIGHT_DECAY = 0.064, 0.1
"""The answer of the sweep at width 64, rounded."""
ADAMW_LRS = (0.004, 0.008, 0.016, 0.032, 0.064)
UPDATE_RMS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""The paper's."""
ROWS = 25
"""Measurements along a long run."""
RUN = ("optimizer", "width", "steps", "seed", "lr", "weight_decay", "update_rms")
"""Columns that say which run a row belongs to."""
MEASURED = ("step", "loss", "held_out_loss", "weight_rms", "logit_rms")
Run = dict[str, Any]


def load_spec(*overrides: str) -> Spec:
    """The bundled sweep's spec."""
    return Spec.load("moonlight-small", overrides)


def prepared(run: Run) -> Setup:
    """Build what a run's loop uses.

    A Muon step is `p ← p · (1 − lr · weight_decay) − lr · F · √max(out, in) · O`, with F = 0.2 as
    the program has it. Another F is lr · F / 0.2 in Muon's groups, and weight_decay · 0.2 / F, so
    that the decay of a step stays. AdamW's groups stay as they are. F is the update's RMS at base
    width; at another one the sweep's rule, `mup`, divides it by √(width / base width).
    """
    name = run["optimizer"]
    spec = load_spec(f"train.steps={run['steps']}", f"optimizer.name={name}", "compute.device=cpu")
    point = Point.of(lr=run["lr"], weight_decay=run["weight_decay"])
    setup = set_up(BuiltIn.of(spec).trial_config, Trial(run["width"], point, run["seed"]))
    torch.set_num_threads(1)
    for group in muon_groups(setup):
        share = run["update_rms"] / RMS_MATCH
        group["peak_lr"] *= share
        group["weight_decay"] /= share
    return setup


def muon_groups(setup: Setup) -> list[dict[str, Any]]:
    """Muon's parameter groups."""
    found = [o for o in setup.optimizers if isinstance(o, Muon)]
    return [group for optimizer in found for group in optimizer.param_groups]


def train(run: Run, rows: int) -> Iterator[Run]:
    """Train one run; yield evenly spaced rows, the last one without a loss where it diverged."""
    setup, first, recent = prepared(run), math.nan, list[float]()
    due = {round(run["steps"] * (i + 1) / rows) for i in range(rows)}
    for step in range(run["steps"]):
        loss = take_step(
            setup.model, setup.optimizers, setup.batches, setup.train, step, setup.device
        ).item()
        first = loss if step == 0 else first
        if not loss <= DIVERGED_ABOVE * first:
            yield {**run, "step": step + 1}
            return
        recent.append(loss)
        if step + 1 in due:
            measured = {"loss": statistics.fmean(recent), **measure(setup)}
            recent.clear()
            yield {**run, "step": step + 1, **measured}


@torch.no_grad()
def measure(setup: Setup) -> dict[str, float]:
    """The held-out loss, and the RMS of Muon's matrices and of the logits of a held-out batch."""
    held_out = held_out_loss_of(setup)
    setup.model.eval()
    logits = setup.model(setup.held_out[0][: setup.train.batch_size])
    setup.model.train()
    weights = [p.flatten() for group in muon_groups(setup) for p in group["params"]]
    return {
        "held_out_loss": held_out,
        "weight_rms": rms(torch.cat(weights)) if weights else math.nan,
        "logit_rms": rms(logits),
    }


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return values.square().mean().sqrt().item()


def read(name: str) -> list[dict[str, str]]:
    """The rows of a table; none if it is not there."""
    path = FOLDER / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def train_missing(name: str, runs: Iterable[Run], rows: int) -> None:
    """Train the runs that a table misses, and append the rows of each when it has ended."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    known = {tuple(row[column] for column in RUN) for row in read(name)}
    for run in runs:
        key = tuple(shown(run[column]) for column in RUN)
        if key in known:
            continue
        known.add(key)
        found = list(train(run, rows))
        is_new = not (FOLDER / name).exists()
        with (FOLDER / name).open("a", newline="") as file:
            writer = csv.DictWriter(file, (*RUN, *MEASURED), restval="", lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows({key: shown(value) for key, value in row.items()} for row in found)
        print(", ".join(f"{key} {shown(value)}" for key, value in found[-1].items()), flush=True)


def shown(value: Any) -> str:
    """A value as the table has it; measured numbers to six digits, NaN empty."""
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6g}"


def long_runs(width: int, steps: int, seeds: int) -> Iterator[Run]:
    """Weight decay 0 and the answer's, with every seed."""
    for seed in range(seeds):
        for weight_decay in (0.0, WEIGHT_DECAY):
            yield run_of("muon", width, steps, seed, LR, weight_decay, RMS_MATCH)


def short_runs(width: int, steps: int, seeds: int) -> Iterator[Run]:
    """AdamW at its learning rates, then every update RMS at AdamW's best and at the answer's."""
    for seed in range(seeds):
        for lr in ADAMW_LRS:
            yield run_of("adamw", width, steps, seed, lr, WEIGHT_DECAY, RMS_MATCH)
    # The generator goes on when those are trained and in the table.
    best = best_adamw_lr(read("rms.csv"))
    for lr in (best, LR):
        for seed in range(seeds):
            for size in UPDATE_RMS:
                yield run_of("muon", width, steps, seed, lr, WEIGHT_DECAY, size)


def run_of(
    optimizer: str,
    width: int,
    steps: int,
    seed: int,
    lr: float,
    weight_decay: float,
    update_rms: float,
) -> Run:
    """One run, with the keys of `RUN`."""
    values = (optimizer, width, steps, seed, lr, weight_decay, update_rms)
    return dict(zip(RUN, values, strict=True))


def best_adamw_lr(rows: Sequence[Mapping[str, str]]) -> float:
    """The learning rate with AdamW's lowest mean loss."""
    losses = means(row for row in rows if row["optimizer"] == "adamw")
    return min(losses, key=lambda key: losses[key][0])[1]


def means(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, float, float], tuple[float, float]]:
    """(optimizer, lr, update RMS) → mean held-out loss and half the range over the seeds.

    The mean is infinite where a seed diverged.
    """
    found: dict[tuple[str, float, float], list[float]] = {}
    for row in rows:
        key = row["optimizer"], float(row["lr"]), float(row["update_rms"])
        found.setdefault(key, []).append(float(row["held_out_loss"] or "inf"))
    return {
        key: (statistics.fmean(losses), (max(losses) - min(losses)) / 2)
        for key, losses in found.items()
    }


def along(rows: Sequence[Mapping[str, str]], column: str) -> dict[bool, dict[int, list[float]]]:
    """Group a column: weight decay on or off → step → its values, a seed each."""
    found: dict[bool, dict[int, list[float]]] = {False: {}, True: {}}
    for row in rows:
        if row[column]:
            steps = found[float(row["weight_decay"]) > 0]
            steps.setdefault(int(row["step"]), []).append(float(row[column]))
    return found


def report() -> None:
    """Print the tables in Markdown, and draw the figure."""
    long, short = read("decay.csv"), read("rms.csv")
    columns = ("held_out_loss", "weight_rms", "logit_rms")
    print("| step | " + " | ".join(f"{c}, decay 0 | {c}, decay on" for c in columns) + " |")
    print("|---" * 7 + "|")
    tables = [along(long, column) for column in columns]
    steps = list(tables[0][True])
    for step in [s for i, s in enumerate(steps) if i in (0, 1, 2) or i % 4 == 0]:
        cells = [f"{statistics.fmean(t[on][step]):.4g}" for t in tables for on in (False, True)]
        print(f"| {step} | {' | '.join(cells)} |")
    print("\n| optimizer | lr | F | held-out loss | ± half the range |")
    print("|---|---|---|---|---|")
    for (optimizer, lr, size), (mean, half) in means(short).items():
        size_shown = f"{size:g}" if optimizer == "muon" else ""
        print(f"| {optimizer} | {lr:g} | {size_shown} | {mean:.4f} | {half:.4f} |")
    figure(long, short).savefig(FOLDER / "techniques.png", dpi=110)


def figure(long: Sequence[Mapping[str, str]], short: Sequence[Mapping[str, str]]) -> Figure:
    """Four panels: what decay changes in loss, in weights and in logits; loss against the RMS."""
    drawing = Figure(figsize=(13, 3.4), layout="constrained")
    panels: Sequence[Axes] = drawing.subplots(1, 4)
    losses = along(long, "held_out_loss")
    draw_difference(panels[0], losses)
    for panel, column, label in (
        (panels[1], "weight_rms", "RMS of Muon's matrices"),
        (panels[2], "logit_rms", "RMS of the logits"),
    ):
        for on, steps in along(long, column).items():
            values = [statistics.fmean(v) for v in steps.values()]
            name = f"weight decay {WEIGHT_DECAY:g}" if on else "no weight decay"
            panel.plot(list(steps), values, color=f"C{int(on)}", label=name)
        panel.set(xlabel="step", ylabel=label)
        panel.legend(frameon=False)
    draw_update_rms(panels[3], means(short))
    return drawing


def draw_difference(panel: Axes, losses: Mapping[bool, Mapping[int, Sequence[float]]]) -> None:
    """Loss without decay less loss with it, every seed and their mean; below 0 none is better."""
    pairs = {
        step: [a - b for a, b in zip(values, losses[True][step], strict=True)]
        for step, values in losses[False].items()
    }
    for seed in zip(*pairs.values(), strict=True):
        panel.plot(list(pairs), seed, color="C0", alpha=0.35, lw=1)
    panel.plot(list(pairs), [statistics.fmean(v) for v in pairs.values()], color="C0")
    panel.axhline(0, color="black", lw=0.7)
    panel.set(xlabel="step", ylabel="held-out loss, without − with decay")


def draw_update_rms(
    panel: Axes, losses: Mapping[tuple[str, float, float], tuple[float, float]]
) -> None:
    """Loss against the update RMS, a line per learning rate; AdamW's best as a level."""
    muon = {key: value for key, value in losses.items() if key[0] == "muon"}
    for lr in sorted({key[1] for key in muon}):
        points = [(size, *value) for (_, at, size), value in muon.items() if at == lr]
        sizes, values, halves = zip(*points, strict=True)
        panel.errorbar(sizes, values, halves, marker="o", ms=3, label=f"Muon, lr {lr:g}")
    adamw = [value for key, value in losses.items() if key[0] == "adamw"]
    panel.axhline(min(adamw)[0], color="black", ls=":", label="AdamW, its best lr")
    panel.set(xscale="log", xlabel="update RMS at base width", ylabel="held-out loss")
    panel.set_xticks(UPDATE_RMS, [f"{size:g}" for size in UPDATE_RMS])
    panel.minorticks_off()
    panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.95))


def speed(rounds: int) -> None:
    """Print the two tables of ratios."""
    torch.set_num_threads(1)
    print(f"{describe('cpu')}; {rounds} rounds in turns, one thread\n")
    print("| width | tokens | FLOPs, routed / dense | time, routed / dense |\n|---|---|---|---|")
    for width in (64, 256):
        for tokens in (512, 4096):
            flops, time = layer_ratios(width, tokens, rounds)
            print(f"| {width} | {tokens} | {flops:.2f} | {time:.2f} |", flush=True)
    print("\n| width | experts | stack ms | loop / stack | torch, a parameter each / stack |")
    print("|---|---|---|---|---|")
    for width in (64, 256):
        for experts in (8, 64):
            ms, loop, torchs = step_ratios(width, experts, rounds)
            print(f"| {width} | {experts} | {ms:.2f} | {loop:.2f} | {torchs:.2f} |", flush=True)


def layer_ratios(width: int, tokens: int, rounds: int) -> tuple[float, float]:
    """FLOPs and time of the sweep's routed layer, forward and backward, over a dense layer's.

    The dense layer has as many features as a token uses of the experts and the shared one.
    """
    torch.manual_seed(0)
    layers = {"routed": layer(width, "dense_layers=0"), "dense": layer(width, "mlp_ratio=1.5")}
    x = torch.randn(1, tokens, width, requires_grad=True)

    def run(name: str) -> None:
        layers[name](x).square().sum().backward()

    flops, times = {}, {}
    for name in layers:
        with FlopCounterMode(display=False) as counter:
            run(name)
        flops[name] = counter.get_total_flops()
        times[name] = list[float]()
    for _ in range(rounds):
        for name, column in times.items():
            column.append(timed(partial(run, name), "cpu"))
    medians = {name: statistics.median(column) for name, column in times.items()}
    return flops["routed"] / flops["dense"], medians["routed"] / medians["dense"]


def layer(width: int, override: str) -> nn.Module:
    """The feed-forward layer of the sweep's model with one layer; its last matrix not zero."""
    spec = load_spec("model.depth=1", f"model.{override}", "compute.device=cpu")
    config = replace(BuiltIn.of(spec).trial_config, threads_at={width: 1})
    model: Any = set_up(config, Trial(width, Point.of(lr=LR, weight_decay=0.0), 0)).model
    mlp: nn.Module = model.blocks[0].mlp
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    return mlp


def step_ratios(width: int, experts: int, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a Muon step over one layer's stacks, and how many times as long others take.

    The others are the program's Muon once per expert, and torch's with a parameter per matrix.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = 2 * [(experts, width // 2, width)] + [(experts, width, width // 2)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    settings: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "ns_steps": 5}

    def program(params: Sequence[nn.Parameter]) -> Muon:
        groups = [{"params": [p], "lr": 0.02, "weight_decay": 0.1} for p in params]
        return Muon(groups, ns_dtype="bf16", **settings)

    stacks = [with_grad(start, grad) for start, grad in zip(starts, grads, strict=True)]
    pairs = [zip(s, g, strict=True) for s, g in zip(starts, grads, strict=True)]
    matrices = [[with_grad(*pair) for pair in stack] for stack in pairs]
    others = [with_grad(m.detach(), m.grad) for stack in matrices for m in stack]  # type: ignore[arg-type]
    stacked = program(stacks)
    loop = [program(expert) for expert in zip(*matrices, strict=True)]
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", **settings}
    torchs = torch.optim.Muon(others, **kwargs)
    steps: dict[str, Callable[[], object]] = {
        "stack": stacked.step,
        "loop": lambda: [optimizer.step() for optimizer in loop],
        "torch": torchs.step,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, "cpu"))
    apart = (stacks[0][0] - matrices[0][0]).norm() / (stacks[0][0] - starts[0][0]).norm()
    assert apart < 0.03, f"stack and loop are {apart:.3f} apart"
    stack, *rest = (statistics.median(column) for column in times.values())
    return stack * 1e3, rest[0] / stack, rest[1] / stack


def with_grad(start: Tensor, grad: Tensor) -> nn.Parameter:
    """A parameter that starts there and has this gradient."""
    parameter = nn.Parameter(start.clone())
    parameter.grad = grad.clone()
    return parameter


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("decay", "rms", "speed", "report"))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, help="default 3,000 for decay, 120 for rms")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if args.what == "decay":
        runs = long_runs(args.width, args.steps or 3000, args.seeds)
        train_missing("decay.csv", runs, ROWS)
    elif args.what == "rms":
        train_missing("rms.csv", short_runs(args.width, args.steps or 120, args.seeds), 1)
    elif args.what == "report":
        report()
    else:
        speed(args.rounds)


if __name__ == "__main__":
    main()
