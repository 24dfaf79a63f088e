"""Fixtures for several test files: a corpus of a few kilobytes, and a sweep of seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings
from rich.console import Console

# Before numpy is imported, and for what the tests start: the ladder solves systems of a few dozen
# rows, for which a second thread of OpenBLAS costs three times the CPU time of one, and no less
# wall time.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# The install compiles nothing, so that otherwise each process that a test starts would compile
# what it imports of torch, ray and transformers: 8 CPU seconds, over and over.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch

from telescope.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrialConfig,
)
from telescope.data.corpus import load_corpus
from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import Done
from telescope.dispatch.queue import Order, Trainer
from telescope.errors import SpecError, TelescopeError
from telescope.records import Result, Trial
from telescope.report.live import Screen, make_screen

ROOT = Path(__file__).parent.parent
GPT = ROOT / "models" / "gpt.py"

sys.dont_write_bytecode = False
torch.set_num_threads(1)
# The same examples everywhere: a red run is a change's fault.
settings.register_profile("telescope", derandomize=True, database=None)
settings.load_profile("telescope")


LONGER = {"slow": 7200, "ray": 900}
"""Mark → seconds that a test of it may take: they wait for processes, by the hundred if slow."""


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a pytest whose tests xdist cannot group: it writes the group into `_nodeid`."""
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError(
            f"pytest-xdist groups no tests under pytest {pytest.__version__}, so that all would "
            "start their own Ray at once; install the versions of constraints.txt"
        )


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give those tests more time that need it and do not say so themselves.

    Tests that share what a module's fixture has made run in one worker: else each makes it.
    """
    for item in items:
        if not item.get_closest_marker("xdist_group") and shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        limits = [seconds for mark, seconds in LONGER.items() if item.get_closest_marker(mark)]
        if limits and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(max(limits)))


def shares_a_fixture(item: pytest.Item) -> bool:
    """Tell whether a test uses a fixture of its module's scope."""
    fixtures: Any = getattr(item, "_fixtureinfo", None)
    return fixtures is not None and any(
        fixture.scope == "module"
        for name in fixtures.names_closure
        for fixture in fixtures.name2fixturedefs.get(name, ())
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests have measured: the figures that the docs state."""
    for report in terminalreporter.getreports("passed"):
        for name, figures in report.user_properties:
            terminalreporter.write_line(f"{name}: {figures}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave nothing in the user's cache folder; Ray's workers inherit the variable.

    xdist's workers have one together, as processes of one user have: what a model costs is counted
    once.
    """
    place = tmp_path_factory.getbasetemp()
    cache = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "cache"
    cache.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TELESCOPE_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kilobytes of text that a model can learn something from."""
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


def attempt(trainer: Trainer, trial: Trial, *, timeout: float = 0.0) -> Result:
    """Train one trial as a worker does."""
    done = Packer(lambda: trainer, timeout=timeout)(Order((trial,)))
    assert isinstance(done, Done)
    (result,) = done.results
    return result


def tiny_spec(corpus: Path, **tables: Any) -> dict[str, Any]:
    """A sweep that trains in seconds: two widths, 3 × 2 points, a few steps."""
    spec: dict[str, Any] = {
        "name": "tiny",
        "ladder": {"widths": [16, 32], "policy": "paper"},
        "target": {"width": 64},
        "axes": {
            "lr": {"low": 0.01, "high": 0.16, "points": 3},
            "weight_decay": {"low": 0.05, "high": 0.2, "points": 2},
        },
        "model": {"file": str(GPT), "depth": 1, "head_dim": 8},
        "train": {"steps": 4, "batch_size": 4, "sequence_length": 16},
        "data": {"source": str(corpus), "eval_tokens": 64},
        "budget": {"max_over_target": 20.0},
    }
    for name, table in tables.items():
        merges = isinstance(table, dict) and isinstance(spec.get(name), dict)
        spec[name] = {**spec[name], **table} if merges else table
    return spec


def as_toml(table: dict[str, Any], prefix: str = "") -> str:
    """Nested dicts as TOML; Python's and TOML's literals agree on what specs hold."""
    lines = [f"{key} = {value!r}" for key, value in table.items() if not isinstance(value, dict)]
    text = "\n".join(lines).replace("True", "true").replace("False", "false") + "\n"
    for key, value in table.items():
        if isinstance(value, dict):
            text += f"\n[{prefix}{key}]\n" + as_toml(value, f"{prefix}{key}.")
    return text


def gpt_config(**kwargs: Any) -> ModelConfig:
    """The bundled model, small, unless `kwargs` say otherwise."""
    defaults = {"vocab_size": 256, "depth": 1, "head_dim": 8}
    return ModelConfig(name="gpt.py", text=GPT.read_text(), kwargs={**defaults, **kwargs})


def with_dropout() -> ModelConfig:
    """The bundled model with dropout, so that the random state matters."""
    before = "return x_BTD + self.mlp(self.mlp_norm(x_BTD))"
    drops = "nn.functional.dropout(self.mlp(self.mlp_norm(x_BTD)), 0.2, self.training)"
    text = GPT.read_text().replace(before, f"return x_BTD + {drops}")
    assert drops in text
    kwargs = {"vocab_size": 256, "depth": 1, "head_dim": 8}
    return ModelConfig(name="dropout.py", text=text, kwargs=kwargs)


def trial_config(
    corpus: Path,
    *,
    model: ModelConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    **train: Any,
) -> TrialConfig:
    """One trial's configuration at base width 16."""
    data = DataConfig(source=(str(corpus),), eval_tokens=64)
    settings = {"steps": 6, "batch_size": 4, "sequence_length": 16, **train}
    return TrialConfig(
        model=model or gpt_config(),
        optimizer=optimizer or OptimizerConfig(),
        train=TrainConfig(**settings),
        data=data,
        base_width=16,
        corpus_digest=load_corpus(data).digest,
    )


def one_line(error: TelescopeError) -> None:
    """Fail unless an error says something, in one line; of a spec, in a line for each fault."""
    for line in error.faults if isinstance(error, SpecError) else (str(error),):
        assert line
        assert "\n" not in line


def left_over(mark: str, patience: float = 0.0) -> list[psutil.Process]:
    """The processes that inherited TELESCOPE_TEST_MARK, after some seconds to end in."""

    def is_marked(process: psutil.Process) -> bool:
        try:
            return process.environ().get("TELESCOPE_TEST_MARK") == mark
        except psutil.Error:
            return False

    found = list(filter(is_marked, psutil.process_iter()))
    return psutil.wait_procs(found, timeout=patience)[1]


def wide_block(tmp_path: Path) -> str:
    """The bundled model with a block that grows with the width."""
    before = "return x_BTD + self.mlp(self.mlp_norm(x_BTD))"
    text = GPT.read_text().replace(before, before.replace("+ self", "+ x_BTD.shape[-1] * self"))
    assert text != GPT.read_text()
    (tmp_path / "wide.py").write_text(text)
    return str(tmp_path / "wide.py")


def quiet() -> Screen:
    """A screen that shows nothing."""
    return make_screen(Console(quiet=True))
