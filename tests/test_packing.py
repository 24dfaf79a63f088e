"""Who gets which trials, how many as one, and what a pack's mishaps cost the trials in it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPT, quiet, tiny_spec
from faults import answers, finish, run_real, start, stored
from rich.console import Console

from telescope import Spec
from telescope.answer.finished import open_result
from telescope.dispatch.inline import run_inline
from telescope.dispatch.packing import Packer, choose_size
from telescope.dispatch.packs import Done, Limit, Packs
from telescope.dispatch.queue import Order, Queue, Trainer
from telescope.errors import SpecError, StoreError
from telescope.packs.probe import PackProbe
from telescope.records import Point, Result, Status, Trial, TrialSource
from telescope.report.live import make_screen
from telescope.store.folder import Folder
from telescope.sweep.machine import pack_size
from telescope.sweep.run import Options, run


def trials(number: int, width: int = 32) -> list[Trial]:
    return [Trial(width, Point.of(lr=0.01 * (n + 1)), 0) for n in range(number)]


class Source(TrialSource):
    """Asks for trials until each has a result."""

    def __init__(self, wanted: Sequence[Trial]) -> None:
        self.wanted, self.told = list(wanted), dict[Trial, Result]()

    def ask(self) -> Sequence[Trial]:
        return [trial for trial in self.wanted if trial not in self.told]

    def tell(self, *results: Result) -> None:
        for result in results:
            assert result.trial not in self.told
            self.told[result.trial] = result


def good(trial: Trial) -> Result:
    return Result(trial, Status.COMPLETE, loss=trial.lr)


@dataclass
class Probe:
    gain: float = 5.0
    room: float = math.inf
    alone_seconds: float = 0.25

    def most(self, share: float) -> float:
        return self.room * share


class Fake:
    """A trainer of packs, without models."""

    def __init__(
        self,
        on_pack: Callable[[Sequence[Trial]], None] = lambda members: None,
        *,
        bad: Trial | None = None,
        stops: str = "",
        probe: Probe | None = None,
    ) -> None:
        self.packs: list[int] = []
        self.probed: list[int] = []
        self.alone: list[Trial] = []
        self.on_pack, self.bad, self.stops, self.probe = on_pack, bad, stops, probe

    def __call__(self, trial: Trial) -> Result:
        self.alone.append(trial)
        if trial == self.bad:
            raise ValueError("this point's fault")
        return good(trial)

    def train_pack(self, members: Sequence[Trial]) -> Iterator[Result]:
        self.packs.append(len(members))
        self.on_pack(members)
        for trial in members:
            if trial == self.bad:
                raise ValueError("this point's fault")
            yield good(trial)

    def obstacle(self, trial: Trial) -> str:
        return self.stops

    def probe_pack(self, members: Sequence[Trial]) -> Probe | None:
        self.probed.append(len(members))
        return self.probe


def packed(
    trainer: Any, wanted: Sequence[Trial], *, pack: Any = 8, **options: Any
) -> tuple[Source, list[Any]]:
    """Run the trials; return their results, and the notes about packs."""
    source, lines = Source(wanted), list[Any]()
    run_inline(source, trainer, packs=Packs(pack, note=lines.append), **options)
    assert set(source.told) == set(wanted)
    return source, lines


def queue_of(source: Source, size: Any, *, workers: int = 1, **packs: Any) -> Queue:
    """A queue that knows that nothing limits the packs of widths 32 and 64."""
    free = [{"width": w, "asked": size, "most": None, "why": "", "until": None} for w in (32, 64)]
    known = Packs(size, lines=[*free, *packs.pop("lines", ())], **packs)
    return Queue(source, packs=known, workers=workers)


def taken(queue: Queue, number: int) -> list[tuple[Trial, ...]]:
    """So many orders; none of them a look."""
    orders = [queue.take() for _ in range(number)]
    assert not any(order and order.look for order in orders)
    return [order.trials if order else () for order in orders]


def test_workers_share_a_stage_evenly() -> None:
    packs = taken(queue_of(Source(trials(20)), "auto", workers=4), 5)
    assert [len(pack) for pack in packs] == [5, 5, 5, 5, 0]
    assert len({trial for pack in packs for trial in pack}) == 20
    packs = taken(queue_of(Source(trials(9)), 4, workers=2), 4)
    assert [len(pack) for pack in packs] == [4, 4, 1, 0]


def test_a_pack_is_of_one_width() -> None:
    source = Source([*trials(2, 32), *trials(3, 64), *trials(1, 32)])
    packs = taken(queue_of(source, "auto"), 3)
    assert [{trial.width for trial in pack} for pack in packs] == [{32}, {64}, set()]


def test_what_failed_is_tried_again_alone() -> None:
    source, lines = Source(trials(4)), list[Any]()
    queue = queue_of(source, 4, note=lines.append)
    order = queue.take()
    assert order
    queue.lose(order, "killed\nby whom")
    assert [len(pack) for pack in taken(queue, 5)] == [1, 1, 1, 1, 0]
    assert not source.told
    names = [str(trial) for trial in trials(4)]
    assert lines[1:] == [
        {"width": 32, "trials": names, "ended": [], "alone": names, "why": "killed"}
    ]


def test_one_worker_looks_and_the_others_wait_for_what_it_finds() -> None:
    queue = Queue(Source(trials(12)), packs=Packs("auto"), workers=3)
    look = queue.take()
    assert look == Order(tuple(trials(12)[:4]), look=True)
    assert queue.take() is None
    assert not queue.is_done
    assert not queue.has_work
    queue.settle(look, Limit(2, "memory holds 2 trials at once"))
    assert queue.has_work
    assert [len(pack) for pack in taken(queue, 7)] == [2, 2, 2, 2, 2, 2, 0]


def test_a_worker_that_dies_in_a_look_costs_the_packs_and_no_trial() -> None:
    queue = Queue(Source(trials(3)), packs=Packs(3))
    look = queue.take()
    assert look
    assert look.look
    queue.lose(look, "")  # Ray may have no account of it
    assert [len(pack) for pack in taken(queue, 4)] == [1, 1, 1, 0]
    for trial, reason in zip(trials(3), ("no disk", "no file", "no net"), strict=True):
        queue.answer(Result(trial, Status.FAILED, reason=reason))
    assert queue.has_work  # the loss before was no failure of theirs


def test_without_room_a_pack_is_halved_and_the_size_remembered() -> None:
    def needs_memory(members: Sequence[Trial]) -> None:
        if len(members) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = Fake(needs_memory)
    source, lines = packed(trainer, trials(20))
    assert trainer.packs == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert all(result.loss == trial.lr for trial, result in source.told.items())
    found = [(line["most"], line["why"]) for line in lines if "most" in line]
    assert [most for most, _ in found] == [None, 4, 2]
    assert "8 trials of width 32 need more memory" in found[1][1]
    assert not trainer.alone


def test_memory_of_a_cpu_counts_too_and_other_errors_do_not() -> None:
    def no_room(members: Sequence[Trial]) -> None:
        if len(members) > 2:
            torch.empty(10**17)

    trainer = Fake(no_room)
    packed(trainer, trials(4), pack=4)
    assert trainer.packs == [4, 2, 2]


def test_a_pack_that_hangs_is_trained_one_by_one() -> None:
    trainer = Fake(lambda members: time.sleep(30))
    start = time.monotonic()
    source, lines = packed(trainer, trials(3), timeout=0.1)
    assert 0.3 <= time.monotonic() - start < 10  # three times one trial's
    assert "no end after" in lines[-1]["why"]
    assert {result.status for result in source.told.values()} == {Status.COMPLETE}


def test_what_cannot_be_stacked_is_trained_one_by_one() -> None:
    trainer = Fake(stops="it draws random numbers")
    _, lines = packed(trainer, trials(5))
    assert not trainer.packs
    assert len(trainer.alone) == 5
    why = {"most": 1, "why": "it draws random numbers", "until": None, "step_seconds": None}
    assert lines == [{"width": 32, "asked": 8, **why}]


def test_a_trainer_of_single_trials_gets_single_trials() -> None:
    _, lines = packed(good, trials(3))
    assert [line["most"] for line in lines] == [1]
    assert "one trial at a time" in lines[0]["why"]


def test_results_of_others_or_too_few_are_the_packs_fault() -> None:
    class Short(Fake):
        def train_pack(self, members: Sequence[Trial]) -> Iterator[Result]:
            return iter([good(members[0]), good(members[0])])

    class Shorter(Fake):
        def train_pack(self, members: Sequence[Trial]) -> Iterator[Result]:
            return iter([good(members[0])])

    for trainer, why in ((Short(), "returned a result of"), (Shorter(), "before its trials")):
        _, lines = packed(trainer, trials(3))
        assert why in lines[-1]["why"]
        assert trainer.alone == trials(3)[1:]


def test_what_the_store_raises_is_no_fault_of_the_pack() -> None:
    class Full(Source):
        def tell(self, *results: Result) -> None:
            assert len(results) == 4  # a pack's at once
            raise StoreError("disk full")

    with pytest.raises(StoreError, match="disk full"):
        run_inline(Full(trials(4)), Fake(), packs=Packs(4))
    with pytest.raises(KeyboardInterrupt):
        packed(Fake(lambda members: (_ for _ in ()).throw(KeyboardInterrupt)), trials(3))


@pytest.mark.parametrize(
    ("size", "probe", "most", "why"),
    [
        ("auto", None, 1, "on a CPU"),
        (6, None, None, ""),
        ("auto", Probe(gain=1.19), 1, "1.19x"),
        (6, Probe(gain=0.5), None, ""),  # asked for
        ("auto", Probe(), None, ""),
        ("auto", Probe(room=10.0), 8, "memory holds 8"),
        (6, Probe(room=10.0), None, ""),
        (6, Probe(room=5.0), 4, "memory holds 4"),
        (6, Probe(room=0.9), 1, "memory holds 1"),
    ],
)
def test_how_many_go_together(size: Any, probe: Any, most: int | None, why: str) -> None:
    chosen = choose_size(size, 4, probe)
    assert chosen[0] == most
    assert why in chosen[1]
    assert bool(why) == bool(chosen[1])


def test_auto_asks_workers_only_where_there_may_be_an_accelerator(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(is_cluster: bool = False, **compute: Any) -> Any:
        spec = Spec.from_dict(tiny_spec(corpus_file, compute=compute))
        return pack_size(spec, is_cluster=is_cluster)

    assert chosen(device="cpu") == chosen(is_cluster=True) == 1
    assert chosen(is_cluster=True, gpus=1) == chosen(device="cuda") == "auto"
    assert chosen(pack=3) == 3
    monkeypatch.setattr("telescope.sweep.machine.resolve_device", lambda device: "cuda")
    assert chosen() == "auto"
    for wrong, allowed in ((0, ">= 1"), ("many", "an integer or 'auto'")):
        with pytest.raises(SpecError, match=rf"compute\.pack: got .*, must be .*{allowed}"):
            chosen(pack=wrong)


def test_a_worker_that_shares_its_device_leaves_the_others_theirs() -> None:
    assert choose_size("auto", 4, Probe(room=10.0), 0.5).most == 4  # of 80 % of its half
    trainer, look = Fake(probe=Probe(room=10.0)), Order(tuple(trials(9)), look=True)
    found = [Packer(lambda: trainer, "auto", share=share)(look) for share in (1, 0.5)]
    why = "memory holds {} trials at once"
    assert found == [Limit(n, why.format(n), step_seconds=0.25) for n in (8, 4)]


def test_a_probe_counts_the_share_even_where_more_is_free_just_now() -> None:
    probe = PackProbe(2, 1.0, 1.0, bytes_used=20, bytes_free=90, bytes_total=100)
    assert [probe.most(share) for share in (1.0, 0.5, 0.1)] == [9.0, 5.0, 1.0]
    late = PackProbe(2, 1.0, 1.0, bytes_used=20, bytes_free=30, bytes_total=100)
    assert late.most(0.5) == 3.0


def test_what_a_small_pack_did_not_gain_a_large_one_may() -> None:
    class Gaining(Fake):
        def probe_pack(self, members: Sequence[Trial]) -> Probe:
            super().probe_pack(members)
            return Probe(gain=0.55 * len(members))

    class Rounds(Source):
        """Two trials first, then three, then forty."""

        def ask(self) -> Sequence[Trial]:
            for end in (2, 5, 45):
                if open_ones := [t for t in self.wanted[:end] if t not in self.told]:
                    return open_ones
            return []

    source, trainer, lines = Rounds(trials(45)), Gaining(), list[Any]()
    run_inline(source, trainer, packs=Packs("auto", note=lines.append))
    assert len(source.told) == 45
    assert trainer.probed == [2, 40]
    assert trainer.packs == [40]
    assert (lines[0]["most"], lines[0]["until"]) == (1, 4)


def test_a_size_without_memory_is_not_probed_at_every_hand_out() -> None:
    class Narrow(Fake):
        def probe_pack(self, members: Sequence[Trial]) -> Probe:
            super().probe_pack(members)
            if len(members) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return Probe(gain=1.0)

    trainer = Narrow()
    packed(trainer, trials(12), pack="auto")
    assert trainer.probed == [12, 6, 3]
    assert len(trainer.alone) == 12


def test_a_cut_off_line_costs_that_line_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.packs() == []
    folder.note_pack({"width": 32, "packs": [["a", "b"]]})
    with (tmp_path / "packs.jsonl").open("a") as file:
        file.write('{"width": 32, "tri')
    folder.note_pack({"width": 64, "packs": [["c", "d"]]})
    assert [line["width"] for line in folder.packs()] == [32, 64]


def test_a_resume_forms_the_packs_that_had_not_ended_and_no_others() -> None:
    """Whoever had ended when it was killed: what is left goes together as it was to."""
    wanted, lines = trials(10), list[Any]()
    queue = queue_of(Source(wanted), 4, workers=2, note=lines.append)
    first = taken(queue, 3)
    assert first == [tuple(wanted[:4]), tuple(wanted[4:8]), tuple(wanted[8:])]
    queue.settle(Order(first[1]), Done(first[1], tuple(map(good, first[1]))))
    left = Source([*first[0], *first[2]])
    assert taken(queue_of(left, 4, workers=2, lines=lines), 3) == [first[0], first[2], ()]
    # Without the lines they would be shared out anew.
    assert [len(pack) for pack in taken(queue_of(left, 4, workers=2), 3)] == [3, 3, 0]
    # One of them was stored, and its pack's end was not noted: it failed as a pack.
    left = Source([*wanted[1:4], *first[2]])
    singles = [(trial,) for trial in wanted[1:4]]
    assert taken(queue_of(left, 4, workers=2, lines=lines), 4) == [*singles, first[2]]
    # Another size is asked for by now: a larger pack is divided anew, a smaller one stands.
    left = Source([*first[0], *first[2]])
    assert [len(pack) for pack in taken(queue_of(left, 3, lines=lines), 3)] == [3, 1, 2]
    assert taken(queue_of(left, 8, lines=lines), 2) == [first[0], first[2]]
    assert [len(pack) for pack in taken(Queue(left, packs=Packs(1, lines=lines)), 2)] == [1, 1]


# Two decimals apart, so that the rounding of a pack cannot turn a decision.
CLEAR = {
    "optimizer": {"ns_dtype": "fp32"},
    "train": {"steps": 8, "checkpoint_every": 3},
    "axes": {
        "lr": {"low": 0.002, "high": 0.128, "points": 4},
        "weight_decay": {"low": 0.05, "high": 4.0, "points": 2},
    },
}


def swept(place: Path, corpus: Path, pack: Any, **tables: Any) -> Any:
    data = tiny_spec(corpus, **{**CLEAR, **tables, "compute": {"pack": pack}})
    options = Options(place, dispatcher="inline", check=False)
    ran = run(Spec.from_dict(data), options, quiet)
    return ran.folder, ran.ladder


def test_a_fused_sweep_makes_the_same_choices(tmp_path: Path, corpus_file: Path) -> None:
    folder, alone = swept(tmp_path / "alone", corpus_file, 1)
    assert not (folder.path / "packs.jsonl").exists()
    folder, fused = swept(tmp_path / "fused", corpus_file, 4)
    assert [choice.point for choice in fused.choices] == [choice.point for choice in alone.choices]
    assert [choice.width for choice in fused.choices] == [16, 32]
    losses = [
        {r.trial: r.loss for r in open_result("tiny", tmp_path / name).results}
        for name in ("alone", "fused")
    ]
    assert losses[0] == {trial: pytest.approx(loss, rel=1e-4) for trial, loss in losses[1].items()}
    lines = [json.loads(line) for line in (folder.path / "packs.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "trials" in line]
    assert [len(row["trials"]) for row in rows] == [4, 4, 3]  # 4 × 2 points, then 3 × 1
    assert all(row.keys() == {"width", "trials"} for row in rows)  # each has ended whole
    formed = [pack for line in lines for pack in line.get("packs", ())]
    assert formed == [row["trials"] for row in rows]
    assert {name for row in rows for name in row["trials"]} == {str(trial) for trial in losses[1]}
    assert not (folder.path / "checkpoints").exists()


def test_why_a_sweep_is_not_fused_is_said_once(
    tmp_path: Path, corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "dropout.py"
    text = GPT.read_text().replace("        x_BTD = self.embedding(tokens_BT)", DROPOUT)
    model.write_text(text)
    data = tiny_spec(corpus_file, model={"file": str(model)}, compute={"pack": 4})
    options = Options(tmp_path / "results", dispatcher="inline", check=False)
    ladder = run(Spec.from_dict(data), options, lambda: make_screen(Console(width=200))).ladder
    assert ladder.is_finished
    said = capsys.readouterr().out
    assert said.count("it draws random numbers in training") == 1
    assert "pack of width 16: " in said


DROPOUT = "        x_BTD = F.dropout(self.embedding(tokens_BT), 0.1, self.training)"


@pytest.mark.parametrize("widths", [[16], pytest.param([16, 32], marks=pytest.mark.slow)], ids=str)
def test_killed_in_the_middle_of_a_pack_it_goes_on(widths: list[int], tmp_path: Path) -> None:
    """kill -9 as soon as some results are stored, and a checkpoint of others lies there.

    The answer is the same to the last digit, though nothing keeps choices from hanging on one.
    """
    tables = {
        "ladder": {"policy": "adaptive", "widths": widths},
        "train": {"steps": 20, "checkpoint_every": 3},
        "axes": {
            "lr": {"low": 0.002, "high": 60.0, "points": 9},
            "weight_decay": {"low": 0.05, "high": 4.0, "points": 3},
        },
        "compute": {"pack": 4},
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
    assert finish(start(run_real, whole, tables)) == 0
    driver = start(run_real, killed, tables)
    deadline = time.monotonic() + 60
    checkpoints = killed / "results" / "tiny" / "checkpoints"
    while time.monotonic() < deadline and driver.is_alive():
        if len(stored(killed)) >= 3 and list(checkpoints.glob("*/step-*.json")):
            break
        time.sleep(0.01)  # a second core may not be there
    driver.kill()
    finish(driver)
    before = stored(killed)
    assert 3 <= len(before) < len(stored(whole))
    assert finish(start(run_real, killed, tables)) == 0
    after = stored(killed)
    assert all(after[key] == row for key, row in before.items())  # none was trained again
    assert answers(killed) == answers(whole)
    assert "diverged" in answers(whole)["trials.csv"]
    assert not checkpoints.exists()


def test_what_fails_ahead_is_tried_again_with_the_trial() -> None:
    """A trainer is loaded once, whether ahead or not; one that cannot be is the trial's failure."""
    loads: list[str] = []

    class Warmed:
        def warm(self) -> None:
            loads.append("warm")
            raise OSError("no corpus yet")

        def __call__(self, trial: Trial) -> Result:
            return good(trial)

    def load() -> Trainer:
        loads.append("load")
        if len(loads) == 1:
            raise ImportError("not yet")
        return Warmed()

    packer = Packer(load)
    for _ in range(3):
        packer.warm()
    assert loads == ["load", "load", "warm"]
    trial = trials(1)[0]
    done = packer(Order((trial,)))
    assert isinstance(done, Done)
    assert [result.status for result in done.results] == [Status.COMPLETE]
    assert loads == ["load", "load", "warm"]
