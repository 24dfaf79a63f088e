"""The live screen, the plain lines and the figure; data in them is never markup."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from rich.console import Console

from telescope.ladder.ladder import Ladder
from telescope.records import Axis, LadderSpec, Result, Status
from telescope.report.figures import loss_figure
from telescope.report.live import LiveScreen, PlainScreen, Progress, Screen, make_screen
from telescope.report.terminal import print_sweeps, print_table

SPEC = LadderSpec(
    (Axis("lr", 0.01, 1.0, 5), Axis("weight_decay", 0.1, 0.1, 1)), (32, 64), policy="paper"
)


@pytest.fixture
def ladder() -> Ladder:
    """One closed stage, whose highest lr diverged, and an open one."""
    ladder = Ladder(SPEC)
    for trial in list(ladder.ask()):
        if trial.lr == 1.0:
            ladder.tell(Result(trial, Status.DIVERGED, reason="loss nan at step 3"))
        else:
            ladder.tell(Result(trial, Status.COMPLETE, loss=2 + (trial.lr - 0.1) ** 2))
    return ladder


def progress(ladder: Ladder) -> Progress:
    return Progress(
        name="demo",
        state="running",
        stage=0,
        stages=2,
        width=32,
        stage_done=3,
        stage_total=5,
        done=3,
        total=8,
        running=2,
        best=ladder.results(ladder.stages[0])[0],
        seconds=75.0,
        eta_seconds=None,
    )


def shown_by(screen_class: type[Screen], ladder: Ladder) -> str:
    out = io.StringIO()
    terminal = screen_class is LiveScreen
    console = Console(
        file=out, width=120, markup=False, highlight=False, force_terminal=terminal, no_color=True
    )
    failed = Result(
        ladder.stages[0].trials[0], Status.FAILED, reason="KeyError: [/data/x] [red]\nTraceback ..."
    )
    screen = make_screen(console)
    assert isinstance(screen, screen_class)
    with screen:
        screen.start(progress(ladder))
        screen.watch(lambda: "lr 0.1 at step 300, loss 2.3100")
        screen.update(progress(ladder))
        screen.result(failed, progress(ladder))
        screen.choice(ladder.choices[0])
    return out.getvalue()


@pytest.mark.parametrize("screen", [PlainScreen, LiveScreen])
def test_a_view_shows_results_and_choices_to_the_letter(
    screen: type[Screen], ladder: Ladder
) -> None:
    text = shown_by(screen, ladder)
    assert "failed, KeyError: [/data/x] [red]" in text
    assert "Traceback" not in text
    assert "width 32: chose lr 0.1, weight_decay 0.1" in text


def test_the_live_screen_has_stage_counts_best_and_time_left(ladder: Ladder) -> None:
    text = shown_by(LiveScreen, ladder)
    for part in ("stage 1 of 2, width 32, 2 running", "3 of 8 trials", "best at this width"):
        assert part in text
    assert "1 min 15 s" in text
    assert "lr 0.1 at step 300, loss 2.3100" in text
    assert "unknown" in text


def test_the_clock_goes_on_between_two_results(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("telescope.report.live.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    screen = LiveScreen(console)
    screen.update(replace(progress(ladder), eta_seconds=100.0, eta_range=(10.0, 400.0)))
    now[0] += 30
    with console.capture() as shown:
        console.print(screen._screen())
    assert "1 min 45 s" in shown.get()  # 75 + 30
    assert "about 1 min 10 s (0 s to 6 min 10 s" in shown.get()


def test_a_phase_has_a_clock_of_its_own(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("telescope.report.live.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    screen = LiveScreen(console)
    with screen.phase("checking the model"):
        now[0] += 3
        with screen.phase("starting Ray"), console.capture() as shown:
            now[0] += 2
            console.print(screen._screen())
    assert "checking the model …  5 s" in shown.get()
    assert "starting Ray …  2 s" in shown.get()
    with console.capture() as shown:
        console.print(screen._screen())
    assert not shown.get().strip(), "what is over has scrolled away"


@pytest.mark.parametrize("width", [72, 120])
def test_no_number_breaks_and_the_least_important_column_goes_first(width: int) -> None:
    columns = {
        "role": ["embedding", "hidden"],
        "shape": ["4096×11008", "11008×4096"],
        "count": ["1", "64"],
        "lr": ["0.100794", "0.0141229"],
        "weight_decay": ["0.103387", "0.292423"],
        "why": ["a sentence of many words that may be broken where it has a space", "short"],
    }
    console = Console(file=io.StringIO(), width=width, no_color=True, record=True)
    print_table(console, columns, expendable=("count", "shape"))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    for whole in ("0.100794", "0.0141229", "embedding", "4096×11008", "0.292423"):
        assert whole in text
    assert ("64" in text.split()) == (width == 120)
    assert ("not shown at this width: count" in text) == (width == 72)


@pytest.mark.parametrize("axes", [2, 4])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 140])
def test_an_answer_is_never_cut_and_breaks_only_between_axes(width: int, axes: int) -> None:
    point = {"lr": 0.03894, "weight_decay": 0.1592, "warmup": 0.05, "init_scale": 1.234}
    row: dict[str, Any] = {
        **{"name": "quickstart", "state": "finished", "done": 35, "total": 35, "problem": None},
        **{"answer": dict(list(point.items())[:axes]), "width": 256, "verdict": "PASS"},
        **{"over_target": 1.11, "age_seconds": 5400.0},
    }
    console = Console(file=io.StringIO(), width=width, no_color=True, record=True)
    print_sweeps(console, [row])
    text = console.export_text()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    values = [f"{axis} {value:.4g}" for axis, value in row["answer"].items()]
    if width >= 40:  # a line of the answer beside the sweep's name
        assert all(value in text for value in [*values, f"{values[-1]} at 256", "quickstart"])
    if (width, axes) == (80, 2):
        assert f"{', '.join(values)} at 256" in text
        assert "not shown at this width: cost, age\n" in text


def lines_of(panel: Axes) -> dict[str, Line2D]:
    """Marker → the line of that marker that has points; of several the last."""
    return {str(line.get_marker()): line for line in panel.get_lines() if np.size(line.get_xdata())}


def test_the_figure_marks_choices_and_divergence(ladder: Ladder) -> None:
    figure = loss_figure(ladder, "demo")
    track, panel = figure.axes  # one swept axis, one row
    assert panel.get_xscale() == track.get_yscale() == "log"
    lines = lines_of(panel)
    chosen = ladder.choices[0].point.lr
    assert np.asarray(lines["*"].get_xdata()).tolist() == [chosen]
    assert np.asarray(lines["x"].get_xdata()).tolist() == [1.0]
    (target,) = [np.asarray(lines_of(track)["*"].get_xdata()).tolist()]
    assert target == [64]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:1] == ["width 32"]
