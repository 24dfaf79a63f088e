"""Exports built with the trainers' own packages, those that are installed; `make test-formats`.

Each package is asked for its own groups, schedule and steps. tests/test_exports.py reads the same
exports back with the formulas alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from readers import (
    ROUNDED,
    SCHEDULES,
    STEPS,
    TRAIN,
    UNIFORM,
    asked_for,
    executed,
    handed_over,
    lines_of,
    model_of,
)

from telescope import Shapes, export_model
from telescope.config import ModelConfig
from telescope.export.formats import export
from telescope.export.handover import Handover
from telescope.rules.scaling import Tag
from telescope.train.model import build_model
from telescope.train.optim import schedule as share_of_peak
from telescope.transfer.settings import transfer_settings

pytestmark = pytest.mark.formats


def needed(name: str) -> Any:
    """A package, or the reason why the test is skipped."""
    return pytest.importorskip(name, exc_type=ImportError)


@pytest.mark.parametrize("parameters", [UNIFORM, ROUNDED], ids=["uniform", "rounded"])
def test_optax_steps_as_the_groups_say(parameters: list[Tag]) -> None:
    """Against optax's transformations with torch's scale and each group's own lr and decay."""
    optax, np = needed("optax"), needed("numpy")
    needed("optax.contrib")
    handover = handed_over(parameters)
    names = executed(export(handover, "optax"))
    draw = np.random.default_rng(0)
    params = {t.name: draw.standard_normal(t.shape).astype("float32") for t in parameters}
    optimizer = names["make_optimizer"](params)
    state, ours, theirs = optimizer.init(params), dict(params), dict(params)
    plain = {}
    for group in handover.groups:
        lr = group["lr"]
        rate = lambda count, lr=lr: lr * names["share_of_peak"](count)  # noqa: E731
        decay, kwargs = group["weight_decay"], group["kwargs"]
        if group["optimizer"] == "Muon":
            one = optax.contrib.muon(rate, weight_decay=decay, consistent_rms=0.2, eps=1e-7)
        else:
            one = optax.adamw(rate, *kwargs["betas"], eps=kwargs["eps"], weight_decay=decay)
        for name in group["names"]:
            plain[name] = one, one.init({"x": params[name]})
    for _ in range(3):
        grads = {name: draw.standard_normal(p.shape).astype("float32") for name, p in ours.items()}
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, (one, kept) in plain.items():
            update, kept = one.update({"x": grads[name]}, kept, {"x": theirs[name]})
            plain[name] = one, kept
            theirs[name] = theirs[name] + update["x"]
    for name in params:
        moved = np.linalg.norm(ours[name] - params[name])
        assert np.linalg.norm(ours[name] - theirs[name]) <= 1e-5 * moved, name


@pytest.mark.parametrize("warmup", [0.0, 0.025, 0.1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_optaxs_schedule_is_telescopes(name: str, warmup: float) -> None:
    needed("optax")
    train = dataclasses.replace(SCHEDULES[name], warmup=warmup)
    share = executed(export(handed_over(train=train), "optax"))["share_of_peak"]
    for step in range(STEPS):
        assert float(share(step)) == pytest.approx(share_of_peak(step, train), rel=1e-5), step


def test_torchtitan_builds_the_groups() -> None:
    optimizer = needed("torchtitan.components.optimizer")
    handover = handed_over()
    config = executed(export(handover, "torchtitan"))["optimizers"]("buckets", "shardings")
    model = model_of(UNIFORM)
    groups, _ = optimizer.OptimizersContainer._build_param_groups(model, config.param_groups, {})
    assert groups.keys() == {"DistMuon", "AdamW"}
    assert len(groups["DistMuon"]) == 1
    asked = asked_for(handover)
    seen = set()
    for kind, entries in groups.items():
        for entry in entries:
            for name, tensor in zip(entry["param_names"], entry["params"], strict=True):
                scale = 0.2 * math.sqrt(max(tensor.shape)) if kind == "DistMuon" else 1.0
                got = scale * entry["lr"], entry["lr"] * entry["weight_decay"]
                assert got == pytest.approx(asked[name], rel=1e-6), name
                seen.add(name)
    assert seen == asked.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_torchtitans_adamw_and_schedule_are_telescopes(name: str) -> None:
    """Its decay begins one step later: a share is telescope's of this step or of the one before."""
    needed("torchtitan.components.optimizer")
    train = SCHEDULES[name]
    handover = handed_over(name="adamw", train=train)
    names = executed(export(handover, "torchtitan"))
    model = model_of(UNIFORM)
    optimizers = names["optimizers"]().build(model_parts=[model])
    schedulers = names["lr_scheduler"]().build(optimizers=optimizers, training_steps=STEPS)
    asked = asked_for(handover)
    for step in range(STEPS):
        near = [share_of_peak(max(s, 0), train) for s in (step - 1, step)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                peak = asked[group["param_names"][0]][0]
                assert 0.999 * min(near) <= group["lr"] / peak <= 1.001 * max(near), step
            optimizer.step()
        schedulers.step()


def test_deepspeeds_muon_steps_as_torchs_does() -> None:
    """Newton–Schulz in bf16 differs by its order of operations: 2e-2 of the distance moved."""
    needed("deepspeed.runtime.zero.muon.muon_optimizer")
    handover = handed_over()
    first, second = model_of(UNIFORM), model_of(UNIFORM)
    second.load_state_dict(first.state_dict())
    start = {name: p.detach().clone() for name, p in first.named_parameters()}
    plain = executed(export(handover, "torch"))["make_optimizers"](first)
    theirs = executed(export(handover, "deepspeed"))["make_optimizer"](second)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in (*plain, theirs):
            optimizer.step()
    others = dict(second.named_parameters())
    for name, p in first.named_parameters():
        moved = (p.detach() - start[name]).norm()
        assert (p - others[name]).detach().norm() <= 2e-2 * moved, name


def test_the_trainer_of_transformers_trains_with_the_factory(tmp_path: Path) -> None:
    """Twenty steps of a small Llama beside the torch file's loop, from the same start."""
    transformers, _ = needed("transformers"), needed("accelerate")
    try:
        from transformers import Trainer, TrainingArguments
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers' Trainer does not import here: {error}")

    def build(width: int) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            head_dim=16,
            tie_word_embeddings=False,
        )
        return transformers.LlamaForCausalLM(config)

    shapes = Shapes.of(build, width=64, base_width=32)
    train = dataclasses.replace(TRAIN, steps=20, warmup=0.0, schedule="constant")
    handover = handed_over(list(shapes.tags.values()), train=train, fold=True)
    handover = dataclasses.replace(
        handover,
        base_width=32,
        transfer=transfer_settings(
            handover.transfer.point,
            width=64,
            steps=20,
            train=train,
            optimizer=handover.optimizer,
            tags=shapes.tags,
            fold=True,
        ),
    )
    assert isinstance(handover, Handover)
    names, plain = executed(export(handover, "hf")), executed(export(handover, "torch"))
    torch.manual_seed(0)
    first = build(64)
    names["start"](first)
    second = build(64)
    second.load_state_dict(first.state_dict())
    before = {name: p.detach().clone() for name, p in first.named_parameters()}
    tokens = torch.randint(0, 64, (20, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        train_sampling_strategy="sequential",
        **names["ARGUMENTS"],
    )
    trainer = Trainer(
        model=first,
        args=arguments,
        train_dataset=data,
        optimizer_cls_and_kwargs=(names["Factory"], {}),
    )
    trainer.train()
    optimizers = plain["make_optimizers"](second)
    for row in tokens:
        second(input_ids=row[None], labels=row[None]).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    others = dict(second.named_parameters())
    for name, p in first.named_parameters():
        moved = (p.detach() - before[name]).norm()
        assert moved > 0, name
        assert (p - others[name]).detach().norm() <= 1e-3 * moved, name


def test_megatron_core_has_the_fields_that_are_written() -> None:
    """Of those that version 0.16.1 knows; Nesterov is spelt otherwise there, muP is not there."""
    config = needed("megatron.core.optimizer.optimizer_config").OptimizerConfig
    fields = {field.name for field in dataclasses.fields(config)}
    text = export(handed_over(adamw_lr_ratio=0.5, approximate=True), "megatron-bridge")
    written = {line.partition("=")[0].partition(".") for line in lines_of(text)}
    unknown = {name for section, _, name in written if section == "optimizer"} - fields
    later = {"muon_nesterov", "muon_coefficient_type", "muon_scalar_optimizer"}
    assert unknown <= later


def test_lm_evaluation_harness_has_the_models_likelihoods(tmp_path: Path) -> None:
    """Offline, by the script of examples/evaluate; our own are sums of log-softmax."""
    needed("lm_eval")
    config = ModelConfig(
        name="gpt.py",
        text=(ROOT / "models" / "gpt.py").read_text(),
        kwargs={"vocab_size": 256, "depth": 2, "head_dim": 8, "heads_per_kv": 2},
    )
    model = build_model(
        config, width=32, base_width=16, seed=0, optimizer="muon", rule="mup", device="cpu"
    ).module
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.copy_(values if parameter.ndim > 1 else 1 + values / 3)
    export_model(model, tmp_path / "model", sequence_length=64, tokenizer="bytes")
    script = ROOT / "examples" / "evaluate" / "evaluate.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    own = []
    for sample in found["samples"]:
        text, choice = sample["text"].encode(), sample["choice"].encode()
        tokens = torch.tensor([list(text + choice)])
        with torch.no_grad():
            predicted = model(tokens[:, :-1]).log_softmax(-1)[0, len(text) - 1 :]
        own.append(predicted.gather(1, tokens[0, len(text) :, None]).sum().item())
        assert sample["log_likelihood"] == pytest.approx(own[-1], abs=1e-4)
    assert len(own) == 16
    lines = (script.parent / "python_lines.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    right = [own[2 * n + answer] > own[2 * n + 1 - answer] for n, answer in enumerate(answers)]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
