"""Every error that a user can cause, as one tree.

    TelescopeError            exit code 2 unless said otherwise
    ├── SpecError             a key of the spec, an option, or a file it names (also ValueError)
    ├── ModelError            a model file that cannot be built, tagged or trained as muP
    ├── DataError             a corpus that is missing, empty, too short or changed
    ├── ResumeError           a results folder that does not fit the spec, or is in use
    ├── StoreError            results that cannot be stored or read now: disk full, locked, damaged
    ├── LostError             the loss of Ray's head or raylet, on which the trials run
    ├── TrialError            a result for a trial that the ladder did not ask for
    └── RefusedError          the answer is no: over budget, nothing to transfer (exit code 1)

A message is one line that says where the fault is, what was given, what is allowed and what to do.
A spec with several faults is a `SpecError` with one line per fault.
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
        """Take one fault or several."""
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        """Return one line per fault."""
        return "\n".join(self.faults)


class ModelError(TelescopeError):
    """The model file cannot be loaded, built, tagged by role or run."""


class DataError(TelescopeError):
    """The corpus is missing, empty, too short, or not the one that was fingerprinted."""

    def __init__(self, *faults: str) -> None:
        """Take one fault or several."""
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        """Return all faults on one line, numbered if there are several."""
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
    """Results cannot be stored or read: disk full, folder gone, database locked or damaged.

    Results stored before are kept; once the fault is mended, the same command resumes the sweep.
    """


class LostError(TelescopeError):
    """Ray is lost. Finished trials are kept, and the same command resumes the sweep."""


class TrialError(TelescopeError, ValueError):
    """A result is for a trial that the ladder never asked for, or is not valid."""


class RefusedError(TelescopeError):
    """The request was understood, and the answer is no."""

    exit_code = 1


MOST_FAULTS = 12
"""Most faults that one message lists; it counts the others."""


class Faults:
    """Collects the faults of one kind of input, to report all of them at once."""

    def __init__(self) -> None:
        """Begin without faults."""
        self._found: dict[str, None] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect a `DataError` raised in the block, and go on after it."""
        try:
            yield
        except DataError as error:
            self._found.update(dict.fromkeys(error.faults))

    def __len__(self) -> int:
        """Return the number of faults so far."""
        return len(self._found)

    def raise_all(self) -> None:
        """Raise one error with all faults, if there are any."""
        if self._found:
            raise DataError(*self._found)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a hint for a message about an unknown name: the nearest known one, or "".

    >>> did_you_mean("weight_deacy", ["lr", "weight_decay"]), did_you_mean("x", ["lr"])
    ('; did you mean weight_decay?', '')
    """
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
