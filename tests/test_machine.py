"""The number of workers and what each reserves, on pretended machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_spec

from telescope.errors import SpecError
from telescope.spec.spec import Spec
from telescope.sweep.machine import check_numbered_device, gpus, pack_size, workers

CORES = 16


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes this a machine of 16 cores and so many devices of a kind."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(CORES)))

    def make(kind: str, number: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        cuda = number if kind == "cuda" else 0
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)

    return make


def planned(
    corpus: Path, asked: int | None = None, is_cluster: bool = False, **compute: Any
) -> tuple[int, float, Any]:
    """Workers, GPUs that each reserves, and the pack, at the base width."""
    spec = Spec.from_dict(tiny_spec(corpus, compute=compute))
    at_once = workers(spec, asked, is_cluster=is_cluster)
    reserved = gpus(spec, at_once, is_cluster=is_cluster)
    assert all(n * reserved[w] <= max(1, torch.cuda.device_count()) for w, n in at_once.items())
    return at_once[16], reserved[16], pack_size(spec, is_cluster=is_cluster)


@pytest.mark.parametrize(
    ("kind", "number", "compute", "expected"),
    [
        ("cuda", 0, {}, (CORES, 0, 1)),  # a laptop
        ("cuda", 0, {"workers": 3}, (3, 0, 1)),
        ("cuda", 1, {}, (1, 1, "auto")),
        ("cuda", 8, {}, (8, 1, "auto")),
        ("cuda", 8, {"device": "cuda"}, (8, 1, "auto")),
        ("cuda", 8, {"gpus": 0.5}, (16, 0.5, "auto")),
        ("cuda", 8, {"workers": 3}, (3, 1, "auto")),
        ("cuda", 3, {"workers": 4}, (4, 0.5, "auto")),  # two on a device: a third each is not room
        ("cuda", 1, {"workers": 6}, (6, 0.1666, "auto")),
        ("cuda", 8, {"device": "cuda:1"}, (1, 0, "auto")),  # that one, shared by all
        ("cuda", 8, {"device": "cuda:1", "workers": 2}, (2, 0, "auto")),
        ("cuda", 8, {"device": "cpu"}, (CORES, 0, 1)),
        ("cuda", 8, {"device": "cpu", "cpus": 4}, (4, 0, 1)),
        ("cuda", 2, {"gpus": {"16": 0, "32": 1}}, (2, 1, "auto")),
        ("cuda", 8, {"cpus": {"16": 4, "32": 8}, "workers": 16}, (4, 1, "auto")),
        ("mps", 1, {}, (1, 0, "auto")),  # Ray has no such resource
    ],
)
def test_each_device_has_its_worker(
    corpus_file: Path, box: Any, kind: str, number: int, compute: Any, expected: Any
) -> None:
    box(kind, number)
    assert planned(corpus_file, **compute) == expected


def test_the_command_lines_workers_share_too(corpus_file: Path, box: Any) -> None:
    box("cuda", 1)
    assert planned(corpus_file, 4) == (4, 0.25, "auto")


def test_on_a_cluster_nothing_is_read_off_this_machine(corpus_file: Path, box: Any) -> None:
    box("cuda", 8)
    assert planned(corpus_file, 4, is_cluster=True) == (4, 0, 1)
    assert planned(corpus_file, 4, is_cluster=True, gpus=0.5) == (4, 0.5, "auto")


def test_a_foreign_trainer_sees_to_its_own_devices(box: Any) -> None:
    box("cuda", 8)
    spec = Spec.from_dict(
        {
            "name": "bowl",
            "ladder": {"widths": [8, 16]},
            "target": {"width": 32},
            "axes": {"lr": {"low": 0.01, "high": 0.16, "points": 3}},
            "trainer": {"command": ["train", "{width}", "{lr}", "{seed}"]},
            "cost": {"parameters": {"8": 1, "16": 2, "32": 3}},
        }
    )
    at_once = workers(spec, None, is_cluster=False)
    assert at_once == {8: CORES, 16: CORES}
    assert gpus(spec, at_once, is_cluster=False) == {8: 0, 16: 0}


@pytest.mark.parametrize(
    ("device", "reserved", "is_seen"),
    [("cuda:1", 1, False), ("cuda:1", 2, True), ("cuda:0", 0.5, True), ("cuda:3", 0, True)],
)
def test_a_device_that_a_worker_would_not_see_is_refused(
    corpus_file: Path, device: str, reserved: float, is_seen: bool
) -> None:
    spec = Spec.from_dict(tiny_spec(corpus_file, compute={"device": device, "gpus": reserved}))
    if is_seen:
        check_numbered_device(spec)
    else:
        with pytest.raises(SpecError, match=r"^compute\.device: got 'cuda:1' beside .*gpus = 1: "):
            check_numbered_device(spec)


def test_a_cluster_with_gpus_that_nobody_reserves_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray_tune = pytest.importorskip("telescope.dispatch.ray.tune")
    nodes = [{"Alive": True, "Resources": {"CPU": 8, "GPU": 4}}, {"Alive": True, "Resources": {}}]
    monkeypatch.setattr(ray_tune.ray, "nodes", lambda: nodes)
    with pytest.raises(SpecError, match=r"^compute\.gpus: got 0, the cluster has 4,.*'cpu'"):
        ray_tune._check_reserved([ray_tune.Size(2, gpus=1), ray_tune.Size(2)], "the cluster")
    ray_tune._check_reserved([ray_tune.Size(2, gpus=0.5)], "the cluster")
    nodes.pop(0)
    ray_tune._check_reserved([ray_tune.Size(2)], "the cluster")
