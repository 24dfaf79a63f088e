"""A process whose CUDA context is dead trains nothing more: CUDA is played by a fake of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import attempt

from telescope.dispatch.device import check_device
from telescope.dispatch.inline import run_inline
from telescope.dispatch.packs import Packs
from telescope.errors import LostError
from telescope.records import Point, Result, Status, Trial, TrialSource

TRIALS = [Trial(32, Point.of(lr=0.01 * (n + 1)), 0) for n in range(4)]
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two cards of which this process uses the second; "error" is what every call on it raises."""
    state: dict[str, Any] = {"error": None, "asked": []}
    zeros = torch.zeros

    def fake_zeros(*shape: int, device: str | None = None, **options: Any) -> torch.Tensor:
        if not str(device).startswith("cuda"):
            return zeros(*shape, device=device, **options)
        state["asked"].append(device)
        if state["error"]:
            raise state["error"]
        return zeros(*shape)

    monkeypatch.setattr(torch, "zeros", fake_zeros)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: device * 100)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return state


def dies(card: dict[str, Any]) -> Callable[[Trial], Result]:
    """A trainer whose second trial kills the context; each later one fails at once."""

    def train(trial: Trial) -> Result:
        if trial == TRIALS[1]:
            card["error"] = torch.AcceleratorError(ILLEGAL)
        if card["error"]:
            raise card["error"]
        return Result(trial, Status.COMPLETE, loss=1.0)

    return train


class Source(TrialSource):
    def __init__(self) -> None:
        self.told: list[Result] = []

    def ask(self) -> Sequence[Trial]:
        return [t for t in TRIALS if t not in {result.trial for result in self.told}]

    def tell(self, *results: Result) -> None:
        self.told += results


def test_inline_the_sweep_ends_and_no_failure_is_stored(card: dict[str, Any]) -> None:
    source = Source()
    with pytest.raises(LostError, match=r"^cuda:1: .*illegal memory access.*same command") as error:
        run_inline(source, dies(card))
    assert "\n" not in str(error.value)
    assert [result.trial for result in source.told] == TRIALS[:1]
    assert set(card["asked"]) == {"cuda:1"}  # the other card is not touched


def test_a_pack_that_loses_the_device_is_not_tried_one_by_one(card: dict[str, Any]) -> None:
    class Fused:
        def __call__(self, trial: Trial) -> Result:
            raise AssertionError("trained alone")

        def obstacle(self, trial: Trial) -> str:
            return ""

        def probe_pack(self, members: Sequence[Trial]) -> None:
            return None

        def train_pack(self, members: Sequence[Trial]) -> Iterator[Result]:
            yield Result(members[0], Status.COMPLETE, loss=1.0)
            card["error"] = torch.AcceleratorError(ILLEGAL)
            raise card["error"]

    source = Source()
    with pytest.raises(LostError):
        run_inline(source, Fused(), packs=Packs(4))
    assert not source.told  # begun again, the pack is to be the same

    class NoLook(Fused):
        def obstacle(self, trial: Trial) -> str:
            raise card["error"]

    with pytest.raises(LostError):
        run_inline(Source(), NoLook(), packs=Packs(4))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: invalid configuration argument"),  # not for good
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("the model's own"),
    ],
)
def test_what_leaves_the_device_whole_is_a_failure_as_ever(
    card: dict[str, Any], error: Exception
) -> None:
    def train(trial: Trial) -> Result:
        raise error

    assert attempt(train, TRIALS[0]).status is Status.FAILED


def test_a_full_device_is_not_a_lost_one(card: dict[str, Any]) -> None:
    for full in (torch.OutOfMemoryError("x"), torch.AcceleratorError("CUDA error: out of memory")):
        card["error"] = full
        check_device(full)


def test_without_a_device_nothing_is_asked(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    check_device(ValueError())
    assert card["asked"] == []
    card["error"] = torch.AcceleratorError("CUDA error: devices are busy or unavailable")
    with pytest.raises(LostError, match=r"^cuda: "):  # the first call has failed
        check_device(card["error"])


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_on_ray_the_process_is_replaced_and_its_trial_tried_again(tmp_path: Path) -> None:
    ray_tune = pytest.importorskip("telescope.dispatch.ray.tune")
    marker = str(tmp_path / "died")

    def make() -> Callable[[Trial], Result]:
        """Local, for Ray to pickle it by value; the first trial of all loses the device once."""
        lost = False

        def train(trial: Trial) -> Result:
            nonlocal lost
            import sys
            from pathlib import Path

            from telescope.errors import LostError

            def check(error: BaseException) -> None:
                raise LostError(f"cuda:0: refuses every call: {error}")

            if not Path(marker).exists():
                lost = True
                queue: Any = sys.modules["telescope.dispatch.queue"]
                queue.check_device = check
                Path(marker).touch()
            if lost:
                raise RuntimeError("illegal memory access")
            return Result(trial, Status.COMPLETE, loss=1.0)

        return train

    source = Source()
    with ray_tune.opened(ray_tune.Size(1)) as session:
        ray_tune.run_ray(source, make(), session, logs=tmp_path / "logs")
    assert {result.trial: result.status for result in source.told} == dict.fromkeys(
        TRIALS, Status.COMPLETE
    )
    assert len(source.told) == len(TRIALS)
