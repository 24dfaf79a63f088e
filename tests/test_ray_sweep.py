"""A real sweep on local Ray gives bit for bit what it gives inline, on workers that stay warm."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from conftest import tiny_spec, wide_block
from rich.console import Console

from telescope import Spec
from telescope.answer.finished import open_result
from telescope.dispatch.ray.session import marked
from telescope.errors import RefusedError
from telescope.report.live import make_screen
from telescope.sweep.run import Options, run

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


def test_ray_and_inline_agree(tmp_path: Path, corpus_file: Path) -> None:
    spec = Spec.from_dict(tiny_spec(corpus_file))
    tables, curves = [], []
    for dispatcher in ("ray", "inline"):
        # With a check, our own Ray and its workers start while it is made.
        is_checked = dispatcher == "ray"
        options = Options(tmp_path / dispatcher, workers=2, dispatcher=dispatcher, check=is_checked)
        ran = run(spec, options, lambda: make_screen(Console(quiet=True)))
        folder = ran.folder
        assert ran.ladder.is_finished
        tables.append(pd.read_csv(folder.path / "trials.csv").drop(columns="seconds"))
        curves.append({p.name: p.read_text() for p in (folder.path / "curves").iterdir()})
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert curves[0] == curves[1]
    by_width: dict[int, set[str]] = {}
    for result in open_result("tiny", tmp_path / "ray").results:
        by_width.setdefault(result.trial.width, set()).add(result.worker)
    assert len(by_width[16]) == 2
    assert by_width[32] <= by_width[16]


def test_a_wrong_model_is_refused_while_ray_starts(tmp_path: Path, corpus_file: Path) -> None:
    """As it is without Ray: in the same words, with nothing trained and nothing left."""
    wrong = {"ladder": {"widths": [16]}, "model": {"file": wide_block(tmp_path)}}
    spec = Spec.from_dict(tiny_spec(corpus_file, **wrong))
    said = []
    for dispatcher in ("ray", "inline"):
        results = tmp_path / dispatcher
        results.mkdir()
        with pytest.raises(RefusedError, match=r"coordinate check FAIL: .*grows") as refused:
            run(
                spec,
                Options(results, workers=2, dispatcher=dispatcher),
                lambda: make_screen(Console(quiet=True)),
            )
        said.append(str(refused.value))
        assert list(results.iterdir()) == []
        assert marked(str((results / "tiny").resolve())) == []
    assert said[0] == said[1]
