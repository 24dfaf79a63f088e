"""The report: one HTML file that shows a sweep, or several side by side.

Figures are inline SVG, drawn by matplotlib: a dozen of them take 150 kB, need no script, follow the
page's colours and print sharply. The only script copies text. The page loads nothing
from elsewhere.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telescope.ladder.portrait import Portrait, WidthPortrait
from telescope.markup import table, text
from telescope.records import Axis, Trial
from telescope.report.figures import (
    CHECK_PANELS,
    CURVES_SHOWN,
    PANEL,
    Curves,
    as_svg,
    draw_check,
    draw_contours,
    draw_cost,
    draw_excess,
    draw_laws,
    draw_track,
    draw_training,
    label_of,
    of_kind,
    ranked_trials,
)
from telescope.report.frontier import (
    describe_critical,
    describe_ratio,
    describe_tokens,
    describe_trend,
    named_losses,
)
from telescope.report.frontier_figures import PANELS
from telescope.report.live import describe_seconds
from telescope.report.scaling import laws_table, ratios_table
from telescope.report.svg import inline
from telescope.report.toml import as_toml
from telescope.report.verdict import (
    caveat,
    confirming,
    describe_judgement,
    heading_of,
    percent,
    shortest,
)

if TYPE_CHECKING:
    from telescope.answer.finished import Finished
    from telescope.check.verdict import CoordCheck
    from telescope.transfer.settings import Transfer

OWN_PROGRAM = "the program that tells this sweep its losses"
ASKED_FOR = ("frontier", "scaling")
"""The parts that a page has only where their command was run; `Shown` names them alike."""
HIDDEN = "(left out of the report)"
"""Replacement for the values of a trainer's environment, which may be passwords."""


@dataclass(frozen=True)
class Shown:
    """A sweep with everything that its report shows."""

    name: str
    """Name of the sweep, unique on the page."""
    finished: Finished
    settings: Transfer | None
    no_settings: str
    """The reason that there are no settings; "" if there are."""
    check: CoordCheck | None
    no_check: str
    """The reason that there is no check to draw; "" if there is one."""
    run_command: str
    """The command that runs or resumes the sweep; "" if another program does."""
    scaling: Mapping[str, Any] | None = None
    """The answer of `telescope scaling`, if it was asked."""
    frontier: Mapping[str, Any] | None = None
    """The answer of its frontier, the keys of `frontier --json`; None if it has none."""

    @cached_property
    def portrait(self) -> Portrait:
        """The data of the figures."""
        return self.finished.portrait

    @cached_property
    def curves(self) -> Curves:
        """Trial → its training curve, for trials that have one."""
        folder = self.finished.folder
        trials = [
            Trial(width.width, dot.point, dot.seed)
            for width in self.portrait.widths
            for dot in width.dots
        ]
        found = {trial: folder.read_curve(trial) for trial in trials}
        return {trial: curve for trial, curve in found.items() if curve}


class Page:
    """Makes figures and texts whose ids are unique on the page."""

    def __init__(self) -> None:
        """Begin a page."""
        self._numbers = count(1)

    def figure(
        self,
        label: str,
        draw: Callable[..., None],
        *arguments: Any,
        caption: str = "",
        size: tuple[float, float] = PANEL,
    ) -> str:
        """Return one panel of `figures` as HTML; `label` describes it for those who cannot see."""
        svg = inline(as_svg(draw, *arguments, size=size), f"f{next(self._numbers)}", label)
        words = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
        return f"<figure>{svg}{words}</figure>"

    def copyable(self, content: str, button: str, summary: str) -> str:
        """Return a folded text with a button that copies it."""
        name = f"copy{next(self._numbers)}"
        return (
            f'<button type="button" hidden data-copy="{name}">{text(button)}</button>'
            f'<span class="copied" id="{name}-said" role="status"></span>'
            f"<details><summary>{text(summary)}</summary>"
            f'<pre id="{name}" tabindex="0">{text(content)}</pre></details>'
        )


def render(
    sweeps: Sequence[Shown], differences: Mapping[str, Mapping[str, Any]], *, seen: bool = True
) -> str:
    """Render the whole page.

    Args:
        sweeps: one sweep, or several whose losses can be compared.
        differences: key → sweep → value, for every key in which several sweeps differ.
        seen: telescope knows the data on which all of them were measured.
    """
    page = Page()
    names = ", ".join(dict.fromkeys(shown.name for shown in sweeps))
    shown_parts = {
        name: (title, make)
        for name, (title, make) in SECTIONS.items()
        if name not in ASKED_FOR or any(getattr(shown, name) for shown in sweeps)
    }
    sections = [
        _section(page, name, title, make, sweeps) for name, (title, make) in shown_parts.items()
    ]
    if len(sweeps) > 1:
        sections.insert(1, _comparison(sweeps, differences, seen=seen))
    links = "".join(
        f'<li><a href="#{name}">{text(title)}</a></li>' for name, (title, _) in shown_parts.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(names)}: telescope report</title><style>{_asset('page.css')}</style></head>"
        '<body><a class="skip" href="#answer">to the answer</a>'
        f'<header><h1>{text(names)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{''.join(sections)}</main>"
        f"<footer>written by telescope; losses are held-out losses, hyperparameters are in "
        f"base-width units unless said otherwise</footer><script>{_asset('page.js')}</script>"
        "</body></html>\n"
    )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _section(
    page: Page,
    name: str,
    title: str,
    make: Callable[[Page, Shown], str],
    sweeps: Sequence[Shown],
) -> str:
    """Render one section of the page, with a column per sweep."""
    many = len(sweeps) > 1
    columns = "".join(
        f'<div class="sweep">{f"<h3>{text(s.name)}</h3>" if many else ""}{make(page, s)}</div>'
        for s in sweeps
    )
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{text(title)}'
        f'</h2><div class="sweeps{" many" if many else ""}">{columns}</div></section>'
    )


def _comparison(
    sweeps: Sequence[Shown], differences: Mapping[str, Mapping[str, Any]], *, seen: bool
) -> str:
    """Render the losses of several sweeps in one table, and their differences."""
    names = [shown.name for shown in sweeps]
    choices = [{c.width: c for c in shown.finished.ladder.choices} for shown in sweeps]
    widths = sorted({width for of in choices for width in of})
    rows = [
        [width, *(f"{of[width].loss:.4f}" if width in of else "–" for of in choices)]
        for width in widths
    ]
    spent = [f"{shown.finished.cost()['over_target']:.3g}" for shown in sweeps]
    losses = table(
        ["loss at width", *names], [*rows, ["cost, target runs", *spent]], caption="of the choices"
    )
    differing = table(
        ["trained differently", *names],
        [[key, *(of.get(name) for name in names)] for key, of in differences.items()],
    )
    same = _note("Everything that makes losses comparable is the same.")
    if not seen:
        same = _note(UNSEEN_NOTE)
    return (
        '<section id="comparison" aria-labelledby="comparison-title"><h2 id="comparison-title">'
        f"Side by side</h2>{_scrolling(losses)}"
        f"{_scrolling(differing) if differences else same}</section>"
    )


def _verdict(finished: Finished) -> tuple[str, str]:
    """Return a sweep's verdict: its CSS class (pass, warn or fail), and the terminal's words."""
    if finished.ladder.stuck:
        return "fail", _capital(caveat(finished))
    certificate = finished.certificate
    if (but := caveat(finished)) or certificate is None:
        return "warn", _capital(but)
    kind = {"PASS": "pass", "FAIL": "fail"}.get(certificate.verdict, "warn")
    return kind, heading_of(certificate, finished.spec.ladder.tolerance)


def _answer(page: Page, shown: Shown) -> str:
    """Render the answer: verdict, settings, expected excess, next steps."""
    finished, spec = shown.finished, shown.finished.spec
    kind, words = _verdict(finished)
    parts = [f'<p class="verdict {kind}">{text(words)}</p>']
    if finished.ladder.stuck:
        parts.append(f"<p>{text(_sentence(finished.ladder.stuck))}</p>")
    elif finished.target_point():
        steps = spec.target.steps
        length = f", {steps} steps" if steps else ""
        parts.append(f"<p>For the target, width {spec.target.width}{length}:</p>")
        settings = "".join(_setting(finished, axis) for axis in finished.ladder.spec.axes)
        expected = _expected_excess(finished) + _expected_loss(finished)
        parts.append(f'<dl class="answer">{settings}{expected}</dl>')
        parts += [
            f"<p>Target run {text(_unbroken(describe_judgement(judged)))}.</p>"
            for judged in finished.judgements
        ]
    return "".join(parts) + _next_steps(shown)


def _setting(finished: Finished, axis: Axis) -> str:
    """Render one setting with its interval, or with the reason that there is none."""
    answer, certificate = finished.target_point(), finished.certificate
    assert answer is not None
    interval = certificate.intervals.get(axis.name) if certificate else None
    if axis.is_fixed:
        known = "fixed by the spec, not tuned"
    elif certificate is None:
        known = "the lowest measured, without an interval"
    elif interval is None:
        known = "not identified: it keeps its prior value"
    else:
        # For a run of another length the weight decay is rescaled, and its interval with it.
        factor = answer[axis.name] / certificate.point[axis.name]
        known = f"90 %: {interval[0] * factor:.3g} to {interval[1] * factor:.3g}"
    return _fact(label_of(axis.name), f"{answer[axis.name]:.4g}", known)


def _expected_excess(finished: Finished) -> str:
    """Render the answer's expected excess loss; "" without a certificate."""
    certificate = finished.certificate
    if certificate is None:
        return ""
    bound, goal = certificate.excess_bound, finished.spec.ladder.tolerance
    return _fact(
        "expected excess loss",
        _unbroken(percent(certificate.predicted_excess_loss)),
        _unbroken(f"at most {percent(bound)} with 90 %; goal {percent(goal)}"),
    )


def _expected_loss(finished: Finished) -> str:
    """Render the held-out loss that the target run is expected to end with; "" without one."""
    certificate = finished.certificate
    predicted = certificate.predicted_loss if certificate else None
    if predicted is None:
        return ""
    if predicted.loss is None or predicted.interval is None:
        return _fact("expected loss", "–", f"not predicted: {predicted.reason}")
    low, high = predicted.interval
    loss, first, last = (shortest(value, high - low) for value in (predicted.loss, low, high))
    return _fact("expected loss", loss, f"90 %: {first} to {last}")


def _fact(title: str, value: str, known: str) -> str:
    return (
        f"<div><dt>{text(title)}</dt><dd><b>{text(value)}</b><span>{text(known)}</span></dd></div>"
    )


def _next_steps(shown: Shown) -> str:
    """Render the problems of the answer, and the next command."""
    finished = shown.finished
    certificate, ladder = finished.certificate, finished.ladder
    parts = []
    if certificate and ladder.is_finished:
        parts.append(f"<p>{text(_sentence(certificate.advice))}</p>")
        if certificate.problems:
            failed = certificate.verdict == "FAIL"
            title = "What speaks against it" if failed else "What is missing"
            items = "".join(
                f"<li>{text(_unbroken(problem))}</li>" for problem in certificate.problems
            )
            parts.append(f'<p>{title}:</p><ul class="todo">{items}</ul>')
        if confirm := confirming(finished):
            parts.append(f"<p>To confirm it: <code>{text(confirm)}</code></p>")
    command, why = shown.run_command, "goes on with it"
    if ladder.is_finished:
        command = f"telescope transfer {shlex.quote(str(finished.folder.path))}"
        why = "gives the settings below, for any width and steps"
    said = f"<code>{text(command)}</code>" if command else OWN_PROGRAM
    return "".join(parts) + f"<p>Next: {said} {why}.</p>"


def _sentence(words: str) -> str:
    """Return the words with a capital letter and a full stop."""
    return _capital(_unbroken(words)) + "." * (not words.endswith("."))


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _unbroken(words: str) -> str:
    """Return the words with no line break between a number and its per cent sign."""
    return words.replace(" %", "\u00a0%")


def _optimum(page: Page, shown: Shown) -> str:
    """Render each axis' optimum against the width, and the table of choices."""
    portrait, ladder = shown.portrait, shown.finished.ladder
    figures = [
        page.figure(
            f"optimum of {label_of(axis)} against width, with the target",
            draw_track,
            portrait,
            axis,
        )
        for axis in portrait.axes
        if ladder.choices
    ]
    axes = [axis.name for axis in ladder.spec.axes]
    rows = [
        [
            choice.width,
            *(f"{choice.point[axis]:.4g}" for axis in axes),
            f"{choice.loss:.4f}",
            " + ".join(f"{number} {status}" for status, number in sorted(choice.counts.items())),
            choice.reason,
        ]
        for choice in ladder.choices
    ]
    skipped = "".join(
        f"<p>Width {s.width} was left out: {text(s.reason)}.</p>" for s in ladder.skipped
    )
    chosen = table(["width", *axes, "loss", "trials", "why"], rows)
    if not figures:
        return f"<p>{text(_sentence(portrait.unfitted))}</p>{skipped}"
    note = _note(OPTIMUM_NOTE if portrait.is_fitted else CHOICES_NOTE)
    table_of_choices = _folded("what each width chose, and why", chosen)
    return note + _panels(figures, portrait) + skipped + table_of_choices


def _note(words: str) -> str:
    """Render a note on how to read a figure."""
    return f'<p class="note">{text(_unbroken(words))}</p>'


def _panels(figures: Sequence[str], portrait: Portrait, *, none: str = "") -> str:
    """Render figures beside each other; without any, the reason."""
    if figures:
        return f'<div class="panels">{"".join(figures)}</div>'
    return f"<p>{text(_sentence(none or portrait.unfitted or 'nothing was measured yet'))}</p>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary>{_scrolling(content)}</details>"


def _scrolling(content: str) -> str:
    """Wrap content that may be wider than a phone; the keyboard can scroll it."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def _excess(page: Page, shown: Shown) -> str:
    """Render the excess loss of every width along every axis, and a table of all trials."""
    portrait = shown.portrait
    rows_of_panels = [
        _panels([_excess_panel(page, portrait, axis, w) for w in portrait.widths], portrait)
        for axis in portrait.axes
    ]
    axes = [axis.name for axis in shown.finished.ladder.spec.axes]
    rows = [
        [
            width.width,
            dot.seed,
            *(f"{dot.point[axis]:.4g}" for axis in axes),
            "–" if dot.loss is None else f"{dot.loss:.4f}",
            "–" if dot.excess is None else portrait.describe_excess(dot.excess),
            dot.status,
        ]
        for width in portrait.widths
        for dot in width.dots
    ]
    trials = table(["width", "seed", *axes, "loss", "excess", "status"], rows)
    note = EXCESS_NOTE if portrait.is_fitted else f"{_sentence(portrait.unfitted)} {UNFITTED_NOTE}"
    return _note(note) + "".join(rows_of_panels) + _folded(f"all {len(rows)} trials", trials)


def _excess_panel(page: Page, portrait: Portrait, axis: str, width: WidthPortrait) -> str:
    """Render the excess loss of one width along one axis."""
    start = "what it chose" if width.chosen else "the lowest measured"
    return page.figure(
        f"excess loss against {label_of(axis)} at width {width.width}",
        draw_excess,
        portrait,
        axis,
        [width],
        caption="" if width.is_fitted else f"no fit: counted from {start}",
    )


def _surface(page: Page, shown: Shown) -> str:
    """The fitted surface of the widest width, a slice per pair of axes."""
    portrait = shown.portrait
    figures = [
        page.figure(
            f"contours of the fitted excess loss over {label_of(c.across)} and {label_of(c.up)}",
            draw_contours,
            portrait,
            c,
            size=(4.8, 3.9),
        )
        for c in portrait.contours
    ]
    only = "one axis is swept: the curve above is the whole surface"
    only = only if len(portrait.axes) == 1 else ""
    if figures:
        return _note(SURFACE_NOTE) + _panels(figures, portrait)
    return _panels(figures, portrait, none=portrait.unfitted or only)


def _training(page: Page, shown: Shown) -> str:
    """Render the training curves of every width."""
    portrait, curves = shown.portrait, shown.curves
    figures = []
    for width in portrait.widths:
        if ranked := ranked_trials(width, curves):
            least = min(CURVES_SHOWN, len(ranked))
            caption = f"{least} of {len(width.dots)} trials" if least < len(width.dots) else ""
            figures.append(
                page.figure(
                    f"training curves at width {width.width}",
                    draw_training,
                    portrait,
                    width,
                    curves,
                    caption=caption,
                )
            )
    note = _note(TRAINING_NOTE) if figures else ""
    return note + _panels(figures, portrait, none="no training curves are kept")


def _cost(page: Page, shown: Shown) -> str:
    """Render planned and actual cost."""
    finished, cost = shown.finished, shown.finished.cost()
    spent, limit = finished.cost_by_width(), finished.spec.budget.max_over_target
    figure = page.figure(
        "cost planned and spent, in target runs",
        draw_cost,
        shown.portrait,
        spent,
        cost["planned"],
        limit,
        size=(4.8, 1.8),
    )
    rows = [
        [
            width,
            sum(r.trial.width == width for r in finished.results),
            f"{runs:.3g}",
            describe_seconds(sum(r.seconds for r in finished.results if r.trial.width == width)),
        ]
        for width, runs in spent.items()
    ]
    flops = "" if cost["flops"] is None else f", {cost['flops']:.3g} FLOPs"
    total = (
        f"<p>{cost['over_target']:.2f} target runs{flops}; {describe_seconds(cost['seconds'])} of "
        f"training, all workers together. Budget: {limit:g} target runs.</p>"
    )
    by_width = table(["width", "trials", "target runs", "training"], rows)
    return f"{total}{figure}{_folded('by width', by_width)}"


def _scaling(page: Page, shown: Shown) -> str:
    """Render the scaling laws, where `telescope scaling` has an answer."""
    found = shown.scaling
    if found is None:
        return "<p>not asked</p>"
    notes = "".join(f"<li>{text(note)}</li>" for note in found["laws"]["notes"])
    figure = page.figure("loss against compute, and the laws", draw_laws, found, size=(5.4, 3.6))
    return (
        f"<p>{text(_sentence(found['sentence']))}</p>{_note(SCALING_NOTE)}{figure}"
        f'<ul class="todo">{notes}</ul>{_scrolling(ratios_table(found))}'
        f"{_folded('the laws', laws_table(found))}"
    )


def _check(page: Page, shown: Shown) -> str:
    """Render the coordinate check."""
    check = shown.check
    if check is None:
        return f"<p>{text(_sentence(shown.no_check))}</p>"
    kind = "pass" if check.passed else "fail"
    problems = "".join(f"<li>{text(f'{n} {p}')}</li>" for n, p in check.problems.items())
    figures = [
        page.figure(f"coordinate check: {title}", draw_check, check, name)
        for name, title in CHECK_PANELS.items()
        if of_kind(check, name)
    ]
    rows = [
        [name, "–" if slope is None else f"{slope:+.3f}", check.slope_steps[name]]
        for name, slope in check.slopes.items()
    ]
    slopes = table(["quantity", "slope", "after step"], rows)
    return (
        f'<p class="verdict {kind}">{check.verdict}: rule {text(check.rule)}</p>{_note(CHECK_NOTE)}'
        + (f'<ul class="todo">{problems}</ul>' if problems else "")
        + (f"<p>{text(_sentence(check.blind_spot))}</p>" if check.blind_spot else "")
        + _panels(figures, shown.portrait, none="nothing moved")
        + _folded("every slope", slopes)
    )


def _settings(page: Page, shown: Shown) -> str:
    """Render the settings per parameter group, to copy."""
    settings = shown.settings
    if settings is None:
        return f"<p>{text(shown.no_settings)}</p>"
    groups = settings.groups_table() or (
        "<p>No groups: the spec names neither a model file nor shapes; "
        "<code>telescope transfer --shapes FILE</code> gives them.</p>"
    )
    notes = "".join(f"<li>{text(note)}</li>" for note in settings.notes)
    content = json.dumps(settings.as_dict(), indent=2, allow_nan=False)
    return (
        f"<p>Width {settings.width}: {text(settings.point)} (base-width units).</p>"
        f'{_scrolling(groups)}<ul class="todo">{notes}</ul>'
        f"{page.copyable(content, 'Copy as JSON', 'as JSON, with all names and keyword arguments')}"
    )


def _reproduce(page: Page, shown: Shown) -> str:
    """Render command, versions, fingerprint and the spec itself."""
    finished = shown.finished
    record = finished.folder.read_spec()
    versions = record.get("versions", {})
    rows = [
        ["fingerprint", record["fingerprint"]],
        *([name, version] for name, version in versions.items()),
        *([key, value] for key, value in record["comparable_if_equal"].items() if "hash" in key),
    ]
    spec = json.loads(json.dumps(record["spec"]))
    environment = spec.get("trainer", {}).get("environment") or {}
    environment.update(dict.fromkeys(environment, HIDDEN))
    words = "What the results were made with" if versions else "What is known of the results"
    return (
        f"<p>{f'<code>{text(shown.run_command)}</code>' if shown.run_command else OWN_PROGRAM}</p>"
        f"{_scrolling(table([words, ''], rows))}"
        f"{page.copyable(as_toml(spec), 'Copy the spec as TOML', 'the spec, with every default')}"
    )


UNSEEN_NOTE = (
    "telescope does not see what these trainers measure on; the losses compare only if that is the "
    "same."
)
OPTIMUM_NOTE = (
    "Where the fit of everything measured has its optimum, with 90 % intervals; the dashed part is "
    "predicted, the star is the target. A hollow mark was not measured, or is kept because the "
    "loss does not bend along that axis."
)
CHOICES_NOTE = "What each width chose, and what is taken to hold at the target, the star."
EXCESS_NOTE = (
    "What each trial lies above the fit's lowest of its width. The curve is the fit's lower edge, "
    "the star the choice on its 90 % interval; faint trials are off along another axis too, "
    "triangles lie above the figure, crosses diverged. Point at a mark for its trial."
)
UNFITTED_NOTE = (
    "The star is what was chosen; faint trials are off along another axis too, triangles lie above "
    "the figure, crosses diverged. Point at a mark for its trial."
)
SURFACE_NOTE = "Lines of equal excess, with the trials of that width; the star is the choice."
TRAINING_NOTE = "The best trial in full colour, its held-out loss as a dot; dashed ones diverged."
SCALING_NOTE = (
    "Losses of every size and seed, and each optimizer's law. The FLOP ratio is at the loss of "
    "AdamW's law at that size, with its 90 % interval; a star marks a law beyond its sizes."
)
CHECK_NOTE = (
    "Sizes against the width, as a multiple of the base width's: a right model's lines lie flat, "
    "inside the grey wedge. Those that fail and the steepest are named."
)


def _frontier(page: Page, shown: Shown) -> str:
    """Render the comparison of optimizers over batch sizes."""
    found = shown.frontier
    if found is None:
        return "<p>No frontier; `telescope frontier` makes one.</p>"
    figures = [page.figure(title, draw, found, caption=title) for title, draw in PANELS.items()]
    said = [describe_critical(one) for one in found["critical"]]
    said += [describe_trend(one, found["ratios"]) for one in found["trends"]]
    facts = "".join(f"<li>{text(words)}</li>" for words in said)
    names, rows, cells, ratios = named_losses(found)
    tokens = table(
        ["to loss", "batch", *(f"{name} tokens" for name in names), "ratio"],
        [
            [
                f"{loss:g}",
                f"{size:,}",
                *(describe_tokens(cells.get((name, size, loss))) for name in names),
                describe_ratio(ratios.get((size, loss))),
            ]
            for loss, size in rows
        ],
    )
    basis = f"Time on devices: {found['devices']['basis']}."
    return (
        f'<p class="verdict">{text(_sentence(found["sentence"]))}</p>'
        + _panels(figures, shown.portrait)
        + f"<ul>{facts}</ul>{_note(basis)}"
        + _folded("tokens to every loss", tokens)
    )


SECTIONS: dict[str, tuple[str, Callable[[Page, Shown], str]]] = {
    "answer": ("Answer", _answer),
    "optimum": ("Optimum against width", _optimum),
    "excess": ("Excess loss", _excess),
    "surface": ("Fitted surface of the widest width", _surface),
    "training": ("Training", _training),
    "cost": ("Cost", _cost),
    "frontier": ("Optimizers and batch sizes", _frontier),
    "scaling": ("Scaling law", _scaling),
    "check": ("Coordinate check", _check),
    "settings": ("Settings per parameter group", _settings),
    "reproduce": ("Reproduce", _reproduce),
}
"""Id of each part → its title and what makes it, in order."""
