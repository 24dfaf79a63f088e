"""The board of workers that join: three tables of our own in the sweep's database.

The driver writes the sweep and offers orders; a worker writes its beat and the orders that it has
taken. Each method is one short transaction, which can be repeated if its answer is lost: an order
is taken once, and the first delivery counts. On PostgreSQL a row is locked, on SQLite the file.

    telescope_sweeps    what workers need to train a sweep's trials, and the driver's beat
    telescope_orders    what is on offer, taken or delivered, until the driver has stored it
    telescope_workers   the beat of each worker
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import sqlalchemy
from sqlalchemy import Column, Connection, Engine, Integer, String, Table, Text, event
from sqlalchemy.exc import SQLAlchemyError

from telescope.dispatch.joining.board import (
    Announced,
    DriverBoard,
    Row,
    Taken,
    WorkerBoard,
)
from telescope.errors import LostError, SpecError, StoreError
from telescope.files import network_file_system
from telescope.store.database import (
    engine_options,
    is_file,
    opening_advice,
    reason_of,
    without_password,
)

PATIENCE = 60.0
"""Seconds to wait for a database that is lost during a sweep, of a driver."""
CONNECT_SECONDS = 10
"""Seconds to wait for a server that does not answer; libpq alone waits for minutes."""
LEAVE_SECONDS = 5.0
"""Seconds to wait for a lost database when a worker leaves; a batch system does not wait long."""
RETRY_SECONDS = 1.0
"""Pause between two tries to reach a lost database."""
Found = TypeVar("Found")

_TABLES = sqlalchemy.MetaData()
SWEEPS = Table(
    "telescope_sweeps",
    _TABLES,
    Column("name", String(120), primary_key=True),
    Column("record", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("beat", Integer, nullable=False),
    Column("driver", String(32), nullable=False),
)
ORDERS = Table(
    "telescope_orders",
    _TABLES,
    Column("sweep", String(120), primary_key=True),
    Column("key", String(32), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("content", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("lease", Integer, nullable=False),
    Column("worker", String(200), nullable=False),
    Column("outcome", Text, nullable=False),
)
WORKERS = Table(
    "telescope_workers",
    _TABLES,
    Column("sweep", String(120), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("beat", Integer, nullable=False),
)


class _Board:
    """A sweep's part of the tables.

    Args:
        url: an Optuna RDB URL.
        sweep: the sweep's name.
        patience: seconds to wait for a database that is lost.

    Raises:
        SpecError: workers cannot share such a storage.
    """

    def __init__(self, url: str, sweep: str, *, patience: float = PATIENCE) -> None:
        """Prepare the connection; nothing is opened yet."""
        self.name = without_password(url)
        self._sweep, self.patience = sweep, patience
        self._engine = _engine(url)

    def close(self) -> None:
        """Close the database's connections."""
        self._engine.dispose()

    def _do(self, work: Callable[[Connection], Found], *, patience: float | None = None) -> Found:
        """Do work in one transaction; wait for a lost database, and do it again.

        Raises:
            StoreError: the database stays away.
        """
        patience = self.patience if patience is None else patience
        deadline = time.monotonic() + patience
        while True:
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except SQLAlchemyError as error:
                if time.monotonic() >= deadline:
                    raise StoreError(
                        f"{self.name}: cannot be used: {reason_of(error)}; what is stored there is "
                        "kept: mend it, and the same command goes on"
                    ) from error
            time.sleep(RETRY_SECONDS)


class Driver(_Board, DriverBoard):
    """The driver's side."""

    _token = ""
    """Mark of this driver among others; empty until it begins."""

    def begin(self, record: str) -> list[Row]:
        """See `DriverBoard.begin`; creates the tables if needed."""
        self._token = secrets.token_hex(16)
        announced = {"record": record, "state": "running", "driver": self._token}

        def work(connection: Connection) -> list[Row]:
            _TABLES.create_all(connection)
            known = connection.execute(
                SWEEPS.update()
                .where(SWEEPS.c.name == self._sweep)
                .values(**announced, beat=SWEEPS.c.beat + 1)
            )
            if not known.rowcount:
                connection.execute(SWEEPS.insert().values(name=self._sweep, beat=0, **announced))
            connection.execute(
                ORDERS.delete().where(ORDERS.c.sweep == self._sweep, ORDERS.c.state == "open")
            )
            return self._rows(connection)

        return self._do(work)

    def _rows(self, connection: Connection) -> list[Row]:
        columns = (ORDERS.c.key, ORDERS.c.content, ORDERS.c.state, ORDERS.c.lease, ORDERS.c.worker)
        query = sqlalchemy.select(*columns).where(ORDERS.c.sweep == self._sweep)
        return [Row(*row) for row in connection.execute(query.order_by(ORDERS.c.position))]

    def look(self) -> tuple[list[Row], dict[str, int]]:
        """See `DriverBoard.look`."""

        def work(connection: Connection) -> tuple[list[Row], dict[str, int]]:
            holder = connection.scalar(
                sqlalchemy.select(SWEEPS.c.driver).where(SWEEPS.c.name == self._sweep)
            )
            if holder != self._token:
                raise LostError(
                    f"{self._sweep}: another driver has taken it over in {self.name}; what was "
                    "stored before is kept; use --name for a sweep of your own"
                )
            beats = sqlalchemy.select(WORKERS.c.name, WORKERS.c.beat)
            found = connection.execute(beats.where(WORKERS.c.sweep == self._sweep))
            return self._rows(connection), {row.name: row.beat for row in found}

        return self._do(work)

    def beat(self) -> None:
        """See `DriverBoard.beat`."""
        mine = (SWEEPS.c.name == self._sweep, SWEEPS.c.driver == self._token)
        self._do(lambda c: c.execute(SWEEPS.update().where(*mine).values(beat=SWEEPS.c.beat + 1)))

    def offer(self, orders: Mapping[str, str]) -> None:
        """See `DriverBoard.offer`."""

        def work(connection: Connection) -> None:
            last = connection.scalar(
                sqlalchemy.select(sqlalchemy.func.max(ORDERS.c.position)).where(
                    ORDERS.c.sweep == self._sweep
                )
            )
            for position, (key, content) in enumerate(orders.items(), (last or 0) + 1):
                this = (ORDERS.c.sweep == self._sweep, ORDERS.c.key == key)
                there = connection.scalar(
                    sqlalchemy.select(ORDERS.c.state).where(*this).with_for_update()
                )
                if there is None:
                    empty = {"state": "open", "lease": 0, "worker": "", "outcome": ""}
                    row = {"sweep": self._sweep, "key": key, "content": content, **empty}
                    connection.execute(ORDERS.insert().values(position=position, **row))
                elif there == "lost":
                    again = {"state": "open", "position": position}
                    connection.execute(ORDERS.update().where(*this).values(**again))

        self._do(work)

    def outcome(self, key: str) -> str:
        """See `DriverBoard.outcome`."""
        query = sqlalchemy.select(ORDERS.c.outcome).where(
            ORDERS.c.sweep == self._sweep, ORDERS.c.key == key
        )
        return str(self._do(lambda connection: connection.scalar(query)))

    def lose(self, keys: Iterable[str], workers: Iterable[str]) -> set[str]:
        """See `DriverBoard.lose`."""
        taken = (
            ORDERS.c.sweep == self._sweep,
            ORDERS.c.key.in_(list(keys)),
            ORDERS.c.state == "taken",  # not those that have just been delivered
        )
        gone = (WORKERS.c.sweep == self._sweep, WORKERS.c.name.in_(list(workers)))

        def work(connection: Connection) -> set[str]:
            query = sqlalchemy.select(ORDERS.c.key).where(*taken).with_for_update()
            lost = set(connection.scalars(query))
            connection.execute(ORDERS.update().where(*taken).values(state="lost"))
            connection.execute(WORKERS.delete().where(*gone))
            return lost

        return self._do(work)

    def remove(self, keys: Iterable[str]) -> None:
        """See `DriverBoard.remove`."""
        these = (ORDERS.c.sweep == self._sweep, ORDERS.c.key.in_(list(keys)))
        self._do(lambda connection: connection.execute(ORDERS.delete().where(*these)))

    def leave(self, state: str) -> None:
        """See `DriverBoard.leave`."""
        mine = (SWEEPS.c.name == self._sweep, SWEEPS.c.driver == self._token)

        def work(connection: Connection) -> None:
            ours = connection.execute(SWEEPS.update().where(*mine).values(state=state))
            if ours.rowcount and state == "ended":
                connection.execute(ORDERS.delete().where(ORDERS.c.sweep == self._sweep))
                connection.execute(WORKERS.delete().where(WORKERS.c.sweep == self._sweep))

        self._do(work, patience=0.0 if state == "away" else None)


class Worker(_Board, WorkerBoard):
    """A worker's side.

    Args:
        url: an Optuna RDB URL.
        sweep: the sweep's name.
        worker: a name that no other worker has.
        patience: seconds to wait for a database that is lost.
    """

    def __init__(self, url: str, sweep: str, worker: str, *, patience: float = PATIENCE) -> None:
        """Prepare the connection; nothing is opened yet."""
        super().__init__(url, sweep, patience=patience)
        self._worker, self._has_tables = worker, False
        self._is_file, self._file = is_file(url), Path(self._engine.url.database or "")

    def sweep(self) -> Announced | None:
        """See `WorkerBoard.sweep`; never creates a file or a table."""
        if self._is_file and not self._file.is_file():
            return None

        def work(connection: Connection) -> Announced | None:
            self._has_tables = self._has_tables or _has_tables(connection)
            if not self._has_tables:
                return None
            columns = (SWEEPS.c.record, SWEEPS.c.state, SWEEPS.c.beat)
            query = sqlalchemy.select(*columns).where(SWEEPS.c.name == self._sweep)
            found = connection.execute(query).one_or_none()
            return found and Announced(*found)

        return self._do(work)

    def others(self) -> list[str]:
        """Return the names of all sweeps on the board."""
        names: list[str] = []
        with suppress(StoreError):
            if not self._is_file or self._file.is_file():
                query = sqlalchemy.select(SWEEPS.c.name).order_by(SWEEPS.c.name)
                names = self._do(lambda c: list(c.scalars(query)), patience=0.0)
        return names

    def beat(self) -> None:
        """See `WorkerBoard.beat`."""
        me = (WORKERS.c.sweep == self._sweep, WORKERS.c.name == self._worker)

        def work(connection: Connection) -> None:
            update = WORKERS.update().where(*me).values(beat=WORKERS.c.beat + 1)
            if not connection.execute(update).rowcount:
                row = {"sweep": self._sweep, "name": self._worker, "beat": 0}
                connection.execute(WORKERS.insert().values(**row))

        self._do(work, patience=0.0)

    def take(self) -> Taken | None:
        """See `WorkerBoard.take`."""
        ours = ORDERS.c.sweep == self._sweep
        columns = (ORDERS.c.key, ORDERS.c.content, ORDERS.c.lease)
        mine = sqlalchemy.select(*columns).where(
            ours, ORDERS.c.state == "taken", ORDERS.c.worker == self._worker
        )
        free = (
            sqlalchemy.select(*columns)
            .where(ours, ORDERS.c.state == "open")
            .order_by(ORDERS.c.position)
            .limit(1)
            .with_for_update(skip_locked=True)
        )

        def work(connection: Connection) -> Taken | None:
            if kept := connection.execute(mine).first():
                return Taken(*kept)
            found = connection.execute(free).first()
            if found is None:
                return None
            taken = Taken(found.key, found.content, found.lease + 1)
            values = {"state": "taken", "worker": self._worker, "lease": taken.lease}
            connection.execute(
                ORDERS.update().where(ours, ORDERS.c.key == taken.key).values(**values)
            )
            return taken

        return self._do(work)

    def deliver(self, taken: Taken, outcome: str, *, only_mine: bool) -> bool:
        """See `WorkerBoard.deliver`."""
        this = (ORDERS.c.sweep == self._sweep, ORDERS.c.key == taken.key)
        columns = (ORDERS.c.state, ORDERS.c.lease, ORDERS.c.worker)

        def work(connection: Connection) -> bool:
            found = connection.execute(
                sqlalchemy.select(*columns).where(*this).with_for_update()
            ).first()
            is_mine = found is not None and (found.lease, found.worker) == (
                taken.lease,
                self._worker,
            )
            if found is None or (found.state == "done" and not is_mine):
                return False
            if only_mine and not (is_mine and found.state in ("taken", "done")):
                return False
            values = {"state": "done", "outcome": outcome, "worker": self._worker}
            connection.execute(ORDERS.update().where(*this).values(**values))
            return True

        return self._do(work)

    def leave(self) -> None:
        """See `WorkerBoard.leave`."""
        me = (WORKERS.c.sweep == self._sweep, WORKERS.c.name == self._worker)
        mine = (ORDERS.c.sweep == self._sweep, ORDERS.c.worker == self._worker)

        def work(connection: Connection) -> None:
            if not _has_tables(connection):
                return
            taken = ORDERS.update().where(*mine, ORDERS.c.state == "taken")
            connection.execute(taken.values(state="open"))
            connection.execute(WORKERS.delete().where(*me))

        self._do(work, patience=LEAVE_SECONDS)


def _has_tables(connection: Connection) -> bool:
    """Tell whether a driver has made the tables."""
    there = sqlalchemy.inspect(connection).get_table_names()
    return _TABLES.tables.keys() <= set(there)


def check_shareable(url: str) -> None:
    """Check that workers can share a storage, as far as its URL says; nothing is opened.

    Raises:
        SpecError: they cannot.
    """
    _engine(url).dispose()


def _engine(url: str) -> Engine:
    """Return SQLAlchemy's engine, whose transactions on SQLite lock the file at once.

    Raises:
        SpecError: it is not a URL, has no driver here, or workers cannot share it.
    """
    name = without_password(url)
    try:
        parsed, options = sqlalchemy.make_url(url), engine_options(url)
        kind = parsed.get_backend_name()
        is_libpq = parsed.get_driver_name().startswith("psycopg")
        if is_libpq and "connect_timeout" not in parsed.query:
            waits = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": 30_000}
            options |= {"connect_args": waits}
        engine = sqlalchemy.create_engine(url, **options)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise SpecError(
            f"--storage {name}: cannot be opened: {reason_of(error)}; {opening_advice(error)}"
        ) from error
    if kind == "postgresql":
        return engine
    if kind != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise SpecError(f"--storage {name}: must be PostgreSQL, or an SQLite file, for workers")
    if shared := network_file_system(Path(str(parsed.database))):
        raise SpecError(
            f"--storage {name}: is on a network file system ({shared}), whose locks SQLite cannot "
            "rely on: two workers could take one trial; use PostgreSQL, or, with all workers on "
            "this machine, a file on a local disk"
        )
    event.listen(engine, "connect", _leave_transactions_to_us)
    event.listen(engine, "begin", _lock)
    return engine


def _leave_transactions_to_us(connection: object, _record: object) -> None:
    """Stop Python's driver from beginning transactions, which it does too late to lock a row."""
    connection.isolation_level = None  # type: ignore[attr-defined]


def _lock(connection: Connection) -> None:
    """Begin a transaction that holds the file until its end."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
