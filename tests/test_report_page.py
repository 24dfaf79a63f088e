"""The report of sweeps of every kind: well-formed, whole, and nothing but what the sweep says."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bowls import bowl_spec
from commands import telescope
from conftest import ROOT, quiet

from telescope import Spec, Trial
from telescope import open as telescope_open
from telescope.answer.finished import Finished, open_result
from telescope.check.verdict import CoordCheck, Kind, Quantity
from telescope.errors import RefusedError, SpecError
from telescope.ladder.ladder import Ladder
from telescope.records import Axis, CurvePoint, LadderSpec, Point, Result, Status
from telescope.report.figures import as_svg, draw_excess
from telescope.report.page import ASKED_FOR, HIDDEN, SECTIONS
from telescope.report.svg import inline
from telescope.report.verdict import describe_certificate
from telescope.store.folder import Folder
from telescope.sweep.comparing import differences
from telescope.sweep.reporting import page_of, write_report
from telescope.sweep.run import Options, recorded, run

QUICKSTART = ROOT / "results" / "reference" / "quickstart"
LR = {"low": 0.01, "high": 1.0, "points": 7}
DECAY = {"low": 0.01, "high": 1.0, "points": 5}
VOID = {"meta", "br", "link", "input", "img", "hr"}

Loss = Callable[[Trial], float | None]


def bowl(trial: Trial) -> float:
    """Lowest at lr 0.1 and weight decay 0.1, 2 at every width, with a noise of 0.05 %."""
    off = math.log2(trial.lr / 0.1)
    decay = math.log2(trial.point.get("weight_decay", 0.1) / 0.1)
    return 2 + off**2 / 40 + decay**2 / 150 + math.sin(1e4 * (off + decay + trial.width)) / 1000


def swept(results: Path, loss: Loss = bowl, *, stop: int | None = None, **tables: Any) -> Finished:
    """A sweep that the test itself trains, up to so many trials."""
    spec: dict[str, Any] = {
        "name": "made",
        "ladder": {"widths": [16, 32]},
        "target": {"width": 64},
        "axes": {"lr": LR},
        "optimizer": {"rule": "mup"},
        "cost": {"parameters": {"16": 256, "32": 1024, "64": 4096}},
        "budget": {"max_over_target": 20.0},
        **tables,
    }
    told = 0
    with recorded(Spec.from_dict(spec), results) as recorder:
        while trials := recorder.ask():
            for trial in trials:
                if told == stop:
                    return open_result(recorder.folder.path, results)
                told += 1
                recorder.tell(ended(trial, loss(trial)))
    return open_result(recorder.folder.path, results)


def ended(trial: Trial, loss: float | None) -> Result:
    status = Status.DIVERGED if loss is None else Status.COMPLETE
    curve = tuple(CurvePoint(step, (loss or 4) + 3 / step, None) for step in (1, 10, 20, 40))
    return Result(trial, status, loss=loss, reason="" if loss else "loss nan", curve=curve)


class Page(html.parser.HTMLParser):
    """Reads a page as strictly as a browser is lenient."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.figures: list[str] = []
        self.sections: dict[str, str] = {}
        self.copies: dict[str, str] = {}
        self.buttons: list[str] = []
        self._copy = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "pre":
            self._copy = ""

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        if name := attributes.get("id"):
            self.ids.append(name)
        if link := attributes.get("href"):
            self.links.append(link)
        self.links += [f"#{n}" for n in re.findall(r"url\(#(.*?)\)", str(attributes))]
        if tag == "svg":
            self.figures.append(attributes["aria-label"] or "")
            assert attributes["role"] == "img"
        if tag == "section":
            self.sections[attributes["id"] or ""] = ""
        if tag == "pre":
            self._copy = attributes["id"] or ""
            self.copies[self._copy] = ""
        if tag == "button":
            self.buttons.append(attributes["data-copy"] or "")

    def handle_data(self, data: str) -> None:
        if self._copy:
            self.copies[self._copy] += data
        if "section" in self.open:
            self.sections[list(self.sections)[-1]] += data


def read(page: str) -> Page:
    """A page that is whole, asks for nothing, and whose links lead somewhere."""
    found = Page(page)
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert all(link.startswith("#") for link in found.links)
    assert not re.search(r"https?:|//www|@import|<link|<iframe", page)
    assert "nan" not in {word for text in found.sections.values() for word in text.split()}
    asked = [name for name in SECTIONS if name not in ASKED_FOR]
    assert [name for name in found.sections if name != "comparison"] == asked
    assert set(found.buttons) == set(found.copies)
    return found


@pytest.fixture(scope="module")
def quickstart() -> Finished:
    return open_result(QUICKSTART, ROOT / "results")


@pytest.fixture(scope="module")
def page(quickstart: Finished) -> str:
    return page_of([quickstart])


def test_the_quickstarts_report_says_what_show_says(quickstart: Finished, page: str) -> None:
    found = read(page)
    assert len(page) < 400_000
    answer, certificate = quickstart.target_point(), quickstart.certificate
    assert answer is not None
    assert certificate is not None
    said = found.sections["answer"]
    for value in answer.values():
        assert f"{value:.4g}" in said
    for interval in certificate.intervals.values():
        assert interval is None or f"90 %: {interval[0]:.3g} to {interval[1]:.3g}" in said
    assert f"{100 * certificate.predicted_excess_loss:.2f}\u00a0%" in said
    verdict = describe_certificate(certificate, quickstart.spec.ladder.tolerance)
    assert verdict.partition(":")[0] in said
    for axis in quickstart.ladder.spec.swept:
        label = {"lr": "learning rate", "weight_decay": "weight decay"}[axis.name]
        assert f"optimum of {label} against width, with the target" in found.figures
        for choice in quickstart.ladder.choices:
            assert f"excess loss against {label} at width {choice.width}" in found.figures
    for choice in quickstart.ladder.choices:
        assert f"training curves at width {choice.width}" in found.figures
    kinds = ("contours of the fitted", "cost planned", "coordinate check: updates")
    for kind in kinds:
        assert any(label.startswith(kind) for label in found.figures)
    for result in quickstart.results:
        assert f"{result.trial.point}, seed {result.trial.seed}: loss {result.loss:.4f}" in page
    record = quickstart.folder.read_spec()
    assert record["fingerprint"] in found.sections["reproduce"]
    assert record["versions"]["torch"] in found.sections["reproduce"]
    assert "telescope run quickstart" in found.sections["reproduce"]


def test_what_is_copied_is_the_transfer_and_the_spec(quickstart: Finished, page: str) -> None:
    settings, spec = read(page).copies.values()
    handed = telescope_open(QUICKSTART).transfer()
    assert json.loads(settings) == json.loads(json.dumps(handed.as_dict()))
    assert settings == json.dumps(handed.as_dict(), indent=2)
    assert tomllib.loads(spec) == quickstart.folder.read_spec()["spec"]


def flat(trial: Trial) -> float:
    return 2.0 + math.log2(trial.lr / 0.1) ** 2 / 40


FIGURES = ("optimum", "excess", "contours", "training", "cost")
KINDS: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    # what is swept → figures of each kind, and words of the answer
    "nothing": (
        {"stop": 0},
        {"optimum": 0, "excess": 0, "training": 0},
        "None yet: no stage",
    ),
    "two trials": (
        {"stop": 2},
        {"optimum": 0, "excess": 1, "contours": 0},
        "None yet: no stage",
    ),
    "unfinished": (
        {"stop": 11},
        {"optimum": 1, "contours": 0},
        "From width 16 alone so far: ",
    ),
    "all diverged": ({"loss": lambda _: None}, {"optimum": 0, "excess": 1}, "None: stuck"),
    "some diverged": (
        {"loss": lambda t: bowl(t) if t.lr < 0.25 else None},
        {"optimum": 1},
        "90 %: ",
    ),
    "one width": ({"ladder": {"widths": [16]}}, {"optimum": 1, "excess": 1}, "only one width"),
    "paper": (
        {"ladder": {"widths": [16, 32], "policy": "paper"}},
        {"optimum": 1, "excess": 2},
        "Not proven: policy paper gives no interval",
    ),
    "one fixed axis, losses below 0": (
        {"axes": {"lr": LR, "weight_decay": {"value": 0.25}}, "loss": lambda t: bowl(t) - 9},
        {"optimum": 1, "contours": 0},
        "fixed by the spec, not tuned",
    ),
    "losses about 0": ({"loss": lambda t: bowl(t) - 2}, {"optimum": 1}, "90 %: "),
}


def number_of(found: Page) -> dict[str, int]:
    return {kind: sum(label.startswith(kind) for label in found.figures) for kind in FIGURES}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_of_any_kind_has_its_report(kind: str, tmp_path: Path) -> None:
    keywords, numbers, words = KINDS[kind]
    found = read(page_of([swept(tmp_path, **keywords)]))
    assert number_of(found) | numbers == number_of(found)
    assert words in found.sections["answer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "axes", "numbers", "words"),
    [
        (bowl, {"weight_decay": DECAY}, {"optimum": 2, "contours": 1}, "90 %: "),
        (flat, {"weight_decay": DECAY}, {"optimum": 2, "contours": 1}, "not identified: it keeps"),
        (
            bowl,
            {"weight_decay": DECAY, "warmup": {"low": 0.01, "high": 0.5, "points": 5}},
            {"optimum": 3, "contours": 3},
            "not identified: it keeps",
        ),
    ],
    ids=["two axes", "an unidentified one", "three axes"],
)
def test_several_axes(
    loss: Loss, axes: dict[str, Any], numbers: dict[str, int], words: str, tmp_path: Path
) -> None:
    found = read(page_of([swept(tmp_path, loss, axes={"lr": LR, **axes})]))
    assert number_of(found) | numbers == number_of(found)
    assert words in found.sections["answer"]


def test_a_foreign_sweep_has_its_report_without_its_secrets(tmp_path: Path) -> None:
    secret = "hunter2"
    trainer = {"environment": {"API_KEY": secret}}
    spec = Spec.from_dict(bowl_spec(tmp_path, trainer=trainer, ladder={"policy": "paper"}))
    folder = run(spec, Options(tmp_path / "results", dispatcher="inline"), quiet).folder
    page = page_of([open_result(folder.path, folder.path.parent)])
    found = read(page)
    assert secret not in page
    assert HIDDEN in page
    assert "no model to check" in found.sections["check"]
    assert f"telescope run bowl.toml --results {folder.path.parent}" in found.sections["reproduce"]


HOSTILE = '</script><b onload="x">&'


def test_words_from_elsewhere_are_no_markup(tmp_path: Path) -> None:
    made = swept(tmp_path, stop=2, ladder=PAPER)
    record = made.folder.read_spec()
    record["versions"] = {HOSTILE: HOSTILE}
    (made.folder.path / "spec.json").write_text(json.dumps(record))
    page = page_of([open_result(made.folder.path, tmp_path)])
    assert "<b onload" not in page
    assert HOSTILE in read(page).sections["reproduce"]


PAPER = {"widths": [16, 32], "policy": "paper"}
"""Of a sweep of which the ladder does not matter: nothing is fitted to plan it."""


def with_data(results: Path, name: str, **comparable: Any) -> Path:
    """A sweep of a few trials whose folder says that it was trained in such a way."""
    folder = swept(results, name=name, stop=3, ladder=PAPER).folder.path
    record = json.loads((folder / "spec.json").read_text())
    record["comparable_if_equal"] |= comparable
    (folder / "spec.json").write_text(json.dumps(record))
    return folder


def test_sweeps_on_the_same_data_stand_side_by_side(tmp_path: Path) -> None:
    same = {"data (hash)": "abc"}
    with_data(tmp_path, "one", **same, **{"train.steps": 50})
    with_data(tmp_path, "two", **same, **{"train.steps": 70})
    out = write_report(["one", "two"], tmp_path, tmp_path / "both.html")
    found = read(out.read_text())
    assert number_of(found)["excess"] == 2
    for word in ("one", "two", "train.steps", "50", "70"):
        assert word in found.sections["comparison"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"data (hash)": "a"}, {"data (hash)": "b"}, r"data \(hash\) is a and b"),
        (
            {"data (hash)": "a", "data.tokenizer (hash)": "x"},
            {"data (hash)": "a", "data.tokenizer (hash)": "y"},
            r"data.tokenizer \(hash\) is x and y",
        ),
        ({"data (hash)": "a"}, {}, r"data \(hash\) is a and None"),
        ({"trainer.script (hash)": "a"}, {"trainer.script (hash)": "b"}, "does not see what"),
    ],
    ids=["data", "tokenizer", "unknown", "trainers"],
)
def test_losses_that_cannot_be_compared_are_refused(
    first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    records = {
        name: {"comparable_if_equal": {"ladder.widths[0]": 16, **keys}}
        for name, keys in (("one", first), ("two", second))
    }
    with pytest.raises(RefusedError, match=f"^one and two: .*{message}") as caught:
        differences(records)
    assert "\n" not in str(caught.value)


def test_a_refused_comparison_writes_nothing(tmp_path: Path) -> None:
    with_data(tmp_path, "one", **{"data (hash)": "a"})
    with_data(tmp_path, "two", **{"data (hash)": "b"})
    done = telescope("report", "one", "two", "--results", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("telescope: one and two: their losses cannot be compared")
    assert not list(tmp_path.rglob("report.html"))


def test_the_verb_writes_beside_the_results_and_says_what_is_wrong(tmp_path: Path) -> None:
    folder = swept(tmp_path / "results", stop=2, ladder=PAPER).folder.path
    done = telescope("report", "made", cwd=tmp_path)
    assert re.fullmatch(r"wrote results/made/report.html \(\d+ kB\)\n", done.stdout), done
    assert (folder / "report.html").stat().st_size > 10_000
    for arguments, message in (
        (["nothing"], "nothing: no sweep of that name"),
        (["made", "--out", "results"], "--out results: cannot be written"),
        (["made", "--out", "no/such/place.html"], "No such file"),
    ):
        done = telescope("report", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_check_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    made = swept(tmp_path, stop=2, ladder=PAPER)
    print_of = made.folder.read_spec()["fingerprint"]
    for record, words in (
        ({"verdict": "PASS", "fingerprint": print_of}, "cannot be read"),
        ({"verdict": "PASS", "fingerprint": "other"}, "of other training"),
        ({"verdict": None, "fingerprint": print_of, "reason": "--no-check"}, "--no-check"),
    ):
        made.folder.write_check(record)
        assert words in read(page_of([made])).sections["check"]


def test_a_kept_check_is_the_check() -> None:
    record = json.loads((QUICKSTART / "coordcheck.json").read_text())
    check = CoordCheck.from_dict(record)
    found = check.as_dict()
    assert {key: found[key] for key in record.keys() & found.keys()} == {
        key: record[key] for key in record.keys() & found.keys()
    }
    assert CoordCheck.from_dict(json.loads(json.dumps(found))) == check


def test_a_check_of_before_kinds_were_written_has_them_all_the_same() -> None:
    record = json.loads((QUICKSTART / "coordcheck.json").read_text())
    old = CoordCheck.from_dict(
        {k: v for k, v in record.items() if k not in ("kinds", "may_shrink")}
    )
    names = {
        Quantity("hidden", Kind.UPDATE),
        Quantity("blocks.0", Kind.ADDED),
        Quantity("blocks.1.attention", Kind.CHANGE, is_softmax=True),
        Quantity("blocks.1.attention", is_softmax=True),
        Quantity(""),
    }
    for quantity in names:
        assert old.kinds[quantity.name] is quantity.kind, quantity
        assert (quantity.name in old.may_shrink) is quantity.may_shrink, quantity


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.create()
    trial = Trial(16, Point.of(lr=0.1), 0)
    curve = (CurvePoint(1, 3.5, None), CurvePoint(2, None, 2.25))
    folder.write_curve(Result(trial, Status.COMPLETE, loss=2.25, curve=curve))
    assert folder.read_curve(trial) == curve
    (path,) = (tmp_path / "curves").iterdir()
    for damaged in ("step,train_loss\n1,2", "", "step,train_loss,held_out_loss\nx,1,2\n", "\0"):
        path.write_text(damaged)
        assert folder.read_curve(trial) == ()


# The data of the figures


def told(spec: LadderSpec, loss: Loss) -> Ladder:
    ladder = Ladder(spec)
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(ended(trial, loss(trial)))
    return ladder


BOWL = LadderSpec((Axis("lr", 0.01, 1.0, 7),), (16, 32), target_width=64)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return told(BOWL, flat)


def test_a_portrait_has_the_certificates_answer(ladder: Ladder) -> None:
    (track,), certificate = ladder.portrait().tracks, ladder.certificate()
    assert certificate is not None
    target = track.spots[-1]
    assert (target.width, target.is_measured) == (64, False)
    assert target.value == certificate.point.lr
    assert target.interval == certificate.intervals["lr"]
    assert [spot.width for spot in track.spots] == [16, 32, 64]


def test_the_fitted_excess_is_that_of_the_bowl(ladder: Ladder) -> None:
    """Near the optimum, 2 + x²/40 lies 100 · x²/80 % above its lowest."""
    portrait = ladder.portrait()
    assert portrait.is_share
    for width in portrait.widths:
        assert width.lowest == pytest.approx(2, abs=1e-3)
        curve = width.curves["lr"]
        assert min(curve.excess) == pytest.approx(0, abs=0.01)
        for value, excess in zip(curve.values, curve.excess, strict=True):
            if abs(math.log2(value / 0.1)) < 1:
                true = 100 * math.log2(value / 0.1) ** 2 / 80
                assert excess == pytest.approx(true, abs=0.1)
        for dot in width.dots:
            assert dot.loss is not None
            assert dot.excess == pytest.approx(100 * (dot.loss / width.lowest - 1))


def test_the_ceiling_shows_the_bottom_and_never_one_bad_point() -> None:
    ladder = told(BOWL, lambda t: 25.0 if t.lr > 0.3 else flat(t))
    ceiling = ladder.portrait().ceilings["lr"]
    step = math.log2(100) / 6
    assert 100 * step**2 / 80 < ceiling < 5 * 100 * step**2 / 80


def test_what_lies_beyond_a_divergence_is_not_drawn() -> None:
    ladder = told(BOWL, lambda t: None if t.lr > 0.15 else flat(t))
    portrait = ladder.portrait()
    walls = [d.point.lr for w in portrait.widths for d in w.dots if d.status is Status.DIVERGED]
    assert walls
    for width in portrait.widths:
        assert max(width.curves["lr"].values, default=0.0) < min(walls)


def test_contours_are_the_fit_at_the_widest_width() -> None:
    axes = (Axis("lr", 0.01, 1.0, 5), Axis("weight_decay", 0.01, 1.0, 3))
    ladder = told(LadderSpec(axes, (16,), target_width=32, tolerance=0.05), bowl)
    portrait = ladder.portrait()
    (contours,) = portrait.contours
    excess = np.array(contours.excess)
    row, column = np.unravel_index(np.argmin(excess), excess.shape)
    lowest = contours.across_values[column], contours.up_values[row]
    (width,) = portrait.widths
    at = portrait.tracks[0].spots[0].value, portrait.tracks[1].spots[0].value
    for found, best in zip(lowest, at, strict=True):
        assert abs(math.log2(found / best)) < 0.5
    # A slice at the answer's own value of the other axis lies on or above the lower edge.
    edge = np.interp(
        np.log(contours.across_values),
        np.log(width.curves["lr"].values),
        width.curves["lr"].excess,
    )
    assert (excess.min(axis=0) >= edge - 0.02 * (1 + edge)).all()


def test_a_figure_has_a_title_per_point_and_the_pages_colours(ladder: Ladder) -> None:
    portrait = ladder.portrait()
    width = portrait.widths[0]
    figure = ET.fromstring(inline(as_svg(draw_excess, portrait, "lr", [width]), "f7", "a label"))
    titles = [element.text for element in figure.iter("title")]
    for dot in width.dots:
        assert any(str(dot) in (title or "") for title in titles)
    assert len(titles) == len(width.dots) + 1  # the choice
    paints = re.findall(r"#[0-9a-f]{6}", ET.tostring(figure, encoding="unicode"))
    assert set(paints) <= {"#ffffff", "#000000"}
    assert all(name.startswith("f7-") for e in figure.iter() if (name := e.get("id")))


# A real browser


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: nothing was opened in a browser")
def test_a_browser_draws_it_and_complains_of_nothing(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    page = write_report([QUICKSTART], ROOT / "results", tmp_path / "report.html")
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    base.append(f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(
        [*base, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == page.read_text().count("<svg")
    # The script has run: it alone takes `hidden` off a button.
    assert re.findall(r"<button[^>]*hidden", done.stdout) == []
    pdf = tmp_path / "report.pdf"
    subprocess.run([*base, f"--print-to-pdf={pdf}", page.as_uri()], check=True, timeout=120)
    assert pdf.read_bytes().startswith(b"%PDF")


def test_no_sweep_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nowhere: no sweep of that name"):
        write_report(["nowhere"], tmp_path, None)
