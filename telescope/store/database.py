"""The name of a sweep's database, its options, and its words when it fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sqlalchemy

from telescope.store.folder import DATABASE_FILE

LOCK_TIMEOUT = 10.0
"""Seconds to wait for another process, a dashboard say, to let go of an SQLite file; Optuna tries
five times to add a trial, so that a result waits for about five times as long."""


def sqlite_url(folder: Path) -> str:
    """Return the URL of the SQLite file in a results folder."""
    path = str((folder / DATABASE_FILE).absolute())
    return sqlalchemy.URL.create("sqlite", database=path).render_as_string()


def is_file(url: str) -> bool:
    """Tell whether a storage is an SQLite file, not a server."""
    return url.startswith("sqlite")


def engine_options(url: str) -> dict[str, Any]:
    """Return SQLAlchemy's options: a lock's timeout for a file, a ping before use for a server.

    Raises:
        ValueError: a part of the password would be taken for a part of the host, and be shown.
    """
    if is_file(url):
        return {"connect_args": {"timeout": LOCK_TIMEOUT}}
    if "@" in (sqlalchemy.make_url(url).host or ""):
        raise ValueError("an @ in the password must be written as %40")
    return {"pool_pre_ping": True}


def reason_of(error: BaseException) -> str:
    """Return the database's own message on one line, without SQLAlchemy's and Optuna's wrapping."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error)
    return " ".join(text.partition("(Background")[0].split())[:300]


def opening_advice(error: BaseException) -> str:
    """Return what to do about a storage that cannot be opened."""
    if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
        return "for PostgreSQL install the extra too: pip install 'telescope-mup[postgres]'"
    return "give an Optuna RDB URL such as sqlite:////folder/trials.db"


def without_password(url: str) -> str:
    """Return a storage URL without its password, fit to be shown and stored."""
    try:
        full = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # no URL, but somebody meant one
        return re.sub(r"(//[^:/@]*):.*@", r"\1@", url)
    # `set(password=None)` would ignore the None and leave the password in.
    query = {key: value for key, value in full.query.items() if not _is_secret(key)}
    host = full.host and full.host.rpartition("@")[2]  # before an @: the rest of a password
    bare = sqlalchemy.URL.create(
        full.drivername, full.username, None, host, full.port, full.database, query
    )
    return bare.render_as_string(hide_password=False)


def has_password(url: str) -> bool:
    """Tell whether a storage URL has a password, at whatever place."""
    try:
        full = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return without_password(url) != url
    return full.password is not None or any(map(_is_secret, full.query))


def _is_secret(key: str) -> bool:
    """Tell whether a key of a URL's query gives a password: password, sslpassword, passfile."""
    return "pass" in key.lower()
