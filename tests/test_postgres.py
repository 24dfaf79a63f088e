"""A sweep on a PostgreSQL server of its own: same answer, connection lost and back, no password.

Workers that join by it are killed at random, and the server with them.

The server runs in a temporary folder, on a port of loopback, as an unprivileged user.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import Boards
from commands import telescope
from conftest import quiet
from faults import (
    STARTS,
    answers,
    finish,
    formula,
    memory_folder,
    numbered,
    run_fast,
    spec_of,
    start,
)
from kills import drive, kill_at_random, name_of, serve

from telescope import Spec
from telescope.answer.finished import open_result
from telescope.errors import ResumeError, StoreError
from telescope.records import CurvePoint, Result, Status, Trial
from telescope.store import store
from telescope.sweep.run import Options, run
from telescope.train import loop

PASSWORD = "a-secret-of-the-test"


class Server:
    """One PostgreSQL server."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries, self._folder = binaries, folder
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:  # initdb and postgres refuse root
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(folder, "postgres", "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._call("initdb", "-U", "me", "--auth=scram-sha-256", f"--pwfile={secret}")

    def _call(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), "-D", str(self._folder / "data"), *arguments]
        done = subprocess.run(
            command,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **self._user,
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        where = f"-h 127.0.0.1 -p {self.port} -k {self._folder}"
        self._call("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", where, "start")

    def kill(self) -> None:
        """As a crash: connections break, nothing is written on the way out."""
        self._call("pg_ctl", "-w", "-m", "immediate", "stop")

    def url(self, password: str = "") -> str:
        who = f"me:{password}" if password else "me"
        return f"postgresql+psycopg://{who}@127.0.0.1:{self.port}/postgres"


def binaries() -> Path | None:
    """The newest installed server: Debian keeps its programs off the path."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="needs the extra: pip install 'telescope-mup[postgres]'")
    programs = binaries()
    if programs is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="telescope-pg-"))
    server = Server(programs, folder)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    return tmp_path


def run_on(server: Server, place: Path, name: str, *, url: str | None = None) -> None:
    options = Options(
        place / "results", dispatcher="inline", storage=url or server.url(), check=False
    )
    run(Spec.from_dict(spec_of(place, name=name)), options, quiet)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    calls: list[Trial] = []

    def fast(config: Any, trial: Trial) -> Result:
        calls.append(trial)
        curve = (CurvePoint(2, 3.25, None), CurvePoint(4, 3.0, formula(trial)))
        return Result(trial, Status.COMPLETE, loss=formula(trial), flops=1.5e9, curve=curve)

    monkeypatch.setattr(loop, "train", fast)
    return calls


def comparable(place: Path, name: str) -> dict[str, Any]:
    found = answers(place, name)
    return {key: found[key] for key in ("transfer", "trials.csv", "curves")}


def test_same_sweep_same_answer_and_no_password(
    server: Server, place: Path, trained: list[Trial]
) -> None:
    run_on(server, place, "team", url=server.url(PASSWORD))
    elsewhere = place / "sqlite"
    elsewhere.mkdir()
    run_fast(elsewhere, {})
    assert comparable(place, "team") == comparable(elsewhere, "tiny")
    for file in (place / "results").rglob("*"):
        assert file.is_dir() or PASSWORD.encode() not in file.read_bytes(), file
    trained.clear()
    options = Options(place / "results", dispatcher="inline", check=False)
    run(Spec.from_dict(spec_of(place, name="team")), options, quiet)  # the folder says where
    assert trained == []


def test_a_connection_lost_and_back_in_mid_sweep(
    server: Server, place: Path, trained: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = store.Store._add
    downs: list[Trial] = []

    def adding(self: store.Store, result: Result) -> None:
        if len(trained) in (3, 7) and result.trial not in downs:
            downs.append(result.trial)
            server.kill()
            if len(downs) == 1:
                server.start()  # back before it is missed; the second time it stays away a while
        elif len(downs) == 2 and result.trial == downs[1]:
            server.start()
            downs.append(result.trial)
        add(self, result)

    monkeypatch.setattr(store.Store, "_add", adding)
    run_on(server, place, "lost")
    assert len(downs) == 3
    assert len(trained) == len(set(trained)) == 9
    elsewhere = place / "sqlite"
    elsewhere.mkdir()
    run_fast(elsewhere, {})
    assert comparable(place, "lost") == comparable(elsewhere, "tiny")


def test_a_server_that_stays_away_is_a_line_and_the_same_command_goes_on(
    server: Server, place: Path, trained: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CONNECTION_PATIENCE", 0.1)
    add = store.Store._add

    def adding(self: store.Store, result: Result) -> None:
        if len(trained) == 5:
            server.kill()
        add(self, result)

    with monkeypatch.context() as down:
        down.setattr(store.Store, "_add", adding)
        with pytest.raises(StoreError, match=r"^[^\n]+the same command goes on$") as caught:
            run_on(server, place, "away")
    assert PASSWORD not in str(caught.value)
    with pytest.raises(ResumeError, match=r"^[^\n]*refused[^\n]*$"):
        run_on(server, place, "away")
    server.start()
    stored = {result.trial for result in open_result("away", place / "results").results}
    assert len(stored) == 4
    trained.clear()
    run_on(server, place, "away")
    assert not stored & set(trained)


def test_a_wrong_password_is_a_line_without_it(
    server: Server, place: Path, trained: list[Trial]
) -> None:
    with pytest.raises(ResumeError, match="password authentication failed") as caught:
        run_on(server, place, "wrong", url=server.url("not-the-secret"))
    assert "not-the-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (place / "results" / "wrong").exists()


def test_the_board_of_workers_keeps_its_contract(server: Server, place: Path) -> None:
    contract = (
        Boards.no_order_is_taken_twice,
        Boards.first_delivery_counts,
        Boards.late_failure_is_refused,
        Boards.given_back_keeps_its_place,
        Boards.driver_comes_back,
    )
    for number, keep in enumerate(contract):
        with Boards(server.url(), f"board-{number}") as boards:
            keep(boards)


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_workers_that_join_are_killed_at_random_moments(
    server: Server, place: Path, kills: int, record_property: Callable[[str, object], None]
) -> None:
    # A driver that is killed while Optuna makes its tables may leave the next one in its way.
    store.Store(server.url(), "first", (), "f").close()
    elsewhere = place / "sqlite"
    elsewhere.mkdir()
    run_fast(elsewhere, {})
    expected = comparable(elsewhere, "tiny")
    with memory_folder(place) as folder:
        tally, done = kill_at_random(numbered(folder), kills, seed=2, storage=server.url())
        for path in done:
            assert comparable(path, name_of(path, server.url())) == expected
    assert not tally.lost
    assert not tally.twice
    record_property(
        "kill -9 of driver, worker or trainer, workers that join by PostgreSQL", str(tally)
    )


def test_a_server_that_is_lost_and_back_loses_no_training(server: Server, place: Path) -> None:
    driver, worker = start(drive, place, server.url()), start(serve, place, server.url(), 1.0)
    deadline = time.monotonic() + 60
    while not (place / STARTS).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    server.kill()
    time.sleep(0.5)
    server.start()
    others = [start(serve, place, server.url()) for _ in range(2)]
    for process in (driver, worker, *others):
        assert finish(process) == 0
    starts = (place / STARTS).read_text().splitlines()
    assert len(starts) == len(set(starts)) == 9, "none was trained twice"


def test_a_workers_wrong_password_is_a_line_without_it(server: Server, tmp_path: Path) -> None:
    done = telescope("worker", "x", "--storage", server.url("not-the-secret"), cwd=tmp_path)
    assert done.returncode == 2
    assert "password authentication failed" in done.stderr
    assert "not-the-secret" not in done.stderr
    assert done.stderr.count("\n") == 1
