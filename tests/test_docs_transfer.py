"""The training script of docs/transfer.md trains as telescope's own loop does, step for step.

The script is read from the page and given the published sweep's answer. Its readout needs mup's
base shapes, its groups their own learning rates, and its schedule the warm-up: without one of them
the parameters part, which the second test shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from blocks import blocks_of
from conftest import GPT, ROOT, gpt_config, trial_config
from torch import Tensor

import telescope
from telescope.records import Point, Trial
from telescope.train.loop import Setup, set_up, take_step

BASE, WIDTH, STEPS = 32, 64, 20
KEYWORDS = {"vocab_size": 256, "depth": 2, "head_dim": 16, "mlp_ratio": 2}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """The published answer for a width and for a run of 20 steps, as JSON has it."""
    sweep = telescope.open(ROOT / "results" / "reference" / "quickstart")
    data: dict[str, Any] = json.loads(json.dumps(sweep.transfer(WIDTH, STEPS).as_dict()))
    return data


@pytest.fixture
def script(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The page's script as a module, in a folder with transfer.json and gpt.py."""
    (block,) = (b for b in blocks_of("docs/transfer.md") if b.title == "train_target.py")
    (tmp_path / "transfer.json").write_text(json.dumps(settings))
    (tmp_path / "gpt.py").write_text(GPT.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = ModuleType("train_target")
    exec(compile(block.code, block.where, "exec"), module.__dict__)
    yield module
    sys.modules.pop("gpt", None)


def ours(settings: dict[str, Any], corpus: Path) -> Setup:
    """Set up telescope's own trial at the same point."""
    model = gpt_config(**KEYWORDS)
    config = trial_config(corpus, model=model, steps=STEPS, sequence_length=32)
    return set_up(replace(config, base_width=BASE), Trial(WIDTH, Point.of(settings["point"]), 0))


def gap(script: ModuleType, settings: dict[str, Any], corpus: Path) -> float:
    """The largest difference of a parameter, as a share of the distance that it moved."""
    own = ours(settings, corpus)
    model = script.make_model()
    model.load_state_dict(own.model.state_dict())
    start = [p.detach().clone() for p in own.model.parameters()]
    script.train(model, script.make_optimizers(model), data(own), STEPS)
    for step in range(STEPS):
        take_step(own.model, own.optimizers, own.batches, own.train, step, "cpu")
    pairs = zip(start, own.model.parameters(), model.parameters(), strict=True)
    return max(float(((p - q).norm() / (p - before).norm()).item()) for before, p, q in pairs)


def data(own: Setup) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of telescope's own trial."""
    return (own.batches.at(step) for step in range(STEPS))


def test_the_script_trains_as_telescope_does(
    script: ModuleType, settings: dict[str, Any], corpus_file: Path
) -> None:
    assert gap(script, settings, corpus_file) <= 1e-3


@pytest.mark.parametrize("part", ["base shapes", "groups", "schedule"])
def test_without_a_part_of_it_the_parameters_part(
    part: str, script: ModuleType, settings: dict[str, Any], corpus_file: Path
) -> None:
    match part:
        case "base shapes":
            script.BASE_WIDTH = WIDTH  # type: ignore[attr-defined]
        case "groups":
            for group in script.settings["groups"]:
                group["lr"] = settings["lr"]
        case "schedule":
            script.share_of_peak = lambda step: 1.0  # type: ignore[attr-defined]
    assert gap(script, settings, corpus_file) > 0.05


def test_the_script_starts_as_its_groups_say(script: ModuleType, settings: dict[str, Any]) -> None:
    parameters = dict(script.make_model().named_parameters())
    for group in settings["groups"]:
        for name in group["names"]:
            if group["role"] in ("vector", "finite"):
                assert torch.equal(parameters[name], torch.ones_like(parameters[name]))
            else:
                expected = pytest.approx(group["init_std"], rel=0.1)
                assert parameters[name].std().item() == expected, name


def test_the_scripts_own_batches_train(script: ModuleType) -> None:
    model = script.make_model()
    tokens, targets = next(islice(script.batches(), 1))
    assert tokens.shape == targets.shape == (16, 32)
    first = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    last = script.train(model, script.make_optimizers(model), script.batches(), STEPS)
    assert last < first.item() - 0.5
