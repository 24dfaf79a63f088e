"""Every error that a user can cause, as one tree.

    TelescopeError            exit code 2 unless said otherwise
    ├── SpecError             a key of the spec, an option, or a file it names (also ValueError)
    ├── ModelError            a model file that cannot be built, tagged or trained as muP
    ├── DataError             a corpus that is missing, empty, too short or changed
    ├── ResumeError           a results folder that does not fit the spec, or is in use
    ├── StoreError            results that cannot be kept or read now: disk full, locked, damaged
    ├── LostError             what the trials run on has gone: Ray's head or raylet
    ├── TrialError            a trial that was told to a ladder that did not ask for it
    └── RefusedError          the answer is no: over budget, nothing to transfer (exit code 1)

Messages say where, what was given, what is allowed and what to do, on one line; a spec with
several faults is a `SpecError` with a line for each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class TelescopeError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    exit_code = 2


class SpecError(TelescopeError, ValueError):
    """A key of the spec or an option has a value that is not allowed."""

    def __init__(self, *faults: str) -> None:
        """Say one fault, or several."""
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        """A line for each."""
        return "\n".join(self.faults)


class ModelError(TelescopeError):
    """The model file cannot be loaded, built, tagged by role or run."""


class DataError(TelescopeError):
    """The corpus is missing, empty, too short, or not the one that was fingerprinted."""

    def __init__(self, *faults: str) -> None:
        """Say one fault, or several one after the other."""
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        """All of them on one line, numbered where there are several."""
        if len(self.faults) <= 1:
            return "".join(self.faults)
        shown = "; ".join(f"({n}) {text}" for n, text in enumerate(self.faults[:MOST_FAULTS], 1))
        more = len(self.faults) - MOST_FAULTS
        return f"{len(self.faults)} faults in the data: {shown}" + (
            f"; and {more} more" if more > 0 else ""
        )


class ResumeError(TelescopeError):
    """The results folder holds another sweep, or another process holds the folder."""


class StoreError(TelescopeError):
    """Results cannot be kept or read just now: disk full, folder gone, database locked or damaged.

    What was stored before stays; when the fault is mended, the same command goes on.
    """


class LostError(TelescopeError):
    """What the trials run on has gone; what finished is kept, and the same command goes on."""


class TrialError(TelescopeError, ValueError):
    """A result for a trial that the ladder never asked for, or that makes no sense."""


class RefusedError(TelescopeError):
    """The question was understood and the answer is no."""

    exit_code = 1


MOST_FAULTS = 12
"""Faults that one message lists; of more it says how many there are."""


class Faults:
    """Collects the faults of one kind of input, so that all of them are said at once."""

    def __init__(self) -> None:
        """Nothing has been found."""
        self._found: dict[str, None] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep what the block raises about the data, and go on after it."""
        try:
            yield
        except DataError as error:
            self._found.update(dict.fromkeys(error.faults))

    def __len__(self) -> int:
        """The number found so far."""
        return len(self._found)

    def raise_all(self) -> None:
        """Raise one error about all that was found; nothing where nothing was."""
        if self._found:
            raise DataError(*self._found)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the nearest one that is, if any is near.

    >>> did_you_mean("weight_deacy", ["lr", "weight_decay"]), did_you_mean("x", ["lr"])
    ('; did you mean weight_decay?', '')
    """
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
