"""torch.compile: once per width, whatever the point, as a backend counts its calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_spec, trial_config

from telescope.errors import SpecError
from telescope.records import Point, Trial
from telescope.spec.spec import Spec
from telescope.sweep.machine import check_compiler
from telescope.train.loop import compiled_token_loss, set_up, train


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry per compilation; the graph then runs as it is, so no compiler is needed."""
    calls: list[str] = []

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        calls.append("compiled")
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    torch.compiler.reset()
    compiled_token_loss.cache_clear()
    yield calls
    torch.compiler.reset()
    compiled_token_loss.cache_clear()


POINTS = [
    Point.of(lr=0.05, weight_decay=0.1),
    Point.of(lr=0.01, weight_decay=0.0, warmup=0.5),
    Point.of(lr=0.02, weight_decay=1.0, adamw_lr_ratio=0.5, init_scale=2.0),
]


def test_a_width_is_compiled_once(corpus_file: Path, compilations: list[str]) -> None:
    config = trial_config(corpus_file, compile=True, evals=2)
    for seed, point in enumerate(POINTS):
        train(config, Trial(16, point, seed))
    assert len(compilations) == 1
    for width in (32, 16, 32):
        train(config, Trial(width, POINTS[0], 0))
    assert len(compilations) == 2


def test_compiled_gives_the_same_training(corpus_file: Path, compilations: list[str]) -> None:
    trial = Trial(16, POINTS[0], 0)
    compiled = train(trial_config(corpus_file, compile=True), trial)
    assert compilations
    assert compiled.loss == pytest.approx(train(trial_config(corpus_file), trial).loss, rel=1e-5)


def test_more_widths_than_torch_keeps_by_itself(corpus_file: Path, compilations: list[str]) -> None:
    config, widths = trial_config(corpus_file, compile=True), range(8, 88, 8)
    for width in [*widths, *widths]:
        setup = set_up(config, Trial(width, POINTS[0], 0))
        compiled_token_loss()(setup.model, *setup.batches.at(0), "fp32")
    assert len(compilations) == len(widths) == 10


def test_no_compiler_is_said_before_the_sweep(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=failing))
    check_compiler(Spec.from_dict(tiny_spec(corpus_file)))
    with pytest.raises(SpecError, match=r"^train\.compile: got true.*install a C\+\+ compiler"):
        check_compiler(Spec.from_dict(tiny_spec(corpus_file, train={"compile": True})))
