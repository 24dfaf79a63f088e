"""The division of trials into packs: decided once, logged, and the same after a resume.

The rounding of a pack depends on its members, and where losses are close, a choice may depend on
the rounding. So trials that are asked for together are divided at once, before any of them starts,
and a finding about a width holds for all its packs. Both are logged as lines of JSON: after a kill,
unfinished packs are begun again with the same members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from telescope.records import Result, Status, Trial

PackSize = int | Literal["auto"]
"""Most trials of a pack; "auto" packs only on an accelerator, as many as fit, if that is faster."""


class Limit(NamedTuple):
    """The largest pack of a width."""

    most: int | None
    """Most trials of a pack; None without a limit."""
    why: str = ""
    """The reason for the limit; "" without one."""
    until: int | None = None
    """Probe again once this many trials wait, because a larger pack gains more; None: never."""
    step_seconds: float | None = None
    """Seconds of one step of a single trial, as the probe measured them; None: it did not."""

    def holds_for(self, number: int) -> bool:
        """Tell whether the limit is known to hold when `number` trials wait."""
        return self.until is None or number < self.until

    def cut(self, number: int) -> int:
        """Return the size of a pack of at most `number` trials under this limit."""
        return number if self.most is None else min(number, self.most)


@dataclass(frozen=True)
class Done:
    """The outcome of a pack, or of a single trial."""

    members: tuple[Trial, ...]
    results: tuple[Result, ...]
    """Results of the members that have ended."""
    limit: Limit | None = None
    """A new limit for the width, if the pack ran out of memory."""
    why: str = ""
    """The reason that other members have no result. Without a limit, each is then trained alone."""

    @property
    def released(self) -> tuple[Trial, ...]:
        """The members that have not ended, free for any worker."""
        ended = {result.trial for result in self.results}
        return tuple(trial for trial in self.members if trial not in ended)


@dataclass(frozen=True)
class Timing:
    """Facts in the lines of `Packs` about the seconds of trials."""

    packed: frozenset[str]
    """Names of the trials that ended in a pack: their seconds are shares of the pack's."""
    alone: tuple[float, ...]
    """Seconds of one step of a single trial, of every probe."""


def timing(lines: Iterable[Mapping[str, Any]]) -> Timing:
    """Read the trials that ended in packs, and the step times of the probes, off the lines."""
    packed, alone = set[str](), list[float]()
    for line in lines:
        if "trials" in line:
            packed.update(line.get("ended", line["trials"]))
        elif (seconds := line.get("step_seconds")) is not None:
            alone.append(seconds)
    return Timing(frozenset(packed), tuple(alone))


class Packs:
    """The division of trials into packs.

    Args:
        size: most trials of a pack.
        lines: the lines that `note` was given before, in their order.
        note: stores a line; called before the line takes effect.
    """

    def __init__(
        self,
        size: PackSize = 1,
        *,
        lines: Iterable[Mapping[str, Any]] = (),
        note: Callable[[Mapping[str, Any]], None] = lambda line: None,
    ) -> None:
        """Restore the state from the lines."""
        self.size = size
        self._note = note
        self._limits: dict[int, Limit] = {}
        self._formed: dict[str, tuple[str, ...]] = {}  # a trial's name → its pack's
        self._alone: set[str] = set()
        for line in lines:
            self._learn(line)

    def is_alone(self, trial: Trial) -> bool:
        """Tell whether a trial has to be trained alone."""
        return self.size == 1 or str(trial) in self._alone

    def is_formed(self, trial: Trial) -> bool:
        """Tell whether a trial has a pack."""
        return str(trial) in self._formed

    def find(self, trial: Trial, free: Sequence[Trial]) -> tuple[Trial, ...]:
        """Return the pack that was formed for a trial; () if there is none yet.

        If some of its members have ended elsewhere, the pack is dissolved and the others are
        trained alone.

        Args:
            trial: a trial that is asked for.
            free: all trials of its width that are asked for and that no worker has.
        """
        names = self._formed.get(str(trial), ())
        if not names or len(names) > self._cut(trial.width, self._most(len(names))):
            self._forget(names)
            return ()
        members = tuple(each for each in free if str(each) in names)
        if len(members) < len(names):
            self._forget(names)
            self._alone.update(map(str, members))
            return (trial,)
        return members

    def to_form(self, free: Sequence[Trial], workers: int) -> tuple[list[Trial], int]:
        """Return the trials of `free` without a pack, and the size of their packs.

        Args:
            free: trials of one width that are asked for and that no worker has.
            workers: number of workers among which they are divided evenly.
        """
        new = [t for t in free if not (self.is_alone(t) or self.is_formed(t))]
        return new, self._most(math.ceil(len(new) / workers))

    def knows(self, width: int, number: int) -> bool:
        """Tell whether the pack size for `number` trials of a width is known."""
        return number == 1 or (width in self._limits and self._limits[width].holds_for(number))

    def form(self, trials: Sequence[Trial], number: int) -> None:
        """Divide trials of one width into packs as large as allowed, at most `number` each."""
        size = self._cut(trials[0].width, number)
        packs = [trials[n : n + size] for n in range(0, len(trials), size)]
        names = [[str(trial) for trial in pack] for pack in packs]
        line = {"width": trials[0].width, "packs": names}
        if size > 1:
            self._note(line)
        self._learn(line)

    def found(self, width: int, limit: Limit) -> None:
        """Take a finding about a width."""
        self._say({"width": width, "asked": self.size, **limit._asdict()})

    def ended(self, pack: Done) -> None:
        """Take the outcome of a pack."""
        if len(pack.members) == 1:
            return
        kept = [r.trial for r in pack.results if r.status is not Status.FAILED]
        rest = [str(trial) for trial in pack.members if trial not in kept]
        members = [str(trial) for trial in pack.members]
        line: dict[str, Any] = {"width": pack.members[0].width, "trials": members}
        if rest:
            alone = [] if pack.limit else rest
            line |= {"ended": [str(trial) for trial in kept], "alone": alone, "why": pack.why}
        self._say(line)
        if pack.limit:
            self.found(pack.members[0].width, pack.limit)

    def _cut(self, width: int, number: int) -> int:
        """Return the size of a pack of at most `number` trials under the known limit of a width."""
        return self._limits.get(width, Limit(None)).cut(number)

    def _most(self, number: int) -> int:
        return number if self.size == "auto" else min(number, self.size)

    def _say(self, line: Mapping[str, Any]) -> None:
        self._note(line)
        self._learn(line)

    def _learn(self, line: Mapping[str, Any]) -> None:
        if "packs" in line:
            for pack in line["packs"]:
                self._formed |= dict.fromkeys(pack, tuple(pack))
        elif "trials" in line:
            self._forget(line["trials"])
            self._alone.update(line.get("alone", ()))
        elif line.get("asked") == self.size:
            known = {key: line[key] for key in Limit._fields if key in line}
            self._limits[line["width"]] = Limit(**known)

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._formed.pop(name, None)
