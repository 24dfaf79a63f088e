"""Boards of workers that join, in one database, and the contract that they keep on each kind."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Self

from stages import Recorded

from telescope.dispatch.joining.board import Taken, key_of, order_as_text
from telescope.dispatch.queue import Order
from telescope.records import Trial
from telescope.store.board import Driver, Worker


def order_of(trial: Trial) -> dict[str, str]:
    """An order as the driver offers it, by its key."""
    text = order_as_text(Order((trial,)))
    return {key_of(text): text}


class Boards(ExitStack):
    """The boards of one sweep; closed at the end."""

    def __init__(self, url: str, sweep: str = "sweep") -> None:
        super().__init__()
        self._url, self._sweep = url, sweep

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def driver(self) -> Driver:
        return self.enter_context(closing(Driver(self._url, self._sweep)))

    def worker(self, name: str) -> Worker:
        return self.enter_context(closing(Worker(self._url, self._sweep, name)))

    def offered(self, number: int) -> tuple[Driver, list[str]]:
        """A driver that offers so many orders, and their keys."""
        driver, keys = self.driver(), list[str]()
        driver.begin("{}")
        for trial in Recorded(number).stages[0]:
            driver.offer(order_of(trial))
            keys += order_of(trial)
        return driver, keys

    def no_order_is_taken_twice(self) -> None:
        _, keys = self.offered(12)
        workers = [self.worker(f"w{n}") for n in range(4)]

        def take_all(worker: Worker) -> list[Taken]:
            found = []
            while taken := worker.take():
                assert worker.take() == taken, "after a lost answer, the same"
                found.append(taken)
                worker.deliver(taken, "{}", only_mine=True)
            return found

        with ThreadPoolExecutor(len(workers)) as pool:
            found = [taken for each in pool.map(take_all, workers) for taken in each]
        assert sorted(taken.key for taken in found) == sorted(keys)
        assert {taken.lease for taken in found} == {1}

    def first_delivery_counts(self) -> None:
        driver, (key,) = self.offered(1)
        first, second = self.worker("first"), self.worker("second")
        lost = first.take()
        assert lost
        driver.lose([key], ["first"])
        driver.offer({key: lost.order})
        again = second.take()
        assert again
        assert again.lease == 2
        assert second.deliver(again, "good", only_mine=False)
        assert second.deliver(again, "good", only_mine=False), "after a lost answer"
        assert not first.deliver(lost, "late", only_mine=False)
        assert driver.outcome(key) == "good"
        driver.remove([key])
        assert not first.deliver(lost, "later", only_mine=False)
        assert driver.look()[0] == []

    def late_failure_is_refused(self) -> None:
        driver, (key,) = self.offered(1)
        first, second = self.worker("first"), self.worker("second")
        lost = first.take()
        assert lost
        driver.lose([key], ["first"])
        assert not first.deliver(lost, "failed", only_mine=True)
        driver.offer({key: lost.order})
        again = second.take()
        assert again
        assert not first.deliver(lost, "failed", only_mine=True)
        assert second.deliver(again, "failed", only_mine=True)

    def given_back_keeps_its_place(self) -> None:
        driver, keys = self.offered(2)
        worker, other = self.worker("leaves"), self.worker("stays")
        worker.beat()
        taken = worker.take()
        assert taken
        worker.leave()
        rows, beats = driver.look()
        assert [(row.key, row.state) for row in rows] == [(key, "open") for key in keys]
        assert beats == {}
        again = other.take()
        assert again
        assert (again.key, again.lease) == (keys[0], 2)

    def driver_comes_back(self) -> None:
        _, keys = self.offered(3)
        worker, other = self.worker("w"), self.worker("o")
        done, taken = worker.take(), other.take()
        assert done
        assert taken
        worker.deliver(done, json.dumps({"lost": "x"}), only_mine=True)
        back = self.driver()
        rows = back.begin("{}")
        assert [(row.key, row.state) for row in rows] == [(keys[0], "done"), (keys[1], "taken")]
        announced = worker.sweep()
        assert announced
        assert announced.state == "running"
        back.beat()
        after = worker.sweep()
        assert after
        assert after.beat == announced.beat + 1
        back.leave("ended")
        assert back.look() == ([], {})
        assert not other.deliver(taken, "{}", only_mine=False)
