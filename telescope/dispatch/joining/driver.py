"""Run a sweep on workers that join: the driver offers orders on a board and takes the outcomes.

The driver may end at any moment and come back. Workers go on with what is on offer, and what they
deliver meanwhile is taken by the next driver. An order is removed from the board only when its
results have been told, so that a kill between the two loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from telescope.dispatch.joining.board import (
    BEATS,
    LEASE,
    LONGEST_LOOK,
    DriverBoard,
    Row,
    Watch,
    key_of,
    order_as_text,
    order_from_text,
    outcome_from_text,
)
from telescope.dispatch.packs import Done, Packs
from telescope.dispatch.queue import Order, Queue
from telescope.errors import TelescopeError
from telescope.records import Status, Trial, TrialSource

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two looks at the board: the first while things happen, the last when idle."""


def run_joining(
    source: TrialSource,
    board: DriverBoard,
    *,
    record: str,
    packs: Packs | None = None,
    workers: int = 1,
    lease: float = LEASE,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Run every trial that `source` asks for on the workers that join; return at the end.

    Args:
        source: asked and told in this process only.
        board: the sweep's.
        record: JSON that workers need to train its trials.
        packs: the division of trials into packs.
        workers: the number of workers to reckon with while fewer have joined.
        lease: seconds without a beat after which a worker counts as lost.
        note: shows a line.

    Raises:
        LostError: another driver has taken the sweep over.
        KeyboardInterrupt: Ctrl-C; workers go on with what is on offer, and wait.
    """
    queue = Queue(source, packs=packs, workers=workers)
    try:
        driver = _Driver(queue, source.begun(), board, workers, lease, note)
        driver.begin(record)
        while driver.turn():
            time.sleep(driver.pause)
        board.leave("ended")
    except BaseException:
        with suppress(TelescopeError):  # of a database that is lost, which is being reported
            board.leave("away")
        raise


class _Driver:
    """One driver's knowledge of the board."""

    def __init__(
        self,
        queue: Queue,
        source: TrialSource,
        board: DriverBoard,
        workers: int,
        lease: float,
        note: Callable[[str], None],
    ) -> None:
        self._queue, self._source, self._board, self._note = queue, source, board, note
        self._lease, self._least = lease, workers
        self._orders: dict[str, Order] = {}
        """Key → order, of all on the board that the queue knows of."""
        self._seen: dict[str, int] = {}
        """Key → lease, of the orders whose start has been told."""
        self._answered: set[Trial] = set()
        self._watch = Watch(lease * LONGEST_LOOK)
        self._workers: int | None = None
        self._beaten = time.monotonic()
        self.pause = FIRST_PAUSE

    def begin(self, record: str) -> None:
        """Announce the sweep, and adopt what workers have of earlier drivers."""
        for row in self._board.begin(record):
            order = order_from_text(row.order)
            asked = [trial for trial in order.trials if self._queue.asks_for(trial)]
            is_lost_pack = row.state == "lost" and len(order.trials) > 1
            if order.look or is_lost_pack or (row.state == "lost" and not asked):
                self._board.remove([row.key])
            elif asked:
                self._orders[row.key] = order
                if row.state != "lost":
                    self._queue.adopt(order)
            # The others are of a spec that has changed since: their results are evidence.

    def turn(self) -> bool:
        """Look at the board once, and act; return False at the sweep's end."""
        if time.monotonic() - self._beaten > self._lease / BEATS:
            self._board.beat()
            self._beaten = time.monotonic()
        rows, beats = self._board.look()
        absent = {row.worker: -1 for row in rows if row.state == "taken"}
        self._watch.look(absent | beats)
        self._count({name for name in beats if self._watch.silent(name) <= self._lease})
        has_news = self._note_starts(rows)
        for row in rows:
            if row.state == "done":
                self._settle(row)
                has_news = True
        self._lose_silent(rows, beats)
        has_news |= self._offer(sum(row.state == "open" for row in rows))
        self.pause = FIRST_PAUSE if has_news else min(self.pause * 1.5, LONGEST_PAUSE)
        return not self._queue.is_done

    def _count(self, alive: set[str]) -> None:
        """Tell queue and source how many workers there are; say when there are none."""
        if len(alive) == self._workers:
            return
        if not alive and not self._queue.is_done:
            self._note("no worker" + (" any more" if self._workers else " yet"))
        elif alive and not self._workers:
            self._note("the first worker has joined")
        self._workers = len(alive)
        self._queue.resize(max(self._least, len(alive)))
        self._source.on_workers(len(alive))

    def _note_starts(self, rows: list[Row]) -> bool:
        """Tell the source which orders have been taken, or given back, since the last look."""
        has_news = False
        for row in rows:
            order, lease = self._orders.get(row.key), self._seen.get(row.key, 0)
            if order is None:
                continue
            if row.state in ("taken", "done") and row.lease > lease:
                self._queue.start(order)
                self._seen[row.key], has_news = row.lease, True
            elif row.state == "open" and lease and row.lease == lease:
                self._queue.give_back(order)
                self._seen[row.key], has_news = 0, True
        return has_news

    def _settle(self, row: Row) -> None:
        """Tell the queue an outcome, and only then remove the order."""
        order = self._orders.pop(row.key, None)
        trials = (order or order_from_text(row.order)).trials
        outcome = outcome_from_text(self._board.outcome(row.key), trials)
        if isinstance(outcome, Done):
            outcome = self._without_answered(outcome)
        if order is None:
            self._tell_unasked(outcome)
        elif isinstance(outcome, str):
            self._queue.lose(order, outcome)
        else:
            self._queue.settle(order, outcome)
        self._seen.pop(row.key, None)
        self._board.remove([row.key])

    def _without_answered(self, outcome: Done) -> Done:
        """Return an outcome without trials of which another order has brought the result."""
        results = tuple(r for r in outcome.results if r.trial not in self._answered)
        self._answered.update(r.trial for r in results if r.status is not Status.FAILED)
        return replace(outcome, results=results)

    def _tell_unasked(self, outcome: object) -> None:
        """Tell results that were asked for before the spec changed; they are evidence."""
        results = outcome.results if isinstance(outcome, Done) else ()
        if kept := [result for result in results if result.status is not Status.FAILED]:
            self._source.tell(*kept)

    def _lose_silent(self, rows: list[Row], beats: dict[str, int]) -> None:
        """Take orders from workers whose beat has stood still for a lease."""
        silent = {
            name
            for name in {*beats, *(row.worker for row in rows)}
            if self._watch.silent(name) > self._lease
        }
        lost = [row for row in rows if row.state == "taken" and row.worker in silent]
        keys = self._board.lose([row.key for row in lost], silent) if silent else set()
        for row in lost:
            order = self._orders.get(row.key)
            if order is None or row.key not in keys:
                continue
            self._queue.lose(
                order, f"worker {row.worker} has not been heard of for {self._lease:g} s"
            )
            self._seen.pop(row.key, None)
            # A trial that is offered again keeps its row: the first delivery counts, whose it is.
            if len(order.trials) > 1 or order.look or not self._queue.asks_for(order.trials[0]):
                del self._orders[row.key]
                self._board.remove([row.key])

    def _offer(self, still_open: int) -> bool:
        """Offer all that is asked for; what has failed before, when nothing else is on offer.

        With nobody to take it, nothing is offered: packs are divided among the workers there are.
        """
        if not self._workers:
            return False
        offers: dict[str, str] = {}
        while order := self._queue.offer(retries=not still_open and not offers):
            text = order_as_text(order)
            offers[key_of(text)] = text
            self._orders[key_of(text)] = order
        if offers:
            self._board.offer(offers)
        return bool(offers)
