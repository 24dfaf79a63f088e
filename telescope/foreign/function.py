"""Train with a user's Python function, called once per trial.

The trainer is plain data, so it can be pickled to workers, and works alike inline and on Ray.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telescope.errors import SpecError, TrialError
from telescope.foreign.loading import load_function, seen_from
from telescope.foreign.outcome import CurveRows, as_result, on_stderr
from telescope.foreign.place import Place
from telescope.foreign.program import check_unchanged
from telescope.records import Result, Trial


@dataclass(frozen=True)
class FunctionTrainer:
    """Calls a user's function with keywords: width, seed, and every axis by name.

    It also gets the trainer's `arguments`, and ``base_width``, ``steps`` and ``trial_folder`` if
    its signature names them. It returns a float loss, or a mapping like a command's JSON line, in
    which ``curve`` may be a list of such lines.
    """

    function: str
    directories: tuple[str, ...]
    """Directories from which it is imported, in the order of the search."""
    place: Place
    sources: Mapping[str, str] = field(default_factory=dict)
    """File → digest of its code when the sweep began."""

    def __call__(self, trial: Trial) -> Result:
        """Call the function once.

        Raises:
            SpecError: it cannot be imported here.
            TrialError: its return value is not a result, or its file has changed.
            Exception: any exception of the function.
        """
        start = time.perf_counter()
        check_unchanged(self.sources)
        function = load_function(self.function, self.directories)
        values = self.place.values(trial)
        always = {"width", "seed", *trial.point, *self.place.arguments}
        names = accepted(function, always, set(values) - {"python"})
        if "trial_folder" in names:
            Path(str(values["trial_folder"])).mkdir(parents=True, exist_ok=True)
        with seen_from(self.directories):
            returned = function(**{name: values[name] for name in values if name in names})
        if isinstance(returned, Result):
            return returned  # the queue checks it, as every trainer's result
        if returned is None:
            raise TrialError("the function returned nothing: it has loss None, must be a number")
        said = returned if isinstance(returned, Mapping) else {"loss": returned}
        curve = _curve(said.get("curve"))
        seconds = time.perf_counter() - start
        place = self.place
        return as_result(trial, said, place.prices, seconds=seconds, curve=curve, steps=place.steps)


def _curve(rows: object) -> CurveRows:
    """Return the curve's rows that a function returned, without anything else."""
    curve = CurveRows()
    if isinstance(rows, Iterable):
        for row in rows:
            if isinstance(row, Mapping):
                curve.add(row)
    elif rows is not None:
        on_stderr(f"telescope: curve is a {type(rows).__name__}, must be a list: left out")
    return curve


def accepted(function: Callable[..., Any], always: set[str], offered: set[str]) -> set[str]:
    """Return a function's keywords: those of `always`, and those of `offered` that it names.

    >>> def train(width, lr, base_width, **others): ...
    >>> sorted(accepted(train, {"width", "lr", "seed"}, {"base_width", "steps"}))
    ['base_width', 'lr', 'seed', 'width']
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function in C has no signature
        return always
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return always | (offered & {parameter.name for parameter in parameters})
    return (always | offered) & {parameter.name for parameter in parameters}


def check_signature(
    name: str, function: Callable[..., Any], required: set[str], offered: set[str]
) -> None:
    """Check that a function takes the sweep's axes, and needs no other parameters than those given.

    Raises:
        SpecError: it does not; the message names the parameter.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for missing in sorted(required - named) if not takes_all else ():
        raise SpecError(
            f"trainer.function: {name} takes no {missing}; it is called with keywords: "
            f"{', '.join(sorted(required))}"
        )
    for parameter in parameters:
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and parameter.name not in (required | offered) & named:
            raise SpecError(
                f"trainer.function: {name} needs {parameter.name}, which is not given; make it an "
                f"axis, or give it a default: keywords are {', '.join(sorted(required | offered))}"
            )
