"""Which trials are trained as one: decided once, written down, and decided alike by a resume.

How a pack rounds depends on who is in it, and where losses are close, a choice can hang on that. So
the trials that are asked for together are divided at once, before any of them is begun, and what
was learned about a width holds for all its packs. Both are kept as lines of JSON: after a kill, the
packs that have not ended are begun again with the same members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from telescope.records import Result, Status, Trial

PackSize = int | Literal["auto"]
"""Trials of a pack at most; "auto" packs on an accelerator, as many as fit, where it pays."""


class Limit(NamedTuple):
    """How many trials of a width go together."""

    most: int | None
    """None where nothing limits it."""
    why: str = ""
    """What limits it; "" if nothing does."""
    until: int | None = None
    """From how many trials on that is to be found out anew, for a larger pack gains more; None:
    never."""

    def holds_for(self, number: int) -> bool:
        """Whether it says how many go together of so many trials."""
        return self.until is None or number < self.until

    def cut(self, number: int) -> int:
        """How many of so many trials go together."""
        return number if self.most is None else min(number, self.most)


@dataclass(frozen=True)
class Done:
    """What came of trials that a worker was handed to train as one, or of one alone."""

    members: tuple[Trial, ...]
    results: tuple[Result, ...]
    """Of those that have ended; none is another trial's."""
    limit: Limit | None = None
    """What it has taught about its width, if anything: the memory did not hold it."""
    why: str = ""
    """Why those without a result have none; each is then trained alone, if there is no limit."""

    @property
    def released(self) -> tuple[Trial, ...]:
        """Those that have not ended, for whoever is free."""
        ended = {result.trial for result in self.results}
        return tuple(trial for trial in self.members if trial not in ended)


class Packs:
    """Who goes with whom.

    Args:
        size: how many trials go together at most.
        lines: what `note` was given before, in its order.
        note: keeps a line; called before what it says is acted upon.
    """

    def __init__(
        self,
        size: PackSize = 1,
        *,
        lines: Iterable[Mapping[str, Any]] = (),
        note: Callable[[Mapping[str, Any]], None] = lambda line: None,
    ) -> None:
        """Know what the lines say."""
        self.size = size
        self._note = note
        self._limits: dict[int, Limit] = {}
        self._formed: dict[str, tuple[str, ...]] = {}  # a trial's name → its pack's
        self._alone: set[str] = set()
        for line in lines:
            self._learn(line)

    def is_alone(self, trial: Trial) -> bool:
        """Whether a trial has to be trained by itself."""
        return self.size == 1 or str(trial) in self._alone

    def is_formed(self, trial: Trial) -> bool:
        """Whether a trial has a pack."""
        return str(trial) in self._formed

    def find(self, trial: Trial, free: Sequence[Trial]) -> tuple[Trial, ...]:
        """The pack that was formed for a trial; none where it has yet to be.

        A pack of which some have ended elsewhere is none any more: the others are alone.

        Args:
            trial: asked for.
            free: all of its width that are asked for and that nobody has.
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
        """The trials of `free`, of one width, without a pack, and how many of them go together.

        Args:
            free: asked for, and nobody has them.
            workers: among whom they are shared out evenly.
        """
        new = [t for t in free if not (self.is_alone(t) or self.is_formed(t))]
        return new, self._most(math.ceil(len(new) / workers))

    def knows(self, width: int, number: int) -> bool:
        """Whether it is known how many of so many trials of a width go together."""
        return number == 1 or (width in self._limits and self._limits[width].holds_for(number))

    def form(self, trials: Sequence[Trial], number: int) -> None:
        """Divide trials of one width, as many together as may be, at most `number`."""
        size = self._cut(trials[0].width, number)
        packs = [trials[n : n + size] for n in range(0, len(trials), size)]
        names = [[str(trial) for trial in pack] for pack in packs]
        line = {"width": trials[0].width, "packs": names}
        if size > 1:
            self._note(line)
        self._learn(line)

    def found(self, width: int, limit: Limit) -> None:
        """Take what was found out about a width."""
        self._say({"width": width, "asked": self.size, **limit._asdict()})

    def ended(self, pack: Done) -> None:
        """Take what came of a pack."""
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
        """How many of so many trials of a width go together, as far as is known."""
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
            self._limits[line["width"]] = Limit(line["most"], line["why"], line["until"])

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._formed.pop(name, None)
