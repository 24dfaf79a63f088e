"""The bundled mixture of experts: counts, routing, width rules, load, resume, drop-in settings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPT, one_line, trial_config
from torch import Tensor, nn
from torch.nn import functional

import telescope
from telescope.answer.derive import _tags_of_model
from telescope.check import coordcheck
from telescope.check.coordcheck import SHORT
from telescope.check.verdict import CoordCheck
from telescope.config import (
    PYTHON_STDLIB,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrialConfig,
)
from telescope.data.corpus import load_corpus
from telescope.errors import ModelError
from telescope.packs.fused import obstacle
from telescope.records import CurvePoint, Point, Result, Status, Trial
from telescope.rules import groups, parametrization
from telescope.rules import scaling as rules
from telescope.rules.groups import parameter_groups
from telescope.rules.scaling import Role, Scaling, Start
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.builtin import BuiltIn
from telescope.train import checkpoint, loop
from telescope.train.flops import newton_schulz_flops, step_cost
from telescope.train.loop import set_up, take_step, train
from telescope.train.model import build_model, load_model_file
from telescope.train.optim import schedule
from telescope.transfer.settings import transfer_settings

MOONLIGHT = GPT.with_name("moonlight.py")
SMALL: dict[str, Any] = {"vocab_size": 256, "depth": 2, "head_dim": 8, "experts": 8, "top_k": 2}
SMALL |= {"shared": 1, "mlp_ratio": 2.0, "expert_ratio": 0.5, "bias_rate": 0.03}
WHOLE, ACTIVE = 15_288_893_440, 2_243_559_424
"""Parameters of the published model without embeddings: 15.29 billion, 2.24 for each token."""
POINT = Point.of(lr=0.004, weight_decay=0.1)


def moonlight(*changes: tuple[str, str], **kwargs: Any) -> ModelConfig:
    """The bundled model, small, with each (before, after) changed in its text."""
    text = MOONLIGHT.read_text()
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return ModelConfig(name="moonlight.py", text=text, kwargs={**SMALL, **kwargs})


def built(width: int = 32, **kwargs: Any) -> nn.Module:
    config = moonlight(**kwargs)
    return build_model(
        config, width=width, base_width=16, seed=0, optimizer="muon", rule="mup", device="cpu"
    ).module


def test_the_published_model_is_counted_exactly_and_pays_for_active_experts_only() -> None:
    """From the shape in arXiv 2502.16982 and DeepSeek-V3's layers, by hand; traced at 3 layers."""
    spec = Spec.load("moonlight-16b", ["model.depth=3"])
    model, train_config = spec.resolved_model, spec.train
    assert model is not None
    assert train_config is not None
    cost = step_cost(model, train_config, spec.optimizer, width=2048, base_width=256)
    expert, router = 3 * 2048 * 1408, 64 * 2048
    attention = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * 256 + 2048 * 2048

    def by_hand(layers: int, experts: int) -> int:
        dense = layers * attention + 3 * 2048 * 11264
        return dense + (layers - 1) * ((2 + experts) * expert + router)

    assert (by_hand(27, 64), by_hand(27, 6)) == (WHOLE, ACTIVE)
    whole, active = by_hand(3, 64), by_hand(3, 6)
    tables = 2 * 163_840 * 2048
    assert (cost.parameters, cost.embeddings, cost.active) == (whole + tables, tables, active)
    tokens = train_config.tokens_per_step
    assert cost.model == pytest.approx(6 * tokens * (active + tables / 2), rel=1e-3)
    assert cost.attention == 3 * 3 * tokens * 2 * 8192 * 16 * (192 + 128)
    # Muon orthogonalises every expert, active or not.
    assert cost.optimizer > 2 * 64 * 3 * newton_schulz_flops((1408, 2048), 5)


@pytest.mark.slow  # 20 s of CPU time: four models of 27 layers are traced
def test_the_plan_of_the_published_model_takes_less_than_two_gib() -> None:
    code = (
        "import resource, sys\nfrom telescope.cli import main\n"
        "sys.argv = ['telescope', 'plan', 'moonlight-16b', '--json']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    target = json.loads(done.stdout)["target"]
    assert (target["parameters_without_embeddings"], target["active_parameters"]) == (WHOLE, ACTIVE)
    assert int(done.stderr.split()[-1]) < 2 * 2**20


@pytest.mark.parametrize("share", [0, 1.5, "all"])
def test_an_active_share_that_is_none_is_refused(share: object) -> None:
    config = moonlight(("self.active_share = active_share", f"self.active_share = {share!r}"))
    train_config = TrainConfig(steps=1, batch_size=1, sequence_length=4)
    with pytest.raises(ModelError, match=r"blocks.1.mlp.gate: active_share is .*at most 1") as hit:
        step_cost(config, train_config, OptimizerConfig(), width=16, base_width=16)
    one_line(hit.value)


def naive_routing(layer: Any, x_BTD: Tensor) -> Tensor:
    """Token by token, expert by expert, from the definition."""
    out = torch.zeros_like(x_BTD)
    for b, t in ((b, t) for b in range(x_BTD.shape[0]) for t in range(x_BTD.shape[1])):
        x = x_BTD[b, t]
        scores = [1 / (1 + math.exp(-float(row @ x))) for row in layer.router.weight]
        biased = [s + float(bias) for s, bias in zip(scores, layer.bias_X, strict=True)]
        chosen = sorted(range(len(scores)), key=lambda e: -biased[e])[: layer.top_k]
        for e in chosen:
            gate, up, down = (part.weight[e] for part in (layer.gate, layer.up, layer.down))
            gain = layer.gate_scale * scores[e] / sum(scores[i] for i in chosen)
            out[b, t] += gain * (down @ (functional.silu(gate @ x) * (up @ x)))
    shared: Tensor = layer.shared(x_BTD)
    return out + shared


def test_routing_is_that_of_its_definition_and_the_bias_only_chooses() -> None:
    layer: Any = built().get_submodule("blocks.1.mlp")
    torch.manual_seed(1)
    with torch.no_grad():
        layer.down.weight.normal_()
        layer.bias_X.copy_(torch.linspace(-0.4, 0.4, 8))
        layer.bias_X[3] = -9.0  # an expert without a token
        x_BTD = torch.randn(2, 5, 32)
        layer.eval()
        torch.testing.assert_close(layer(x_BTD), naive_routing(layer, x_BTD), atol=1e-5, rtol=1e-5)


def test_the_bias_moves_against_the_load_in_training_alone() -> None:
    model = built()
    layer: Any = model.get_submodule("blocks.1.mlp")
    assert "bias_X" not in dict(layer.named_parameters())
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    model.eval()
    model(tokens)
    assert not layer.bias_X.any()
    assert not layer.load_X.any()
    model.train()
    model(tokens).sum().backward()
    assert layer.load_X.sum() == 4 * 16 * 2
    assert torch.equal(layer.bias_X, 0.03 * (16 - layer.load_X).sign())
    assert layer.bias_X.any()
    assert model.diagnostics() == {"expert_load": (layer.load_X.max() / 16).item()}  # type: ignore[operator]


def config_of(model: ModelConfig, optimizer: OptimizerConfig | None = None) -> TrialConfig:
    data = DataConfig(source=PYTHON_STDLIB)
    return TrialConfig(
        model=model,
        optimizer=optimizer or OptimizerConfig(),
        train=TrainConfig(steps=50, batch_size=8, sequence_length=32),
        data=data,
        base_width=16,
        corpus_digest=load_corpus(data).digest,
    )


def check(
    model: ModelConfig, factors: tuple[int, ...] = (1, 2, 4), steps: tuple[int, ...] = (3,)
) -> CoordCheck:
    extent = replace(SHORT, width_factors=factors, steps=steps)
    return coordcheck.coordinate_check(config_of(model), POINT, extent)


def test_the_coordinate_check_passes_over_eight_times_the_width() -> None:
    checked = check(moonlight(), (1, 2, 4, 8), SHORT.steps)
    assert checked.verdict == "PASS", checked.problems
    assert not checked.unwatched
    for kind in ("latent", "hidden", "hidden stack"):
        assert abs(checked.slopes[f"{kind} update"] or 9) < 0.1
        assert abs(checked.slopes[f"{kind} start"] or 9) < 0.2
    assert (checked.slopes["blocks.1.mlp.router (inner)"] or 0) < -0.3  # ∝ 1/√width at the start


def off_by_root(when: Callable[[Role, tuple[int, ...]], bool]) -> Callable[..., Scaling]:
    """The table of rules with √r too much in the steps of some matrices."""

    def wrong(role: Role, shape: Any, base_shape: Any, **names: str) -> Scaling:
        right = rules.scaling(role, shape, base_shape, **names)
        factor = math.sqrt(max(shape) / max(base_shape)) if when(role, shape) else 1.0
        return replace(right, lr=right.lr * factor)

    return wrong


@pytest.mark.parametrize(
    ("when", "quantity"),
    [
        (lambda role, shape: role is Role.LATENT, "latent update"),
        (lambda role, shape: role is Role.HIDDEN and len(shape) > 2, "hidden stack update"),
    ],
    ids=["latent", "experts"],
)
def test_a_broken_step_of_experts_or_latent_matrices_fails(
    when: Callable[[Role, tuple[int, ...]], bool], quantity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "scaling", off_by_root(when))
    checked = check(moonlight())
    assert quantity in checked.problems, checked.slopes
    assert checked.slopes[quantity] == pytest.approx(0.5, abs=0.15)


def test_a_start_of_latent_matrices_that_ignores_the_fixed_side_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parametrization, "start_share", lambda *_: 1.0)
    assert "latent start" in check(moonlight()).problems


@pytest.mark.parametrize(
    "change",
    [
        (
            "kv_BTS = self.key_value(self.latent_norm(self.compress(x_BTD)))",
            "kv_BTS = self.key_value(self.latent_norm(self.compress(x_BTD))) * "
            "x_BTD.shape[-1] ** 0.5 / 4",
        ),
        (
            "routed_ND = (out_NKD * gates_NK[..., None])",
            "routed_ND = (out_NKD * gates_NK[..., None] * x_ND.shape[-1] ** 0.5)",
        ),
    ],
    ids=["latent", "experts"],
)
def test_a_model_file_that_scales_them_by_itself_fails(change: tuple[str, str]) -> None:
    checked = check(moonlight(change), steps=SHORT.steps)
    assert checked.verdict == "FAIL", checked.steepest


TWO_SIDES = """
import mup, torch
from torch import nn

class Stack(nn.Module):
    latent = True
    def __init__(self, out, in_):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, out, in_))

class Model(nn.Module):
    def __init__(self, width, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.down, self.up = nn.Linear(width, 8), nn.Linear(8, width)
        self.middle, self.stack = nn.Linear(8, 8), Stack(8, width)
        self.grown, self.out = nn.Linear(width, width), nn.Linear(8, width)
        self.features = nn.Linear(8, width)
        for part in (self.down, self.up, self.middle, self.grown, self.out):
            part.latent = True
        self.out.residual_output = True
        self.readout = mup.MuReadout(width, vocab_size)

def build(width, *, vocab_size):
    return Model(width, vocab_size)
"""


def test_a_fixed_side_has_a_rule() -> None:
    """At 4 times the width, by hand: spectral norms ∝ √(out/in) (arXiv 2310.17813)."""
    config = ModelConfig(name="two_sides.py", text=TWO_SIDES, kwargs={"vocab_size": 32})
    tags = _tags_of_model(config, 64, 16)
    settings = {
        name: group
        for group in parameter_groups(tags, Point.of(lr=0.1, weight_decay=0.2), OptimizerConfig())
        for name in group.names
    }
    # torch steps by 0.2·√max(out, in)·lr; at base width that is 0.8 lr for all but `middle`.
    steps = {
        name: group.lr * 0.2 * math.sqrt(max(group.shape[-2:])) / 0.1
        for name, group in settings.items()
        if group.is_muon
    }
    assert steps == pytest.approx(
        {
            "down.weight": 0.8 / 2,
            "stack.weight": 0.8 / 2,
            "up.weight": 0.8 * 2,
            "out.weight": 0.8 * 2,
            "middle.weight": 0.2 * math.sqrt(8),
            "grown.weight": 0.8,
        }
    )
    stds = {name: settings[f"{name}.weight"].init_std for name in ("down", "up", "middle", "stack")}
    assert stds == pytest.approx(
        {"down": 1 / 16, "stack": 1 / 16, "up": 8**-0.5, "middle": 8**-0.5}
    )
    assert settings["out.weight"].start is Start.ZEROS
    roles = {name: str(group.role) for name, group in settings.items()}
    assert roles["down.weight"] == roles["middle.weight"] == roles["stack.weight"] == "latent"
    assert (roles["grown.weight"], roles["out.weight"]) == ("hidden", "residual")
    features = settings["features.weight"]
    assert (features.role, features.is_muon, features.lr) == (Role.INPUT, False, 0.1)
    assert features.init_std == pytest.approx(8**-0.5)
    decays = {g.lr * g.weight_decay for g in settings.values()}
    assert max(decays) == pytest.approx(min(decays))


@pytest.mark.parametrize("part", ["down", "features"])
def test_a_parametrization_has_no_rule_by_its_sides(part: str) -> None:
    """Its factor (out, 1) would look like an input layer, or like a fixed side."""
    normed = f"        nn.utils.parametrizations.weight_norm(self.{part})\n"
    text = TWO_SIDES.replace("        self.readout", normed + "        self.readout")
    config = ModelConfig(name="normed.py", text=text, kwargs={"vocab_size": 32})
    with pytest.raises(ModelError, match=rf"{part}.*belongs to a torch parametrization"):
        _tags_of_model(config, 64, 16)


def load_of(result: Result) -> float:
    """Mean load of the busiest expert over the mean load, in the second half of a run."""
    rows = result.curve[len(result.curve) // 2 :]
    return sum(row.diagnostics["expert_load"] for row in rows) / len(rows)


def test_the_load_stays_even_by_the_bias_alone() -> None:
    """The bound of docs/moonlight.md: 2 where 1 is even and 4 is two experts of eight."""
    trial = Trial(32, Point.of(lr=0.0447, weight_decay=0.1), 0)
    loads = {}
    for rate in (0.03, 0.0):
        cheaper = [f"model.bias_rate={rate}", "data.eval_tokens=512"]
        sweep = BuiltIn.of(Spec.load("moonlight-small", cheaper))
        loads[rate] = load_of(train(sweep.trial_config, trial))
    assert loads[0.03] < 2 < 3 < loads[0.0]


def test_the_load_is_in_the_curves_file(tmp_path: Path) -> None:
    trial = Trial(32, POINT, 0)
    curve = (CurvePoint(1, 5.0, None, {"expert_load": 2.5}), CurvePoint(2, 4.0, 4.5))
    folder = Folder(tmp_path / "sweep")
    (folder.path / "curves").mkdir(parents=True)
    folder.write_curve(Result(trial, Status.COMPLETE, loss=4.5, curve=curve))
    assert folder.read_curve(trial) == curve
    lines = (folder.path / "curves" / f"{trial}.csv").read_text().splitlines()
    assert lines == ["step,train_loss,held_out_loss,expert_load", "1,5.0,,2.5", "2,4.0,4.5,"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3.0", r"diagnostics gave 3.0, must be a mapping"),
        ("return {'step': 1.0}", r"the names none of step, train_loss, held_out_loss"),
        ("return {'load': 'high'}", r"moonlight.py: ValueError: could not convert"),
    ],
)
def test_diagnostics_that_are_no_numbers_are_refused(
    body: str, message: str, corpus_file: Path
) -> None:
    change = ("routed = [m.load_X for m in self.modules() if isinstance(m, RoutedMLP)]", body)
    config = trial_config(corpus_file, model=moonlight(change))
    with pytest.raises(ModelError, match=message) as hit:
        train(config, Trial(16, POINT, 0))
    one_line(hit.value)


def test_packs_leave_it_alone_and_say_why(corpus_file: Path) -> None:
    config = trial_config(corpus_file, model=moonlight())
    assert obstacle(config, Trial(16, POINT, 0)) == "it changes its buffers in training"


class Killed(BaseException):
    """Ends a trial as a kill would."""


@pytest.mark.parametrize("keeps_buffers", [True, False])
def test_a_resumed_trial_is_bit_equal_because_its_bias_is_kept(
    keeps_buffers: bool, tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(16, Point.of(lr=0.05, weight_decay=0.1), 0)
    settings: dict[str, Any] = {"model": moonlight(), "steps": 12, "evals": 3}
    expected = train(trial_config(corpus_file, **settings), trial)
    config = trial_config(corpus_file, **settings, checkpoint_every=5)
    config = replace(config, checkpoint_folder=str(tmp_path))

    def stopping(*arguments: Any) -> Any:
        if arguments[4] == 8:
            raise Killed
        return take_step(*arguments)

    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(loop, "take_step", stopping)
        train(config, trial)
    if not keeps_buffers:  # the control: without them the test above could not fail
        parameters = lambda model: {f"model.{n}": p for n, p in model.named_parameters()}  # noqa: E731
        monkeypatch.setattr(checkpoint, "_model_tensors", parameters)
    resumed = train(config, trial)
    assert (resumed.loss == expected.loss and resumed.curve == expected.curve) == keeps_buffers


STEPS = 20


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_plain_loop_with_torchs_muon_trains_it_as_a_trial(
    by_hand: bool, corpus_file: Path
) -> None:
    """With `telescope.apply`, and with stacks unbound in five lines of one's own."""
    point, width = Point.of(lr=0.02, weight_decay=0.3), 48
    config = trial_config(corpus_file, model=moonlight(), steps=STEPS)
    own = set_up(config, Trial(width, point, 3))
    start = [p.detach().clone() for p in own.model.parameters()]
    settings = transfer_settings(
        point,
        width=width,
        steps=STEPS,
        train=config.train,
        optimizer=config.optimizer,
        tags=_tags_of_model(config.model, width, 16),
    )
    model: nn.Module = load_model_file(config.model).build(width, **config.model.kwargs)
    training = telescope.apply(model, settings, seed=3)
    stacks, muon = unbound(model, settings.as_dict()["groups"])
    for step in range(STEPS):
        tokens, targets = own.batches.at(step)
        functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
        if by_hand:
            for stack, matrices in stacks:
                assert stack.grad is not None
                for matrix, gradient in zip(matrices, stack.grad.unbind(), strict=True):
                    matrix.grad = gradient
            for group in muon.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step, own.train)
            muon.step()  # type: ignore[no-untyped-call]
            training.optimizers[1].step()
            training.schedulers[1].step()
            model.zero_grad()
        else:
            training.step()
            training.zero_grad()
        take_step(own.model, own.optimizers, own.batches, own.train, step, "cpu")
    pairs = zip(start, own.model.parameters(), model.parameters(), strict=True)
    gaps = [((p - q).norm() / (p - before).norm()).item() for before, p, q in pairs]
    assert max(gaps) <= 1e-3, max(gaps)


def unbound(
    model: nn.Module, settings: list[dict[str, Any]]
) -> tuple[list[tuple[nn.Parameter, list[nn.Parameter]]], torch.optim.Muon]:
    """Stacks with their matrices, and torch's own Muon on all Muon groups."""
    parameters, stacks, muon = dict(model.named_parameters()), [], []
    for group in settings:
        if group["optimizer"] != "Muon":
            continue
        params = [parameters[name] for name in group["names"]]
        if len(group["shape"]) > 2:
            assert "unbind" in group["note"]
            made = [(p, [nn.Parameter(m) for m in p.detach().unbind()]) for p in params]
            stacks += made
            params = [matrix for _, matrices in made for matrix in matrices]
        lr, decay = group["lr"], group["weight_decay"]
        muon.append({"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay})
        muon[-1] |= {k: tuple(v) if isinstance(v, list) else v for k, v in group["kwargs"].items()}
    return stacks, torch.optim.Muon(muon)


def test_gradients_of_a_stack_accumulate_are_clipped_and_cleared_with_its_matrices(
    corpus_file: Path,
) -> None:
    from telescope.transfer.stacks import StackMuon

    stack = nn.Parameter(torch.randn(3, 4, 5))
    muon = StackMuon([{"params": [stack], "lr": 0.1}], weight_decay=0.0)
    matrices = muon.param_groups[0]["params"]
    assert [tuple(m.shape) for m in matrices] == [(4, 5)] * 3
    for _ in range(2):
        stack.square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(torch.stack([m.grad for m in matrices]), 4 * stack.detach())
    nn.utils.clip_grad_norm_([stack], 1e-3)
    assert all(float(m.grad.norm()) < 1e-3 for m in matrices)
    before = stack.detach().clone()
    muon.step()
    assert not torch.equal(stack, before)
    muon.zero_grad()
    assert stack.grad is None
    muon.step()
    moved = stack.detach().clone()
    muon.step()
    assert torch.equal(stack, moved), "without a gradient nothing moves"
