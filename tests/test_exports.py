"""Every format's export is read back, and says what the groups say.

A reader here knows its trainer's own formula, written down from the trainer's source and not from
the exporter: per parameter it gives the step per unit of the update and the decay per step, or None
where the trainer has no decay. Both must be those of the groups that the transfer gives.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import telescope
from conftest import ROOT, gpt_config, trial_config
from readers import (
    BASE,
    BY_GROUP,
    MEGATRONS,
    READERS,
    ROUNDED,
    SCHEDULES,
    SINGLE,
    STEPS,
    UNIFORM,
    WIDTH,
    SchedulersConfig,
    asked_for,
    assert_exact,
    executed,
    handed_over,
    lines_of,
    model_of,
    off,
    parsed,
    tags,
    torchtitan_modules,
)

import telescope as package
from telescope.answer.finished import Finished
from telescope.errors import RefusedError, SpecError
from telescope.export.formats import FORMATS, NAMES, check_format, export
from telescope.export.handover import Handover
from telescope.records import Point, Trial
from telescope.rules.scaling import Role, Tag
from telescope.rules.schedule import share_of_peak as stated_share
from telescope.train.loop import set_up, take_step, token_loss
from telescope.train.optim import schedule as share_of_peak


def test_every_format_has_a_reader() -> None:
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("rule", ["mup", "moonlight", "standard"])
@pytest.mark.parametrize("format", sorted(SINGLE | BY_GROUP))
def test_what_is_read_back_is_what_the_groups_say(format: str, rule: str) -> None:
    assert_exact(off(handed_over(rule=rule), format, UNIFORM))


@pytest.mark.parametrize("format", sorted(BY_GROUP | {"torchtitan", "maxtext", "levanter"}))
def test_the_papers_decay_is_said_where_each_optimizer_has_its_own(format: str) -> None:
    assert_exact(off(handed_over(rule="paper"), format, UNIFORM))
    ratio = handed_over(rule="mup", adamw_lr_ratio=0.25)
    assert_exact(off(ratio, format, UNIFORM))


@pytest.mark.parametrize("rule", ["mup", "paper"])
@pytest.mark.parametrize("format", sorted(BY_GROUP))
def test_matrices_that_grew_differently_have_settings_of_their_own(format: str, rule: str) -> None:
    handover = handed_over(ROUNDED, rule=rule)
    lrs = {group["lr"] for group in handover.muon}
    assert len(lrs) > 1, "the case is one"
    assert_exact(off(handover, format, ROUNDED))


@pytest.mark.parametrize("format", sorted(SINGLE))
def test_moonlights_matrices_need_no_settings_of_their_own(format: str) -> None:
    assert_exact(off(handed_over(ROUNDED, rule="moonlight"), format, ROUNDED))


@pytest.mark.parametrize("format", sorted(SINGLE))
def test_one_setting_for_matrices_that_grew_differently_is_refused(format: str) -> None:
    with pytest.raises(RefusedError, match=r"one|all parameters at once") as caught:
        export(handed_over(ROUNDED), format)
    message = str(caught.value)
    assert "\n" not in message
    for named in ("hidden 176×64 (layers.0.up.weight and 1 more): step ×", "--approximate"):
        assert named in message


@pytest.mark.parametrize("format", sorted(SINGLE))
def test_the_closest_setting_says_how_far_off_each_group_is(format: str) -> None:
    handover = handed_over(ROUNDED, approximate=True)
    ratios = off(handover, format, ROUNDED)
    steps = {name: step for name, (step, _) in ratios.items() if "norm" not in name}
    assert max(steps.values()) == pytest.approx(1.0, abs=0.08)
    assert min(steps.values()) == pytest.approx(1.0, abs=0.08)
    shown = " ".join(export(handover, format).replace("#", " ").split())
    assert "APPROXIMATE" in shown
    for group in handover.groups:
        step, decay = ratios[group["names"][0]]
        for what, ratio in (("step", step), ("decay", decay)):
            said = re.search(
                rf"{group['role']} {'×'.join(map(str, group['shape']))} \([^)]*\):"
                rf"(?:(?! - ).)*?{what} ×([\d.e-]+)",
                shown,
            )
            if abs(ratio - 1) > 1e-6:
                assert said, (group["role"], group["shape"], what)
                assert float(said[1]) == pytest.approx(ratio, rel=1e-3)
    logs = [math.log(ratios[g["names"][0]][0]) for g in handover.muon]
    assert sum(logs) == pytest.approx(0, abs=1e-9), "their geometric mean"


def test_what_megatron_lacks_is_refused_by_the_names_of_the_norms() -> None:
    """Its norms have the matrices' lr, and all have one decay: AdamW's own lr leaves them out."""
    for handover in (handed_over(adamw_lr_ratio=0.25), handed_over(rule="paper")):
        with pytest.raises(RefusedError, match=r"vector 64 \(layers\.0\.norm\.weight") as caught:
            export(handover, "megatron")
        assert "hidden" not in str(caught.value)
        assert "embedding" not in str(caught.value)
        allowed = replace(handover, approximate=True)
        ratios = off(allowed, "megatron", UNIFORM)
        assert_exact({name: pair for name, pair in ratios.items() if "norm" not in name})
        factor = 4.0 if handover.optimizer.rule == "mup" else 0.25
        assert ratios["layers.0.norm.weight"][0] == pytest.approx(factor)


@pytest.mark.parametrize("format", sorted(READERS))
def test_adamw_alone_is_said_or_refused(format: str) -> None:
    assert_exact(off(handed_over(name="adamw", rule="standard"), format, UNIFORM))
    handover = handed_over(name="adamw", rule="mup")
    if format in BY_GROUP | {"torchtitan"}:
        assert_exact(off(handover, format, UNIFORM))
        return
    with pytest.raises(RefusedError, match=r"hidden 64×64 .*(step|decay) ×"):
        export(handover, format)
    closest = off(replace(handover, approximate=True), format, UNIFORM)
    if format in MEGATRONS:  # its own muP has the hidden lr; the decay is one for all
        assert [step for step, _ in closest.values()] == pytest.approx([1.0] * len(UNIFORM))


def test_deepspeeds_json_alone_is_refused_where_it_cannot_say_it() -> None:
    with pytest.raises(RefusedError, match="residual 64×256") as caught:
        export(handed_over(rule="moonlight"), "deepspeed-json")
    assert "decay ×" in str(caught.value)
    ratios = off(handed_over(approximate=True), "deepspeed-json", UNIFORM)
    up, down = ratios["layers.0.up.weight"][0], ratios["layers.0.down.weight"][0]
    assert up / down == pytest.approx(2), (
        "√max(1, out/in) has half of what the down projection asks"
    )
    renamed = tags(readout="head.weight")
    with pytest.raises(RefusedError, match=r"gives head\.weight to the wrong optimizer"):
        export(handed_over(renamed), "deepspeed-json")
    assert_exact(off(handed_over(renamed), "deepspeed", renamed))


def test_a_folded_readout_is_said_where_groups_have_their_own_settings() -> None:
    folded = handed_over(fold=True)
    for format in sorted(BY_GROUP | {"torchtitan"}):
        assert_exact(off(folded, format, UNIFORM))
        assert "the logits ×" not in export(folded, format)
        assert f"{folded.adamw[-1]['kwargs']['eps']!r}" in export(folded, format)
    for format in sorted(SINGLE - {"torchtitan"}):
        with pytest.raises(RefusedError, match=r"readout 11×64 \(lm_head\.weight\): step ×"):
            export(folded, format)


@pytest.mark.parametrize("format", sorted(SINGLE | BY_GROUP))
def test_no_decay_a_tied_readout_and_the_base_width_itself(format: str) -> None:
    """The corners of the arithmetic: 0 over 0, one table for both ends, r of 1."""
    handover = handed_over(point=Point.of(lr=0.03, weight_decay=0.0))
    asked = asked_for(handover)
    for name, (step, decay) in READERS[format](export(handover, format), UNIFORM).items():
        assert step == pytest.approx(asked[name][0], rel=1e-6)
        assert not decay
    tied = [replace(t, role=Role.TIED) if t.name == "embed.weight" else t for t in UNIFORM[:-1]]
    assert_exact(off(handed_over(tied), format, tied))
    narrow = [replace(tag, shape=tag.base_shape) for tag in UNIFORM]
    handover = handed_over(narrow)
    handover = replace(handover, transfer=replace(handover.transfer, width=BASE))
    assert_exact(off(handover, format, narrow))


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_export_says_where_it_comes_from_and_what_is_left(format: str) -> None:
    handover = handed_over(approximate=True)
    text = export(handover, format)
    if format == "deepspeed-json":
        text = "\n".join(json.loads(text)["telescope"])
    shown = " ".join(text.replace("#", " ").split())
    for part in (
        "rule mup, base width 16, width 64, r 4",
        "lr 0.03, weight_decay 0.2 (base-width units)",
        "factor ",
        "schedule cosine",
        "not expressed here: -",
    ):
        assert part in shown
    starts = "init_std" if format in ("torch", "hf", "deepspeed") else "residual 64×256 zeros"
    assert starts in shown
    if format not in MEGATRONS:
        assert "the logits × 0.25" in shown
    else:
        assert "the logits" not in shown, "its own muP has it"
        assert "decay on norm gains" in shown


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_muon_that_no_trainer_has_is_refused_with_the_reason(format: str) -> None:
    for odd in ({"ns_dtype": "fp32"}, {"ns": "polar-express"}):
        with pytest.raises(RefusedError, match=r"hidden 64×64 .*needs a Muon with"):
            export(handed_over(**odd), format)  # type: ignore[arg-type]
    without = replace(handed_over().transfer, groups=None)
    with pytest.raises(RefusedError, match=r"no groups.*--shapes"):
        export(replace(handed_over(), transfer=without), format)


def test_a_muon_that_some_trainers_lack_is_refused_by_those() -> None:
    for format in ("maxtext", "deepspeed", "deepspeed-json"):
        with pytest.raises(RefusedError, match="nesterov is off") as caught:
            export(handed_over(nesterov=False, ns_steps=6), format)
        assert "5 Newton–Schulz steps, not 6" in str(caught.value), "all reasons at once"
    assert "nesterov: false" in export(handed_over(nesterov=False), "levanter")
    text = export(handed_over(nesterov=False, ns_steps=6), "megatron")
    assert (parsed(text).muon_nesterov, parsed(text).muon_num_ns_steps) == (False, 6)


# Schedules: in the trainer's own words, or as a function, which must be telescope's.


@pytest.mark.parametrize("warmup", [0.0, 0.025, 0.1, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("format", ["torch", "deepspeed"])
def test_the_schedule_of_a_torch_file_is_telescopes(format: str, name: str, warmup: float) -> None:
    train = replace(SCHEDULES[name], warmup=warmup)
    share = executed(export(handed_over(train=train), format))["share_of_peak"]
    for step in range(STEPS):
        assert share(step) == pytest.approx(share_of_peak(step, train), rel=1e-12), step
    if warmup < 1:
        assert share(STEPS) == pytest.approx(share(STEPS - 1)), "schedulers look a step ahead"


def test_the_schedule_in_other_words() -> None:
    words = {name: handed_over(train=train) for name, train in SCHEDULES.items()}
    style = {name: parsed(export(of, "megatron")) for name, of in words.items()}
    assert [style[n].lr_decay_style for n in SCHEDULES] == ["cosine", "constant", "WSD"]
    for name, args in style.items():
        iters = args.train_iters, args.lr_decay_iters, args.lr_warmup_iters
        assert (iters, args.clip_grad) == ((40, 40, 4), 0.0)
        final = {"cosine": 0.2, "constant": 1.0, "wsd": 0.1}[name]
        assert args.min_lr == pytest.approx(final * args.lr)
    assert style["wsd"].lr_wsd_decay_iters == 10
    assert style["wsd"].lr_wsd_decay_style == "linear"

    titan = {
        name: executed(export(of, "torchtitan"), torchtitan_modules())["lr_scheduler"]()
        for name, of in words.items()
    }
    assert titan["cosine"] == SchedulersConfig(
        warmup_steps=4, total_steps=40, decay_type="cosine", min_lr_factor=0.2
    )
    assert titan["wsd"].decay_ratio == 0.25
    assert titan["constant"].min_lr_factor == 1.0

    maxtext = {name: yaml.safe_load(export(of, "maxtext")) for name, of in words.items()}
    assert [maxtext[n]["lr_schedule_type"] for n in SCHEDULES] == ["cosine", "cosine", "wsd"]
    assert maxtext["constant"]["learning_rate_final_fraction"] == 1.0
    assert maxtext["wsd"]["wsd_decay_steps_fraction"] == 0.25
    for keys in maxtext.values():
        assert keys["warmup_steps_fraction"] == 0.1
        assert keys["steps"] == keys["learning_rate_schedule_steps"] == 40

    levanter = {name: yaml.safe_load(export(of, "levanter")) for name, of in words.items()}
    kinds = [levanter[n]["optimizer"]["lr_schedule"] for n in SCHEDULES]
    assert kinds == ["cosine", "constant", "linear"]
    assert levanter["wsd"]["optimizer"]["decay"] == 0.25
    assert levanter["cosine"]["optimizer"]["min_lr_ratio"] == 0.2
    assert all(keys["trainer"] == {"num_train_steps": 40} for keys in levanter.values())

    hf = {name: executed(export(of, "hf"))["ARGUMENTS"] for name, of in words.items()}
    assert hf["cosine"] == {
        "max_steps": 40,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
        "warmup_steps": 4,
        "max_grad_norm": 0.0,
    }
    assert hf["wsd"]["lr_scheduler_kwargs"]["num_decay_steps"] == 10
    assert hf["constant"]["lr_scheduler_type"] == "constant_with_warmup"

    for name, train in SCHEDULES.items():
        text = export(handed_over(train=train, name="adamw", rule="standard"), "deepspeed-json")
        table = json.loads(text)
        if name == "wsd":
            assert "scheduler" not in table
            assert "no scheduler" in "\n".join(table["telescope"])
        else:
            final = 0.2 if name == "cosine" else 1.0
            assert table["scheduler"]["params"]["cos_min_ratio"] == final


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_a_decay_that_would_begin_in_the_warm_up_is_cut_to_what_is_left(
    warmup: float, decay: float
) -> None:
    """The run is the same, step for step; trainers would differ about the longer decay."""
    train = replace(SCHEDULES["wsd"], warmup=warmup, decay=decay)
    handover = handed_over(train=train)
    schedule = handover.transfer.schedule
    assert schedule is not None
    warm, falls = schedule["warmup_steps"], schedule["decay_steps"]
    assert falls == min(round(decay * STEPS), STEPS - warm)
    for step in range(STEPS):
        share = stated_share(step, steps=STEPS, **schedule)
        assert share == pytest.approx(share_of_peak(step, train), rel=1e-12), step
    args = parsed(export(handover, "megatron"))
    assert args.lr_warmup_iters < args.lr_decay_iters, "Megatron asserts it"


@pytest.mark.parametrize(("count", "steps"), [(15, 22), (13, 23), (31, 39), (1, 40), (0, 7)])
def test_a_number_of_steps_is_whole_where_a_trainer_wants_a_share(count: int, steps: int) -> None:
    """Levanter and MaxText take int(share · steps): 15 of 22 steps would be 14."""
    train = replace(SCHEDULES["wsd"], steps=steps, warmup=count / steps, decay=4 / steps)
    handover = handed_over(train=train)
    schedule = {**(handover.transfer.schedule or {}), "warmup_steps": count, "decay_steps": 4}
    handover = replace(
        handover, transfer=replace(handover.transfer, steps=steps, schedule=schedule)
    )
    levanter = yaml.safe_load(export(handover, "levanter"))["optimizer"]
    maxtext = yaml.safe_load(export(handover, "maxtext"))
    for warmup, decay in (
        (levanter["warmup"], levanter["decay"]),
        (maxtext["warmup_steps_fraction"], maxtext["wsd_decay_steps_fraction"]),
    ):
        assert (int(warmup * steps), int(decay * steps)) == (count, 4)
        assert int(steps * warmup) == count


def test_the_hf_trainers_warm_up_starts_where_its_decay_ends_and_that_is_said() -> None:
    """Its warmup_stable_decay starts from min_lr_ratio: with 1 it would have no warm-up at all."""
    wsd = SCHEDULES["wsd"]
    assert "warm-up: the Trainer's is 0.1 of the peak" in export(handed_over(train=wsd), "hf")
    zero = export(handed_over(train=replace(wsd, final_lr=0.0)), "hf")
    assert "of the peak here" not in zero
    flat = executed(export(handed_over(train=replace(wsd, final_lr=1.0)), "hf"))["ARGUMENTS"]
    assert flat["lr_scheduler_type"] == "constant_with_warmup"
    assert "defaults lr falls to 0" in export(handed_over(train=None), "hf")


def test_tables_besides_word_embedding_and_output_are_named_where_names_decide() -> None:
    """Megatron, MaxText and Levanter would give a table of positions to Muon."""
    positions = Tag("positions.weight", Role.EMBEDDING, (8, WIDTH), (8, BASE))
    inputs = Tag("patch.weight", Role.INPUT, (WIDTH, 12), (BASE, 12))
    handover = handed_over([*UNIFORM, positions, inputs], approximate=True)
    for format in ("megatron", "megatron-bridge", "maxtext", "levanter"):
        text = " ".join(export(handover, format).replace("#", " ").split())
        assert "AdamW for positions.weight, patch.weight; see" in text, format
        assert "AdamW for" not in export(handed_over(), format).replace("AdamW for Linears", "")
    adamw = handed_over([*UNIFORM, positions, inputs], name="adamw", approximate=True)
    text = " ".join(export(adamw, "megatron").replace("#", " ").split())
    assert "the lr of positions.weight, patch.weight: Megatron's muP may divide it" in text


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_schedule_of_another_trainer_is_left_to_it(format: str) -> None:
    text = export(handed_over(train=None, approximate=True), format)
    assert "own trainer: lr is its peak" in " ".join(text.replace("#", " ").split())
    for word in ("clip-grad", "warmup_steps:", "max_grad_norm", "lr_decay_style"):
        assert word not in text


# What torch runs of it.


def test_the_torch_file_starts_a_model_and_refuses_another() -> None:
    names = executed(export(handed_over(), "torch"))
    torch.manual_seed(0)
    model = model_of(UNIFORM)
    names["start"](model)
    tensors = dict(model.named_parameters())
    for group in handed_over().groups:
        tensor = tensors[group["names"][0]].detach()
        if group["role"] not in ("vector", "finite"):
            assert float(tensor.std()) == pytest.approx(group["init_std"], rel=0.15)
        else:
            assert float(tensor.abs().sum()) > 0, "as the model has it"
    other = model_of([*UNIFORM, Tag("layers.2.new.weight", Role.VECTOR, (8,), (8,))])
    with pytest.raises(ValueError, match=r"lack: layers\.2\.new\.weight"):
        names["make_optimizers"](other)


def reference() -> dict[str, Any]:
    """The published answer at a width that was never swept, for a run of 20 steps."""
    sweep = package.open(ROOT / "results" / "reference" / "quickstart")
    assert 64 * 3 // 4 not in sweep.spec.ladder.widths
    return {"transfer": sweep.transfer(48, 20), "spec": sweep.spec}


def test_the_torch_file_trains_as_telescope_does(corpus_file: Path) -> None:
    """Twenty steps at a width that was never swept; agreement as a share of the distance moved."""
    given = reference()
    spec, answer = given["spec"], given["transfer"]
    text = export(Handover("quickstart", answer, spec.optimizer, spec.base_width), "torch")
    names = executed(text)
    keywords = {"vocab_size": 256, "depth": 2, "head_dim": 16, "mlp_ratio": 2}
    config = trial_config(corpus_file, model=gpt_config(**keywords), steps=20, sequence_length=32)
    config = replace(config, base_width=spec.base_width)
    trial = Trial(48, answer.point, 0)
    ours, plain = set_up(config, trial), set_up(config, trial)
    before = [p.detach().clone() for p in ours.model.parameters()]
    optimizers = names["make_optimizers"](plain.model)
    schedulers = names["make_schedulers"](optimizers)
    for step in range(20):
        take_step(ours.model, ours.optimizers, ours.batches, ours.train, step, "cpu")
        token_loss(plain.model, *plain.batches.at(step)).backward()  # type: ignore[no-untyped-call]
        for part in (*optimizers, *schedulers):
            part.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    pairs = zip(before, ours.model.parameters(), plain.model.parameters(), strict=True)
    gaps = [float(((p - q).norm() / (p - start).norm()).item()) for start, p, q in pairs]
    assert max(gaps) <= 1e-3


def test_the_optimizer_of_the_hf_factory_steps_as_the_torch_files_do() -> None:
    """A scheduler's lr reaches both parts of it, and a checkpoint brings their state back."""
    first = model_of(UNIFORM)
    second = model_of(UNIFORM)
    second.load_state_dict(first.state_dict())
    plain = executed(export(handed_over(), "torch"))
    whole = executed(export(handed_over(), "hf"))["Factory"]
    optimizers = plain["make_optimizers"](first)
    optimizer = whole()(second)
    lambdas = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.5**s) for o in optimizers]
    of_it = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for part in (*optimizers, *lambdas):
            part.step()
        optimizer.step()
        of_it.step()
        if step == 1:  # go on from a checkpoint
            kept = optimizer.state_dict()
            optimizer = whole()(second)
            optimizer.load_state_dict(kept)
            of_it = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s, last_epoch=1)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


# The command line.

REFERENCE = ROOT / "results" / "reference" / "quickstart"


def test_a_format_that_is_not_there_has_its_nearest_named() -> None:
    for given, nearest in (("megatorn", "megatron"), ("torchtian", "torchtitan"), ("JSON", None)):
        with pytest.raises(SpecError, match=f"got '{given}', must be one of json, torch") as caught:
            check_format(given)
        assert str(caught.value).endswith(f"did you mean {nearest}?") == (nearest is not None)
    for name in NAMES:
        check_format(name)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "megatrn"], 2, "did you mean megatron?"),
        (["--format", "torch", "--json"], 2, "--json: left out beside --format torch"),
        (["--approximate"], 2, "--approximate: is for the --format"),
        (["--format", "deepspeed-json"], 1, "readout.weight to the wrong optimizer"),
        (["--format", "torch", "--out", "no/such/folder/x.py"], 2, "--out no/such/folder/x.py"),
    ],
)
def test_what_cannot_be_done_is_a_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = telescope("transfer", REFERENCE, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_certificate_that_fails_is_said_after_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without a format: the settings are given, and the exit code is 1."""
    real = Finished.transfer

    def failed(self: Finished, **options: Any) -> Any:
        transfer = real(self, **options)
        assert transfer.certificate is not None
        certificate = replace(transfer.certificate, verdict="FAIL", problems=("a reason",))
        return replace(transfer, certificate=certificate)

    monkeypatch.setattr(Finished, "transfer", failed)
    done = telescope("transfer", REFERENCE, "--format", "megatron", cwd=tmp_path)
    assert done.returncode == 1
    assert "certificate FAIL" in done.stdout
    assert "--optimizer muon" in done.stdout
    assert "not to be relied on: a reason" in done.stderr


def test_json_is_what_it_was(tmp_path: Path) -> None:
    plain = telescope("transfer", REFERENCE, "--json", cwd=tmp_path).stdout
    assert telescope("transfer", REFERENCE, "--format", "json", cwd=tmp_path).stdout == plain
    for name, more in (("a", []), ("b", ["--format", "json"])):
        done = telescope("transfer", REFERENCE, *more, "--out", f"{name}.json", cwd=tmp_path)
        assert done.stdout == f"wrote {name}.json\n"
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(plain)


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - {"deepspeed-json"}))
def test_the_published_answer_is_exported(format: str, tmp_path: Path) -> None:
    done = telescope("transfer", REFERENCE, "--format", format, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rule mup, base width 32, width 256, r 8" in done.stdout
    kept = telescope("transfer", REFERENCE, "--format", format, "--out", "x", cwd=tmp_path)
    assert kept.stdout == "wrote x\n"
    assert (tmp_path / "x").read_text(encoding="utf-8") == done.stdout
    longest = max(len(line) for line in done.stdout.splitlines() if "\\." not in line)
    assert longest <= 100


def test_the_torch_file_runs_alone(tmp_path: Path) -> None:
    names = {"__name__": "__main__"}
    text = telescope("transfer", REFERENCE, "--format", "torch", cwd=tmp_path).stdout
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(text, "export.py", "exec"), names)
    assert "residual [256, 512] Muon" in shown.getvalue()


def test_megatrons_silent_defaults_are_written_out() -> None:
    """Momentum 0.9, Nesterov off, scale factor 1, attention 1/d, muP off."""
    rows = set(lines_of(export(handed_over(), "megatron")))
    assert {
        *("--muon-momentum 0.95", "--muon-nesterov", "--muon-scale-mode spectral"),
        *("--muon-num-ns-steps 5", "--muon-coefficient-type quintic", "--use-mup"),
        *("--mup-base-hidden-size 16", "--mup-attn-scale-power 0.5"),
    } <= rows
    assert "--muon-extra-scale-factor 0.1" in rows, "0.2/√4"
    assert "--use-mup" not in set(lines_of(export(handed_over(rule="standard"), "megatron")))
