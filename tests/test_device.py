"""The device "auto" stands for is what torch says, also where torch is not asked."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from telescope.train import device
from telescope.train.device import is_built_for_cpu_alone, resolve_device

NO_ACCELERATOR = "cuda = None\nhip = None\nxpu = None\n"


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], bool]]:
    """Judges a torch by the text of its `version.py`."""
    monkeypatch.setattr(device, "entry_points", lambda group: ())
    file = tmp_path / "torch" / "version.py"
    spec = ModuleSpec("torch", None, origin=str(file.with_name("__init__.py")))
    monkeypatch.setattr(device, "find_spec", lambda name: spec)

    def judge(text: str) -> bool:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        is_built_for_cpu_alone.cache_clear()
        return is_built_for_cpu_alone()

    yield judge
    is_built_for_cpu_alone.cache_clear()


def test_a_build_says_that_it_has_no_accelerator(built: Callable[[str], bool]) -> None:
    assert built(NO_ACCELERATOR)
    assert built(f"from typing import Optional\n{NO_ACCELERATOR}cuda: Optional[str] = None\n")


@pytest.mark.parametrize(
    "text",
    [
        NO_ACCELERATOR.replace("cuda = None", "cuda = '13.0'"),
        NO_ACCELERATOR.replace("hip = None", "hip = '7.1'"),
        NO_ACCELERATOR.replace("xpu = None", "xpu: str | None = '20250300'"),
        NO_ACCELERATOR + "if True:\n    cuda = '13.0'\n",
        "cuda = None\nhip = None\n",  # an older one, which does not name all
        "",
        "raise ImportError\n",
        "cuda = (\n",
    ],
)
def test_any_doubt_is_torchs_to_settle(built: Callable[[str], bool], text: str) -> None:
    assert not built(text)


def test_what_is_no_whole_torch_leaves_doubt(
    built: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for spec in (None, ModuleSpec("torch", None), ModuleSpec("torch", None, origin="built-in")):
        monkeypatch.setattr(device, "find_spec", lambda name, spec=spec: spec)
        is_built_for_cpu_alone.cache_clear()
        assert not is_built_for_cpu_alone(), spec


def test_another_system_or_an_extension_leaves_doubt(
    built: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")  # whose torch names no build for its GPU
        assert not built(NO_ACCELERATOR)
    extension = importlib.metadata.EntryPoint("npu", "torch_npu:_autoload", "torch.backends")
    with monkeypatch.context() as patch:
        patch.setattr(device, "entry_points", lambda group: [extension])
        assert not built(NO_ACCELERATOR)
    assert built(NO_ACCELERATOR)


def test_auto_is_the_same_with_and_without_torch() -> None:
    code = "from telescope.train.device import resolve_device; print(resolve_device('auto'))"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    has_one = torch.accelerator.is_available()
    known = str(torch.accelerator.current_accelerator()) if has_one else "cpu"
    assert (fresh.stdout.strip(), resolve_device("auto")) == (known, known)
    if is_built_for_cpu_alone():
        assert torch.accelerator.current_accelerator() is None
    if torch.version.cuda:
        assert not is_built_for_cpu_alone()


def test_a_torch_that_is_loaded_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cpu") == "cpu"
