"""`telescope.apply` on plain torch models, against telescope's own loop and against plain loops.

The bundled model is trained beside a trial; models by `Shapes` beside loops that are written here
from the width rule by hand, with the multiplier in the forward pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt_config, one_line, trial_config
from foreign_specs import finished, foreign_spec
from torch import Tensor, nn
from torch.nn import functional

import telescope
from telescope import Shapes, Spec
from telescope.answer.derive import _tags_of_model
from telescope.config import OptimizerConfig, TrainConfig
from telescope.errors import ModelError, RefusedError, SpecError, TelescopeError
from telescope.records import Point, Trial
from telescope.rules.schedule import share_of_peak
from telescope.train.loop import set_up, take_step
from telescope.train.model import load_model_file
from telescope.train.optim import schedule
from telescope.transfer.settings import Transfer, transfer_settings

BASE, WIDTH, STEPS = 16, 48, 20
EXACT = 64
"""A width at which the multiplier is a power of two: moving it elsewhere changes no rounding, which
Newton–Schulz in bf16 would enlarge to a few per cent of the distance in 20 steps."""
TOKENS = 32
POINT = Point.of(lr=0.05, weight_decay=0.3)


def transfer_of(
    width: int = WIDTH,
    *,
    tied: bool = False,
    optimizer: OptimizerConfig | None = None,
    **train: Any,
) -> Transfer:
    """The settings of the bundled model at a width that no ladder from 16 has."""
    train = {"batch_size": 4, "sequence_length": 16, "steps": STEPS, **train}
    return transfer_settings(
        POINT,
        width=width,
        steps=STEPS,
        train=TrainConfig(**train),
        optimizer=optimizer or OptimizerConfig(),
        tags=_tags_of_model(gpt_config(tied=tied), width, BASE),
    )


def gpt(width: int = WIDTH, **kwargs: Any) -> nn.Module:
    """The bundled model as a user builds it: no word of mup."""
    config = gpt_config(**kwargs)
    torch.manual_seed(99)
    model: nn.Module = load_model_file(config).build(width, **config.kwargs)
    return model


def gap(start: list[Tensor], one: nn.Module, other: nn.Module) -> float:
    """The largest difference of a parameter, as a share of the distance that it moved."""
    pairs = zip(start, one.parameters(), other.parameters(), strict=True)
    return max(float(((p - q).norm() / (p - before).norm()).item()) for before, p, q in pairs)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("tied", "fold"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_plain_loop_trains_the_bundled_model_as_a_trial(
    corpus_file: Path, tied: bool, fold: bool, schedule: str, name: Any
) -> None:
    """From a file; the initial values are the trial's too, but for a folded readout's scale."""
    optimizer, width = OptimizerConfig(name=name), EXACT if fold else WIDTH
    config = trial_config(
        corpus_file,
        model=gpt_config(tied=tied),
        optimizer=optimizer,
        steps=STEPS,
        schedule=schedule,
    )
    own = set_up(replace(config, base_width=BASE), Trial(width, POINT, 3))
    start = [p.detach().clone() for p in own.model.parameters()]
    model = gpt(width, tied=tied)
    settings = transfer_of(width, tied=tied, optimizer=optimizer, schedule=schedule)
    training = telescope.apply(model, settings, seed=3, fold=fold)
    for before, parameter in zip(start, model.parameters(), strict=True):
        assert torch.equal(before, parameter)  # a readout starts at 0, folded or not
    for step in range(STEPS):
        tokens, targets = own.batches.at(step)
        functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
        training.step()
        training.zero_grad()
        take_step(own.model, own.optimizers, own.batches, own.train, step, "cpu")
    if fold:
        with torch.no_grad():
            model.get_submodule("readout").weight.mul_(width / BASE)  # type: ignore[operator]
    assert gap(start, own.model, model) <= 1e-3


class Net(nn.Module):
    """A plain model; `by_hand` multiplies the logits in the forward pass."""

    def __init__(
        self, width: int, tied: bool = False, *, by_hand: float = 1.0, bias: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(TOKENS, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.down.residual_output = True  # type: ignore[assignment]
        self.head = nn.Linear(width, TOKENS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.by_hand = by_hand

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        logits: Tensor = self.head(x) * self.by_hand
        return logits


def settings_by_shapes(tied: bool, tmp_path: Path, width: int = WIDTH) -> dict[str, Any]:
    """Through the API and a file, as a user of another trainer has them; without a schedule."""
    shapes = Shapes.of(lambda width: Net(width, tied), width=width, base_width=BASE)
    spec = Spec.from_dict(foreign_spec(target={"width": width}))
    (tmp_path / "t.json").write_text(json.dumps(finished(spec).transfer(shapes=shapes).as_dict()))
    data: dict[str, Any] = json.loads((tmp_path / "t.json").read_text())
    return data


def train(model: nn.Module, step: Callable[[], None]) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        tokens = torch.randint(TOKENS, (32, 17), generator=generator)
        logits = model(tokens[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        step()


@pytest.mark.parametrize(("tied", "fold"), [(False, False), (False, True), (True, False)])
def test_a_model_by_shapes_trains_as_the_rule_by_hand(
    tied: bool, fold: bool, tmp_path: Path
) -> None:
    """r = 4: hidden lr/2 and decay·2, logits/4, all else as swept."""
    settings = settings_by_shapes(tied, tmp_path, EXACT)
    lr, decay = settings["lr"], settings["weight_decay"]
    model, other = Net(EXACT, tied), Net(EXACT, tied, by_hand=1 / 4)
    training = telescope.apply(model, settings, seed=1, fold=fold)
    other.load_state_dict(model.state_dict())
    start = [p.detach().clone() for p in other.parameters()]
    matrices = [other.up.weight, other.down.weight]
    others = [p for p in other.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(
        matrices, lr=lr / 2, weight_decay=decay * 2, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=lr, weight_decay=decay, betas=(0.95, 0.95))

    def step_by_hand() -> None:
        optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def step() -> None:
        training.step()
        training.zero_grad()

    assert training.schedulers == []
    train(model, step)
    train(other, step_by_hand)
    if fold:
        with torch.no_grad():
            model.head.weight.mul_(4)
    assert gap(start, other, model) <= 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_the_initial_values_are_those_of_the_json(tied: bool, tmp_path: Path) -> None:
    for model, settings in (
        (Net(WIDTH, tied), settings_by_shapes(tied, tmp_path)),
        (gpt(tied=tied), transfer_of(tied=tied).as_dict()),
    ):
        telescope.apply(model, settings)
        parameters = dict(model.named_parameters())
        for group in settings["groups"]:
            for name in group["names"]:
                values = parameters[name].detach()
                if group["init"] == "normal":
                    assert values.std().item() == pytest.approx(group["init_std"], rel=0.1), name
                    assert abs(values.mean().item()) < 5 * group["init_std"] / values.numel() ** 0.5
                else:
                    number = {"zeros": 0.0, "ones": 1.0}[group["init"]]
                    assert torch.equal(values, torch.full_like(values, number)), name


def test_a_seed_makes_it_reproducible() -> None:
    models = [gpt(), gpt(), gpt()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        telescope.apply(model, transfer_of(), seed=seed)
    first, same, other = (model.get_submodule("blocks.0.mlp.up").weight for model in models)
    assert torch.equal(first, same)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


def test_a_second_time_multiplies_no_more_than_the_first(tmp_path: Path) -> None:
    model, tokens = Net(WIDTH, bias=True), torch.arange(8)[None]
    shapes = Shapes.of(lambda width: Net(width, bias=True), width=WIDTH, base_width=BASE)
    settings = {"groups": shapes.groups(POINT)}
    for fold, multiplier in ((False, 1 / 3), (False, 1 / 3), (True, 1.0), (False, 1 / 3)):
        telescope.apply(model, settings, fold=fold)
        plain = model.head.weight.data.normal_()
        model.head.bias.data.fill_(7.0)
        with torch.no_grad():
            hidden = model.embed(tokens)  # the branch starts at zero
            expected = hidden @ plain.T * multiplier + 7.0
        torch.testing.assert_close(model(tokens), expected)
        torch.testing.assert_close(model.head(input=hidden), expected)


class Wrapper(nn.Module):
    """As torch.nn.parallel.DistributedDataParallel holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.module(tokens)
        return logits


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
    "ddp": Wrapper,
    "compiled ddp": lambda model: torch.compile(Wrapper(model), backend="eager"),
    "ddp compiled": lambda model: Wrapper(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_models_are_the_same_models(how: str, tmp_path: Path) -> None:
    """Also where one has been compiled and called before; plain layers have the hook then."""
    settings, tokens = settings_by_shapes(False, tmp_path), torch.arange(8)[None]
    plain, inner = Net(WIDTH), Net(WIDTH)
    wrapped: Any = WRAPPED[how](inner)
    wrapped(tokens)
    for model in (plain, wrapped):
        telescope.apply(model, settings, seed=2)
    for model in (plain, inner):
        model.head.weight.data = torch.ones(TOKENS, WIDTH)
    torch.testing.assert_close(wrapped(tokens), plain(tokens))
    for one, other in zip(plain.parameters(), inner.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_block_that_is_compiled_alone(tmp_path: Path) -> None:
    model = gpt()
    blocks: Any = model.get_submodule("blocks")
    blocks[0] = torch.compile(blocks[0], backend="eager")
    assert "blocks.0._orig_mod.mlp.up.weight" in dict(model.named_parameters())
    assert len(telescope.apply(model, transfer_of()).optimizers) == 2


def test_what_does_not_fit_is_said_all_at_once(tmp_path: Path) -> None:
    settings = settings_by_shapes(False, tmp_path)
    before = Net(WIDTH)
    model = Net(WIDTH)
    model.load_state_dict(before.state_dict())
    model.extra = nn.Linear(3, 5)
    model.norm.bias = None  # type: ignore[assignment]
    model.up.bias.requires_grad_(False)
    model.down = nn.Linear(4 * WIDTH, WIDTH + 1)
    with pytest.raises(ModelError) as caught:
        telescope.apply(model, settings)
    one_line(caught.value)
    for part in (
        "do not fit: ",
        "no settings for extra.weight, extra.bias, which the model trains",
        "the model has no norm.bias",
        "down.bias [49], not [48], down.weight [49, 192], not [48, 192]",
        "frozen in the model: up.bias",
        "of width 48",
    ):
        assert part in str(caught.value)
    assert torch.equal(model.embed.weight, before.embed.weight)  # nothing was done


def test_a_model_of_another_width_names_some_and_counts_the_rest() -> None:
    with pytest.raises(
        ModelError, match=r"model: embedding.weight \[256, 64\], not \[256, 48\], blocks"
    ) as e:
        telescope.apply(gpt(64, depth=3), transfer_of())
    assert "no settings for blocks.1." in str(e.value)
    assert "and 2 more, which the model trains" in str(e.value)
    one_line(e.value)


def test_tying_must_agree(tmp_path: Path) -> None:
    untied, tied = settings_by_shapes(False, tmp_path), settings_by_shapes(True, tmp_path)
    with pytest.raises(ModelError, match=r"several names: embed\.weight, head\.weight"):
        telescope.apply(Net(WIDTH, tied=True), untied)
    with pytest.raises(ModelError, match=r"no settings for head\.weight, which"):
        telescope.apply(Net(WIDTH), tied)
    with pytest.raises(RefusedError, match=r"embed\.weight is tied"):
        telescope.apply(Net(WIDTH, tied=True), tied, fold=True)


class Functional(nn.Module):
    """Logits without a layer: no module can be given the multiplier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.linear(self.embed(tokens), self.embed.weight)


def test_a_readout_without_a_layer_is_refused(tmp_path: Path) -> None:
    roles = {"embed.weight": "tied"}
    shapes = Shapes.of(Functional, width=WIDTH, base_width=BASE, roles=roles)
    settings = {"groups": shapes.groups(POINT)}
    with pytest.raises(ModelError, match=r"embed.weight: its logits must be multiplied by 0\.33"):
        telescope.apply(Functional(WIDTH), settings)
    settings["groups"][0]["multiplier"] = 1.0
    assert len(telescope.apply(Functional(WIDTH), settings).optimizers) == 1


@pytest.mark.parametrize(
    ("optimizer", "needs"), [({"ns_dtype": "fp32"}, "fp32"), ({"ns": "polar-express"}, "polar")]
)
def test_what_torch_has_not_is_refused_with_what_is_needed(
    optimizer: dict[str, Any], needs: str
) -> None:
    settings = transfer_of(optimizer=OptimizerConfig(**optimizer))
    with pytest.raises(RefusedError, match=f"no optimizer for hidden: needs a Muon .*{needs}"):
        telescope.apply(gpt(), settings)


BAD: list[tuple[Any, str]] = [
    ({}, "has no groups"),
    ({"groups": None}, "has no groups; .*--shapes"),
    ({"groups": [{"optimizer": "AdamW"}]}, "group 1: is not one of .*role"),
    ({"groups": [3]}, "group 1: is not one of"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_of_something_else(settings: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(settings))
    for given in (settings, tmp_path / "t.json", str(tmp_path / "t.json")):
        with pytest.raises(SpecError, match=message) as caught:
            telescope.apply(nn.Linear(2, 2), given)
        one_line(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer", "SGD", "optimizer 'SGD', must be Muon or AdamW"),
        ("role", "matrix", "'matrix' is not a valid Role"),
        ("init", "random", "'random' is not a valid Start"),
        ("optimizer", "Muon", r"torch.optim.Muon refuses it: .*2D"),
    ],
)
def test_a_wrong_value_in_a_group(key: str, value: Any, message: str) -> None:
    settings = transfer_of().as_dict()
    (group,) = (g for g in settings["groups"] if g["role"] == "finite")
    group[key] = value
    with pytest.raises(TelescopeError, match=message) as caught:
        telescope.apply(gpt(), settings)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "is no JSON"), ("[]", "must be the out")]
)
def test_a_file_that_is_none(text: str | None, message: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "t.json").write_text(text)
    with pytest.raises(SpecError, match=message):
        telescope.apply(nn.Linear(2, 2), tmp_path / "t.json")


def test_a_schedule_that_is_none() -> None:
    settings = transfer_of().as_dict()
    for change in ({"name": "linear"}, {"warmup_step": 3}, {"warmup_steps": None}):
        wrong = {**settings, "schedule": {**settings["schedule"], **change}}
        with pytest.raises(SpecError, match="schedule: is not one of"):
            telescope.apply(gpt(), wrong)


def values_of(parameter: Tensor) -> set[float]:
    return set(parameter.flatten().tolist())


def test_settings_from_before_init_was_a_key() -> None:
    """Vectors stay as built then, but for the biases of layers, as the note says."""
    model = Net(WIDTH)
    shapes = Shapes.of(Net, width=WIDTH, base_width=BASE)
    groups = [{k: v for k, v in g.items() if k != "init"} for g in shapes.groups(POINT)]
    nn.init.constant_(model.norm.weight, 1.5)
    telescope.apply(model, {"groups": groups})
    assert values_of(model.norm.weight) == {1.5}
    assert values_of(model.up.bias) == values_of(model.down.weight) == {0.0}
    assert model.up.weight.std().item() == pytest.approx(WIDTH**-0.5, rel=0.1)


def test_what_is_as_built_is_left_alone() -> None:
    class Gated(Net):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            nn.init.constant_(self.up.bias, -2.0)

    shapes = Shapes.of(Gated, width=WIDTH, base_width=BASE)
    model = Gated(WIDTH)
    telescope.apply(model, {"groups": shapes.groups(POINT)})
    assert values_of(model.up.bias) == {-2.0}


def test_a_run_goes_on_from_its_state() -> None:
    """A third of the steps, a checkpoint through a file's bytes, the rest: as without a stop."""
    tokens = torch.randint(256, (STEPS, 4, 17), generator=torch.Generator().manual_seed(0))

    def steps(model: nn.Module, training: Any, some: range) -> None:
        for step in some:
            logits = model(tokens[step, :, :-1]).flatten(0, 1)
            functional.cross_entropy(logits, tokens[step, :, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            training.step()
            training.zero_grad()

    whole, stopped, resumed = gpt(), gpt(), gpt()
    steps(whole, telescope.apply(whole, transfer_of()), range(STEPS))
    training = telescope.apply(stopped, transfer_of())
    steps(stopped, training, range(7))
    later = telescope.apply(resumed, transfer_of(), seed=9)
    resumed.load_state_dict(stopped.state_dict())
    later.load_state_dict(training.state_dict())
    steps(resumed, later, range(7, STEPS))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_the_schedulers_are_the_trials_schedule(name: Any, warmup: float) -> None:
    """Read off the optimizer step by step; after the last step the rate stays."""
    config = TrainConfig(
        steps=STEPS, batch_size=4, sequence_length=16, schedule=name, warmup=warmup, decay=0.3
    )
    training = telescope.apply(gpt(), transfer_of(schedule=name, warmup=warmup, decay=0.3))
    rates = []
    for _ in range(STEPS + 3):
        rates.append(
            [o.param_groups[0]["lr"] / o.param_groups[0]["initial_lr"] for o in training.optimizers]
        )
        training.step()
    for step, shares in enumerate(rates[:STEPS]):
        assert shares == pytest.approx([schedule(step, config)] * 2)
    assert rates[STEPS:] == [pytest.approx(rates[STEPS - 1])] * 3


def test_there_is_no_other_schedule() -> None:
    with pytest.raises(ValueError, match="no schedule 'step'"):
        share_of_peak(3, name="step", steps=9, warmup_steps=0, final_lr=0.1)


def test_it_is_imported_when_it_is_used() -> None:
    seen = "'torch' in sys.modules"
    code = f"import sys, telescope; print({seen}, telescope.apply and {seen})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
