"""The board on which a driver offers orders and workers deliver outcomes, and the texts on it.

The board is in the sweep's database, so driver and workers need nothing else in common. The driver
alone decides: it offers an order, and after a worker's loss the order again. A worker writes to its
own row and to the orders that it has taken.

No clock is compared with another machine's. A driver and every worker count up a number, its beat.
The other side measures on its own monotonic clock how long a beat has stood still, so that neither
a wrong clock nor a machine that has slept makes a living worker look dead.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol

from telescope.dispatch.packs import Done, Limit
from telescope.dispatch.queue import Order
from telescope.records import CurvePoint, Result, Trial

LEASE = 60.0
"""Seconds without a beat after which a worker's order is given to another. Assumption: longer than
a busy database or a full machine delays a worker, and short beside a trial."""
BEATS = 6
"""Beats per lease, so that a few may be late or lost."""
LONGEST_LOOK = 0.25
"""Most that a pause between two looks at the beats counts, as a share of a lease. If the watcher
has slept, those watched may have slept too, and get the time to say so."""


class Row(NamedTuple):
    """An order on the board."""

    key: str
    order: str
    """See `order_as_text`."""
    state: str
    """"open": to be taken. "taken". "lost": its worker was, and what that delivers still counts.
    "done": an outcome was delivered."""
    lease: int
    """Number of times that it has been taken."""
    worker: str
    """The last one that has taken it."""


class Taken(NamedTuple):
    """An order that a worker has taken."""

    key: str
    order: str
    lease: int


class Announced(NamedTuple):
    """A sweep on the board."""

    record: str
    """JSON that the driver wrote for the workers."""
    state: str
    """"running", "away" after a driver that was interrupted, or "ended"."""
    beat: int
    """The driver's."""


class DriverBoard(Protocol):
    """The driver's side of the board, for one sweep."""

    def begin(self, record: str) -> list[Row]:
        """Announce the sweep, take it over from any driver before, and withdraw open orders.

        Returns:
            The orders that workers have from earlier drivers.
        """
        ...

    def look(self) -> tuple[list[Row], dict[str, int]]:
        """Return the orders, by position, and worker → beat.

        Raises:
            LostError: another driver has taken over.
        """
        ...

    def beat(self) -> None:
        """Show the workers that the driver is there."""
        ...

    def offer(self, orders: Mapping[str, str]) -> None:
        """Offer orders, key → text; one that was lost is offered again, one delivered is left."""
        ...

    def outcome(self, key: str) -> str:
        """Return what was delivered for an order."""
        ...

    def lose(self, keys: Iterable[str], workers: Iterable[str]) -> set[str]:
        """Mark orders as lost, but for those just delivered, and remove workers.

        Returns:
            The keys of the lost ones.
        """
        ...

    def remove(self, keys: Iterable[str]) -> None:
        """Remove orders; what is delivered for them is refused from now on."""
        ...

    def leave(self, state: str) -> None:
        """Say that this driver ends; with "ended" everything else of the sweep is removed."""
        ...


class WorkerBoard(Protocol):
    """A worker's side of the board, for one sweep."""

    def sweep(self) -> Announced | None:
        """Return the sweep; None while no driver has announced it."""
        ...

    def beat(self) -> None:
        """Show the driver that this worker is alive; do not wait for a lost database."""
        ...

    def take(self) -> Taken | None:
        """Take the next open order; after a lost answer, the one that was taken."""
        ...

    def deliver(self, taken: Taken, outcome: str, *, only_mine: bool) -> bool:
        """Deliver an order's outcome.

        Args:
            taken: the order.
            outcome: see `outcome_as_text`.
            only_mine: refuse it if the lease is no longer this worker's.

        Returns:
            False if another worker has delivered first, or nobody wants it any more.
        """
        ...

    def leave(self) -> None:
        """Remove this worker, and put what it has not delivered back on offer."""
        ...


def order_as_text(order: Order) -> str:
    """Return an order as JSON."""
    return json.dumps({"trials": [t.as_dict() for t in order.trials], "look": order.look})


def order_from_text(text: str) -> Order:
    """Rebuild an order."""
    data = json.loads(text)
    return Order(tuple(map(Trial.from_dict, data["trials"])), data["look"])


def key_of(order: str) -> str:
    """Return an order's key, made from its content, so that no trial is on the board twice."""
    return hashlib.sha256(order.encode()).hexdigest()[:32]


def outcome_as_text(outcome: Done | Limit | str) -> str:
    """Return an outcome as JSON: of training, of a probe, or the reason of a process's death."""
    if isinstance(outcome, str):
        return json.dumps({"lost": outcome})
    if isinstance(outcome, Limit):
        return json.dumps({"limit": outcome})
    results = [_result_as_dict(result) for result in outcome.results]
    return json.dumps({"results": results, "shrink": outcome.limit, "why": outcome.why})


def outcome_from_text(text: str, members: Sequence[Trial]) -> Done | Limit | str:
    """Rebuild the outcome of an order with these trials."""
    data = json.loads(text)
    if "lost" in data:
        return str(data["lost"])
    if "limit" in data:
        return Limit(*data["limit"])
    shrink = None if data["shrink"] is None else Limit(*data["shrink"])
    results = tuple(map(_result_from_dict, data["results"]))
    return Done(tuple(members), results, shrink, data["why"])


def _result_as_dict(result: Result) -> dict[str, Any]:
    return {**result.as_dict(), "curve": [asdict(row) for row in result.curve]}


def _result_from_dict(data: Mapping[str, Any]) -> Result:
    curve = tuple(CurvePoint(**row) for row in data["curve"])
    return replace(Result.from_dict(data), curve=curve)


class Watch:
    """Watches beats, and says how long each has stood still.

    Args:
        longest_look: seconds that count at most between two looks.
    """

    def __init__(self, longest_look: float) -> None:
        """Watch nothing yet."""
        self._longest_look = longest_look
        self._beats: dict[str, int] = {}
        self._silent: dict[str, float] = {}
        self._looked = time.monotonic()

    def look(self, beats: Mapping[str, int]) -> None:
        """Take the beats of all who are there, by name."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, self._longest_look), now
        self._silent = {
            name: self._silent[name] + passed if self._beats.get(name) == beat else 0.0
            for name, beat in beats.items()
        }
        self._beats = dict(beats)

    def silent(self, name: str) -> float:
        """Return the seconds for which a beat has stood still; 0 for one that is not known."""
        return self._silent.get(name, 0.0)
