"""Target runs on several ranks: the same losses, divided state, and another number of ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, gpt_config
from faults import finish, start
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from targets import STEPS, TRIAL, curve, made, model_of, on_ranks, result_of, tiny_run, trained

from telescope import Spec
from telescope.config import ModelConfig, OptimizerConfig
from telescope.errors import DataError
from telescope.records import Point
from telescope.rules.groups import Group, parameter_groups
from telescope.rules.scaling import Role
from telescope.target.ranks import Ranks
from telescope.target.record import Manner
from telescope.target.sharding import ShardedOptimizers, partition, state_size
from telescope.target.train import train_target
from telescope.train.model import build_meta, build_model
from telescope.train.muon import Muon

ROUNDING = 1e-3
"""Share by which losses of another number of ranks may differ: gradients are summed in another
order, and Newton–Schulz in bf16 makes more of that. Measured: 1e-4 at the most."""


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The optimizer state of a checkpoint by parameter and key, its pieces put together."""
    pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for path in (folder / "checkpoints" / f"step-{step}").glob("optimizer-*"):
        for full, tensor in load_file(path).items():
            if full.count(":") == 2:
                key, rows, name = full.split(":")
                pieces.setdefault((name, key), []).append((int(rows.split("-")[0]), tensor))
    return {
        f"{name} {key}": torch.cat([t for _, t in sorted(found, key=lambda f: f[0])])
        if found[0][1].ndim
        else found[0][1]
        for (name, key), found in pieces.items()
    }


def test_one_two_and_three_ranks_give_the_same_losses_within_rounding(
    corpus_file: Path, tmp_path: Path
) -> None:
    """Three ranks have 2, 1 and 1 of the batch's 4 sequences."""
    run = tiny_run(corpus_file, model=gpt_config(depth=2))
    alone = trained(tmp_path / "run-1", run)
    for size in (2, 3):
        folder = made(tmp_path / f"run-{size}", run).path
        result = on_ranks(size, folder)
        assert result["ranks"] == size
        assert result["loss"] == pytest.approx(alone["loss"], rel=ROUNDING)
        for mine, its in zip(curve(folder), curve(tmp_path / "run-1"), strict=True):
            assert float(mine["loss"]) == pytest.approx(float(its["loss"]), rel=ROUNDING)
        # Its fair part, within a tenth: that is what a rank's memory holds.
        (total,) = alone["optimizer_state"]
        assert sum(result["optimizer_state"]) == pytest.approx(total, abs=200), "counts of steps"
        assert max(result["optimizer_state"]) < 1.1 * total / size


def test_a_killed_run_goes_on_with_as_many_ranks_bit_for_bit_or_with_others(
    corpus_file: Path, tmp_path: Path
) -> None:
    run = tiny_run(corpus_file)
    whole = made(tmp_path / "whole", run).path
    on_ranks(2, whole, checkpoint_every=4)
    folder = made(tmp_path / "killed", run).path
    on_ranks(2, folder, stop=6, checkpoint_every=4)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    saved = state_of(folder, 4)
    # Another number of ranks takes over what the two have left, and loses none of it.
    for size in (1, 3):
        other = tmp_path / f"other-{size}"
        subprocess.run(["cp", "-r", folder, other], check=True)
        result = (
            on_ranks(size, other, checkpoint_every=4)
            if size > 1
            else train_target(other, Manner(checkpoint_every=4), Ranks())
        )
        assert result["loss"] == pytest.approx(result_of(whole)["loss"], rel=ROUNDING)
        assert curve(other)[:4] == curve(whole)[:4]
        ended = state_of(other, STEPS)
        assert ended.keys() == saved.keys()
        assert {float(t) for name, t in ended.items() if name.endswith(" step")} == {float(STEPS)}
    on_ranks(2, folder, checkpoint_every=4)
    assert result_of(folder) == result_of(whole)
    assert curve(folder) == curve(whole)
    for name, tensor in model_of(whole, STEPS).items():
        assert torch.equal(tensor, model_of(folder, STEPS)[name]), name
    for name, tensor in state_of(whole, STEPS).items():
        assert torch.equal(tensor, state_of(folder, STEPS)[name]), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_state_of_a_checkpoint_is_taken_whole_by_any_number_of_ranks(
    size: int, corpus_file: Path, tmp_path: Path
) -> None:
    """Saved by two, taken over by others, and saved again at the same step."""
    from telescope.target.checkpoint import Checkpoints

    run = tiny_run(corpus_file)
    folder = made(tmp_path / "run", run).path
    on_ranks(2, folder, checkpoint_every=4)
    config = run.config
    found: dict[str, torch.Tensor] = {}
    for rank in range(size):
        tagged = build_model(
            config.model,
            width=32,
            base_width=16,
            seed=0,
            optimizer="muon",
            rule="mup",
            device="cpu",
        )
        groups = parameter_groups(tagged.tags, TRIAL.point, config.optimizer)
        ranks = Ranks(rank, size)
        mine = ShardedOptimizers(tagged.module, groups, config.optimizer, ranks)
        Checkpoints(folder / "checkpoints", ranks).restore(STEPS, tagged.module, mine)
        for full, tensor in mine.state().items():
            assert full not in found
            found[full] = tensor
    for name, tensor in state_of(folder, STEPS).items():
        parameter, key = name.split()
        pieces = sorted(
            (int(full.split(":")[1].split("-")[0]), value)
            for full, value in found.items()
            if full.split(":")[0] == key and full.endswith(f":{parameter}") and value.ndim
        )
        if tensor.ndim:
            assert torch.equal(torch.cat([value for _, value in pieces]), tensor), name
        else:
            assert all(
                torch.equal(v, tensor)
                for f, v in found.items()
                if f.endswith(f":{parameter}") and not v.ndim
            )


def compare_with_torchs(rank: int, meeting: str, report: str) -> None:
    """Train a model by random gradients with torch's ZeRO and with ours, in a process per rank."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    config = OptimizerConfig(ns_dtype="fp32")
    *pair, start = [
        build_model(
            gpt_config(depth=2),
            width=32,
            base_width=16,
            seed=1,
            optimizer="muon",
            rule="mup",
            device="cpu",
        )
        for _ in range(3)
    ]
    groups = parameter_groups(pair[0].tags, TRIAL.point, config)
    ours = ShardedOptimizers(pair[0].module, groups, config, Ranks.of_group("cpu"))
    theirs = torchs_zero(pair[1].module, groups, config)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for mine, its in zip(pair[0].module.parameters(), pair[1].module.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        ours.step(0.5)
        for optimizer in theirs:
            optimizer.step()
    named = zip(pair[0].module.named_parameters(), pair[1].module.parameters(), strict=True)
    worst = max(float((a - b).abs().max() / b.abs().max()) for (_, a), b in named)
    pairs = zip(pair[0].module.parameters(), start.module.parameters(), strict=True)
    moved = min(float((mine - its).norm()) for mine, its in pairs)
    Path(f"{report}-{rank}").write_text(f"{worst} {moved}")
    dist.destroy_process_group()


def torchs_zero(model: Any, groups: list[Group], config: OptimizerConfig) -> list[Any]:
    """Half of the peak learning rates, in torch's own division of state by whole parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    parameters = dict(model.named_parameters())
    muon = [g for g in groups if g.is_muon]
    adamw = [g for g in groups if not g.is_muon]

    def tables(of: list[Group], *keys: str) -> list[dict[str, Any]]:
        return [
            {
                "params": [parameters[name] for name in g.names],
                "lr": g.lr / 2,
                "weight_decay": g.weight_decay,
                **{key: g.kwargs[key] for key in keys},
            }
            for g in of
        ]

    settings = {key: muon[0].kwargs[key] for key in ("momentum", "nesterov", "ns_steps")}
    return [
        ZeroRedundancyOptimizer(
            tables(muon), optimizer_class=Muon, ns_dtype=config.ns_dtype, **settings
        ),
        ZeroRedundancyOptimizer(tables(adamw, "betas", "eps"), optimizer_class=torch.optim.AdamW),
    ]


def test_the_updates_are_those_of_torchs_own_division(tmp_path: Path) -> None:
    meeting, report = str(tmp_path / "meeting"), str(tmp_path / "report")
    ranks = [start(compare_with_torchs, rank, meeting, report) for rank in range(2)]
    assert [finish(rank) for rank in ranks] == [0, 0]
    (worst, moved), others = (
        [float(n) for n in Path(f"{report}-{rank}").read_text().split()] for rank in range(2)
    )
    assert moved > 0
    assert others == [worst, moved], "both ranks have the same parameters"
    assert worst < 1e-6


def group(shape: tuple[int, ...], count: int, *, is_muon: bool) -> Group:
    names = tuple(f"{'m' if is_muon else 'a'}{'x'.join(map(str, shape))}.{n}" for n in range(count))
    role = Role.HIDDEN if is_muon else Role.EMBEDDING
    return Group(role, shape, names, is_muon, 0.1, 0.1, {}, 0.1, 1.0, None)


SHAPES = [(), (7,), (64,), (8, 8), (32, 16), (1000, 8), (6, 16, 8), (2, 64, 64)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(SHAPES),
            st.integers(1, 5),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda item: (item[0], item[2] and len(item[0]) >= 2),
    ),
    st.integers(1, 9),
)
def test_the_pieces_cover_every_parameter_once(
    found: list[tuple[tuple[int, ...], int, bool]], ranks: int
) -> None:
    groups = [group(s, n, is_muon=muon and len(s) >= 2) for s, n, muon in found]
    pieces = partition(groups, ranks)
    assert pieces == partition(groups, ranks)
    for each in groups:
        for name in each.names:
            mine = [(p.start, p.stop) for p in pieces if p.name == name]
            rows = each.shape[0] if each.shape else 1
            assert [n for start, stop in mine for n in range(start, stop)] == list(range(rows))
            if each.is_muon and len(each.shape) == 2:
                assert mine == [(0, rows)], "a matrix of Muon stays whole"
    assert {p.owner for p in pieces} <= set(range(ranks))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16, 32])
def test_a_large_models_state_is_divided_evenly(ranks: int) -> None:
    """The 3.67 B target of essential-4b, whose embedding is 9 % of the parameters."""
    spec = Spec.load("essential-4b")
    model = spec.resolved_model
    assert model
    tags = build_meta(model, width=2560, base_width=256).tags
    groups = parameter_groups(tags, Point.of(lr=0.06, weight_decay=0.03), spec.optimizer)
    total = sum(state_size(g) * len(g.names) for g in groups)
    loads = [0] * ranks
    for piece in partition(groups, ranks):
        loads[piece.owner] += piece.cost
    assert sum(loads) == pytest.approx(total, rel=1e-6)
    assert max(loads) < 1.1 * total / ranks
    assert min(loads) > 0.9 * total / ranks
    whole = sorted((state_size(g) for g in groups for _ in g.names), reverse=True)
    assert ranks < 8 or whole[0] > 1.1 * total / ranks, "whole parameters could not do it"


def one_fails(rank: int, meeting: str, report: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def fail() -> int:
        if rank == 1:
            raise DataError("data.source: another corpus")
        return 1

    try:
        Ranks.of_group("cpu").together(fail)
    except DataError as error:
        Path(f"{report}-{rank}").write_text(str(error))
    assert Ranks.of_group("cpu").together(lambda: rank) == rank
    dist.destroy_process_group()


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    meeting, report = str(tmp_path / "meeting"), str(tmp_path / "report")
    ranks = [start(one_fails, rank, meeting, report) for rank in range(2)]
    assert [finish(rank) for rank in ranks] == [0, 0]
    for rank in range(2):
        said = Path(f"{report}-{rank}").read_text()
        assert said == "data.source: another corpus (rank 1 of 2)"


def test_started_by_torchrun_without_ray(corpus_file: Path, tmp_path: Path) -> None:
    run = tiny_run(corpus_file)
    folder = made(tmp_path / "run", run).path
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "telescope.target", str(folder), "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 0, done.stderr
    result = result_of(folder)
    assert f"run: held-out loss {result['loss']:.4f} after 12 steps" in done.stdout
    assert result["loss"] == pytest.approx(trained(tmp_path / "one", run)["loss"], rel=ROUNDING)


def test_the_room_of_a_rank_needs_neither_ray_nor_pydantic(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'pydantic', 'optuna', 'pandas', 'rich', 'typer', 'sqlalchemy'):\n"
        "    sys.modules[name] = None\n"
        "import telescope.target.__main__ as main\n"
        "sys.argv = ['x', '--help']\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--micro-batch" in done.stdout


def test_the_rows_of_all_ranks_are_the_batch() -> None:
    for size, batch in ((1, 5), (3, 5), (4, 4), (5, 64)):
        rows = [row for rank in range(size) for row in Ranks(rank, size).rows(batch)]
        assert rows == list(range(batch))
        counts = [len(Ranks(rank, size).rows(batch)) for rank in range(size)]
        assert max(counts) - min(counts) <= 1


def test_the_weights_of_unequal_parts_give_the_batchs_mean(
    corpus_file: Path, tmp_path: Path
) -> None:
    """The first loss is before any step: equal to a few last digits, or a part counts too much."""
    run = tiny_run(corpus_file)
    trained(tmp_path / "one", run)
    folder = made(tmp_path / "three", replace(run)).path
    on_ranks(3, folder)
    first, alone = (float(curve(path)[0]["loss"]) for path in (folder, tmp_path / "one"))
    assert first == pytest.approx(alone, rel=1e-6)


def test_a_divided_model_trains_as_a_whole_one(corpus_file: Path, tmp_path: Path) -> None:
    """FSDP2 on 2 ranks, with gradients accumulated, and a resume of the divided run undivided."""
    run = tiny_run(
        corpus_file, model=gpt_config(depth=2), optimizer=OptimizerConfig(ns_dtype="fp32")
    )
    alone = trained(tmp_path / "alone", run)
    folder = made(tmp_path / "divided", run).path
    result = on_ranks(2, folder, shard=True, micro_batch=1, checkpoint_every=4)
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    (total,) = alone["optimizer_state"]
    assert max(result["optimizer_state"]) < 1.1 * total / 2
    for name, tensor in model_of(tmp_path / "alone", STEPS).items():
        torch.testing.assert_close(model_of(folder, STEPS)[name], tensor, rtol=1e-3, atol=1e-4)
    saved = state_of(folder, STEPS)
    for name, tensor in state_of(tmp_path / "alone", STEPS).items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-2, atol=1e-5)
    killed = made(tmp_path / "killed", run).path
    on_ranks(2, killed, stop=6, shard=True, checkpoint_every=4)
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", killed, other], check=True)
    on_ranks(2, killed, shard=True, micro_batch=1, checkpoint_every=4)
    assert result_of(killed)["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert train_target(other, Manner(), Ranks())["loss"] == pytest.approx(alone["loss"], rel=1e-5)


EXPERTS = """
import torch
from mup import MuSharedReadout
from torch import nn

class Experts(nn.Module):
    def __init__(self, width, experts):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Parameter(torch.empty(experts, 2 * width, width))
        self.down = nn.Parameter(torch.empty(experts, width, 2 * width))

    def forward(self, x):
        hidden = torch.einsum("bti,eoi->bteo", self.norm(x), self.up).relu()
        return x + torch.einsum("bteo,eio->bti", hidden, self.down)

class Model(nn.Module):
    def __init__(self, width, vocab_size, experts):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Experts(width, experts) for _ in range(2))
        self.readout = MuSharedReadout(self.embedding.weight, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.readout(x)

def build(width, *, vocab_size, experts):
    return Model(width, vocab_size, experts)
"""


def test_stacks_of_matrices_are_divided_between_the_matrices(
    corpus_file: Path, tmp_path: Path
) -> None:
    """Experts in a 3-D parameter: divided over 2 ranks by ZeRO-1 and by FSDP2, and tied readout."""
    kwargs = {"vocab_size": 256, "experts": 4}
    config = ModelConfig(name="experts.py", text=EXPERTS, kwargs=kwargs)
    run = tiny_run(corpus_file, model=config, optimizer=OptimizerConfig(ns_dtype="fp32"))
    alone = trained(tmp_path / "alone", run)
    for name, shard in (("zero", False), ("fsdp", True)):
        folder = made(tmp_path / name, run).path
        result = on_ranks(2, folder, shard=shard)
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        (total,) = alone["optimizer_state"]
        assert max(result["optimizer_state"]) < 1.1 * total / 2
