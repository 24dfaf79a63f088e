"""Models in Hugging Face's layout: transformers' own logits, tokens and texts against telescope's.

transformers is imported in a process of its own, which has torchvision away: mup brings it along,
and it need not fit this torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import telescope
from conftest import GPT, gpt_config, trial_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import telescope as public
from telescope.config import DataConfig, ModelConfig, OptimizerConfig, TrialConfig
from telescope.data.tokenizer import load_tokenizer, train_bpe
from telescope.errors import RefusedError, ResumeError, SpecError
from telescope.export import hf_model
from telescope.export.hf_model import check_layout, export_model, layout_of
from telescope.records import Point, Trial
from telescope.rules.parametrization import set_multiplier
from telescope.target.export import export_run, find_run
from telescope.target.folder import RunFolder
from telescope.target.record import TargetRun
from telescope.train.model import build_model

SEQUENCE = 48
TEXTS = ["import os\n\ndef f(x):\n    return x", "Āÿ don't <|endoftext|> 日本\t\0", "  a  b ,c", ""]
LOOK = """
import json, sys
sys.modules["torchvision"] = None
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

texts, seen = json.loads(sys.argv[2]), {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    expected = load_file(folder / "expected")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    seen[folder.name] = {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "difference": float((logits - expected["logits"]).abs().max()),
        "loading": {key: sorted(map(str, value)) for key, value in loading.items()},
    }
    if (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text).input_ids for text in texts]
        batch = tokenizer(["import", "a"], padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=4, do_sample=False)
        seen[folder.name] |= {
            "ids": ids,
            "back": [tokenizer.decode(i, skip_special_tokens=True) for i in ids],
            "generated": out[0, -4:].tolist(),
            "ends": [model.generation_config.eos_token_id, tokenizer.eos_token_id],
            "longest": [tokenizer.model_max_length, model.config.max_position_embeddings],
        }
print(json.dumps(seen))
"""


def edited(old: str, new: str) -> str:
    """The bundled model file with another text in it."""
    text = GPT.read_text()
    assert old in text
    return text.replace(old, new)


WITHOUT_QK_NORM = "\n".join(
    line.replace("self.query_norm(q_BHTE)", "q_BHTE").replace("self.key_norm(k_BKTE)", "k_BKTE")
    for line in GPT.read_text().splitlines()
    if "_norm = nn.RMSNorm(head_dim" not in line
)
WITHOUT_GAINS = edited("eps=1e-6)", "eps=1e-6, elementwise_affine=False)")


def built(
    width: int = 32, *, base: int = 16, text: str = "", rule: str = "mup", **kwargs: Any
) -> nn.Module:
    """A model with random parameters, none of them zero or one."""
    config = gpt_config(**{"depth": 2, **kwargs})
    config = ModelConfig(name="gpt.py", text=text or config.text, kwargs=config.kwargs)
    model = build_model(
        config, width=width, base_width=base, seed=0, optimizer="muon", rule=rule, device="cpu"
    ).module
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give all parameters other values; logits are then of size 1, or the multiplier's."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        values = torch.randn(p.shape, generator=generator)
        p.copy_(values / math.sqrt(p.shape[-1]) if p.ndim > 1 else 1 + values / 3)


def plainly_read(width: int) -> nn.Module:
    """The model with a readout of torch's own, whose multiplier is a hook."""
    model = built(width)
    model.readout = nn.Linear(width, 256, bias=False)
    set_multiplier(model.readout, 0.3)
    randomise(model)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    # (model, class, whether embedding and head stay one tensor)
    "base": (lambda: built(16), "Qwen3", False),
    "wide": (lambda: built(48, depth=3), "Qwen3", False),
    "grouped": (lambda: built(64, heads_per_kv=4, head_dim=4), "Qwen3", False),
    "tied": (lambda: built(64, tied=True), "Qwen3", False),
    "tied at base": (lambda: built(16, tied=True, heads_per_kv=2), "Qwen3", True),
    "tied, standard": (lambda: built(64, tied=True, rule="standard"), "Qwen3", True),
    "rope, ratio": (lambda: built(rope_theta=123_456.789, mlp_ratio=3), "Qwen3", False),
    "two numbers a head": (lambda: built(head_dim=2, rope_theta=7.0), "Qwen3", False),
    "one head": (lambda: built(32, base=32, head_dim=32), "Qwen3", False),
    "padded vocabulary": (lambda: built(vocab_size=320), "Qwen3", False),
    "another eps": (lambda: built(text=edited("eps=1e-6", "eps=3e-2")), "Qwen3", False),
    "without gains": (lambda: built(text=WITHOUT_GAINS), "Qwen3", False),
    "without qk-norm": (lambda: built(64, text=WITHOUT_QK_NORM), "Llama", False),
    "the same, tied, grouped": (
        lambda: built(64, text=WITHOUT_QK_NORM, heads_per_kv=2, tied=True),
        "Llama",
        False,
    ),
    "plain readout": (lambda: plainly_read(64), "Qwen3", False),
}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens)
    return logits


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that would put its end of text around every text, as BERT's does."""
    from tokenizers import Tokenizer, processors

    inner = Tokenizer.from_str(train_bpe([GPT.read_text()], 290))
    end = inner.token_to_id("<|endoftext|>")
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    inner.enable_truncation(3)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    path.write_text(inner.to_str())
    return path


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> dict[str, Any]:
    """All that transformers says of the exported models, from one process."""
    folder = tmp_path_factory.mktemp("models")
    tokens = torch.randint(256, (2, SEQUENCE), generator=torch.Generator().manual_seed(2))
    for name, (make, _, _) in MODELS.items():
        tokenizer = {"grouped": "bytes", "padded vocabulary": str(bpe)}.get(name)
        model = make()
        facts = export_model(model, folder / name, sequence_length=SEQUENCE, tokenizer=tokenizer)
        assert facts["difference"] <= 1e-6
        logits = logits_of(model, tokens)
        assert logits.abs().max() > 0.1
        save_file({"tokens": tokens, "logits": logits}, folder / name / "expected")
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", LOOK, str(folder), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_the_models_logits(seen: dict[str, Any], name: str) -> None:
    """Within 1e-5, for logits of size 1. Its weights are all there, and no others."""
    _, layout, is_tied = MODELS[name]
    found = seen[name]
    assert found["difference"] < 1e-5
    assert found["class"] == f"{layout}ForCausalLM"
    assert found["dtype"] == "torch.float32"
    assert found["tied"] is is_tied
    assert not any(found["loading"].values()), found["loading"]


@pytest.mark.parametrize("name", ["grouped", "padded vocabulary"])
def test_transformers_reads_and_writes_the_same_tokens(
    seen: dict[str, Any], name: str, bpe: Path
) -> None:
    own = load_tokenizer("bytes" if name == "grouped" else str(bpe))
    found = seen[name]
    assert found["ids"] == [list(map(int, ids)) for ids in own.encode(TEXTS)]
    special = "" if name == "padded vocabulary" else "<|endoftext|>"
    assert found["back"] == [t.replace("<|endoftext|>", special) for t in TEXTS]
    assert found["ends"] == [255, 255] if name == "grouped" else [own.end[0]] * 2
    assert found["longest"] == [SEQUENCE, SEQUENCE]


def test_transformers_generates_what_the_model_does(seen: dict[str, Any]) -> None:
    """Greedily, with a batch that is padded on the left and a cache of keys and values."""
    model, tokens = MODELS["grouped"][0](), list(b"import")
    for _ in range(4):
        logits = logits_of(model, torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    assert seen["grouped"]["generated"] == tokens[-4:]


def test_the_config_is_read_by_older_versions_of_transformers_too(tmp_path: Path) -> None:
    """Version 4 reads rope_theta, and 10,000 where it is missing."""
    export_model(built(rope_theta=5e5), tmp_path / "out", sequence_length=8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["max_position_embeddings"] == 8


CHANGED = {
    "another attention scale": ("is_causal=True,", "is_causal=True, scale=1 / self.head_dim,"),
    "no rotation": (
        "= rotate(self.query_norm(q_BHTE), cos_TE, sin_TE)",
        "= self.query_norm(q_BHTE)",
    ),
    "interleaved RoPE": (
        "first, second = x_BHTE.chunk(2, dim=-1)",
        "first, second = x_BHTE.unflatten(-1, (-1, 2)).unbind(-1)",
    ),
    "norm after RoPE": (
        "rotate(self.key_norm(k_BKTE), cos_TE, sin_TE)",
        "self.key_norm(rotate(k_BKTE, cos_TE, sin_TE))",
    ),
    "a factor on the embedding": ("self.embedding(tokens_BT)", "1.001 * self.embedding(tokens_BT)"),
    "a factor on a branch": ("return x_BTD + self.mlp(", "return x_BTD + 0.999 * self.mlp("),
    "another activation": ("F.silu(", "F.gelu("),
    "a cap on the logits": (
        "return self.readout(self.norm(x_BTD))",
        "return 30 * torch.tanh(self.readout(self.norm(x_BTD)) / 30)",
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_that_computes_something_else_is_refused(change: str, tmp_path: Path) -> None:
    """At zero output layers, where the logits cannot tell; nothing is written."""
    model = built(text=edited(*CHANGED[change]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readout" in name or "output" in name or "down" in name:
                parameter.zero_()
    with pytest.raises(RefusedError, match="computes something else"):
        export_model(model, tmp_path / "out", sequence_length=SEQUENCE)
    assert list(tmp_path.iterdir()) == []


UNFIT = {
    "blocks.0.attention.query.bias, blocks.1.attention.query.bias": edited(
        "self.query = nn.Linear(width, width, bias=False)", "self.query = nn.Linear(width, width)"
    ),
    "lacks, blocks.0.attention.key_norm": edited(
        "self.key_norm = nn.RMSNorm(head_dim, eps=1e-6)", ""
    ).replace("self.key_norm(k_BKTE)", "k_BKTE"),
    "query_norm (32,), not (8,)": edited(
        "query_norm = nn.RMSNorm(head_dim", "query_norm = nn.RMSNorm(width"
    ),
    "one eps for all norms; got 1e-06 of": edited(
        "self.norm = nn.RMSNorm(width, eps=1e-6)", "self.norm = nn.RMSNorm(width, eps=1e-5)"
    ),
    "embedding, buffer frequencies_F": edited("self.embedding", "self.table").replace(
        "frequencies_F", "angles_F"
    ),
    "no plain RoPE": edited("rope_theta**-exponents_F", "rope_theta**-exponents_F / 2"),
}


@pytest.mark.parametrize("named", UNFIT)
def test_a_model_of_other_parts_is_refused_with_their_names(named: str) -> None:
    with pytest.raises(RefusedError) as refused:
        layout_of(built(text=UNFIT[named]))
    for part in named.split(", "):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_numbers_than_fp32_and_weights_that_are_not_finite_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(RefusedError, match=r"not in fp32 \(call model.float\(\)\)"):
        export_model(built().bfloat16(), tmp_path / "out", sequence_length=8)
    model = built()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.up.weight")[0, 0] = math.nan
    with pytest.raises(RefusedError, match=r"diverged: model.layers.1.mlp.up_proj.weight"):
        export_model(model, tmp_path / "out", sequence_length=8)
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = built().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check_layout(model, 8)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.training
    wrong = built(text=edited(*CHANGED["another activation"])).eval()
    before = {name: p.detach().clone() for name, p in wrong.named_parameters()}
    with pytest.raises(RefusedError):
        check_layout(wrong, 8)
    assert all(torch.equal(before[name], p) for name, p in wrong.named_parameters())
    assert not wrong.training


def test_a_folder_with_files_is_left_alone_and_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes").write_text("mine")
    with pytest.raises(SpecError, match="has files in it"):
        export_model(built(), kept, sequence_length=8)
    with pytest.raises(SpecError, match="is no folder"):
        export_model(built(), kept / "notes", sequence_length=8)

    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(hf_model, "write_json", full)
    with pytest.raises(SpecError, match="new: cannot be written: No space left"):
        export_model(built(), tmp_path / "new", sequence_length=8)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "notes"]


def test_the_function_is_public_and_writes_into_an_empty_folder(tmp_path: Path) -> None:
    facts = public.export_model(built(), tmp_path, sequence_length=8, about={"mine": 1})
    assert facts["multiplier"] == 0.5
    assert facts == json.loads((tmp_path / "telescope.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in built().parameters())
    assert not (tmp_path / "tokenizer.json").exists()
    assert facts["tokenizer"] is None


# A target run's folder.


def write_run(
    folder: Path, config: TrialConfig, width: int, steps: tuple[int, ...]
) -> dict[int, nn.Module]:
    """Write a run's folder with a checkpoint per step, and return their models."""
    trial = Trial(width, Point.of(lr=0.1, weight_decay=0.1), 0)
    RunFolder(folder).write_run(TargetRun(sweep="mine", trial=trial, config=config).as_dict())
    models = {}
    for step in steps:
        models[step] = build_model(
            config.model,
            width=width,
            base_width=config.base_width,
            seed=0,
            optimizer=config.optimizer.name,
            rule=config.optimizer.rule,
            device="cpu",
        ).module
        randomise(models[step], seed=step)
        checkpoint = folder / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        save_file(dict(models[step].named_parameters()), checkpoint / "model.safetensors")
        (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    return models


@pytest.fixture
def results(tmp_path: Path, corpus_file: Path) -> Path:
    """Results with a sweep `mine` and its target run `width-64`, at steps 4 and 6."""
    config = trial_config(corpus_file, model=gpt_config(tied=True))
    write_run(tmp_path / "results" / "mine" / "target" / "width-64", config, 64, (4, 6))
    (tmp_path / "results" / "mine" / "spec.json").write_text('{"comparable_if_equal": {}}')
    return tmp_path / "results"


def test_the_command_writes_the_last_checkpoint_or_the_one_that_is_asked_for(
    results: Path,
) -> None:
    unfinished = results / "mine" / "target" / "width-64" / "checkpoints" / "step-8"
    unfinished.mkdir()  # without state.json
    folder = results.parent
    done = telescope("export-model", "mine", "--to", "hf", "--out", "a/last", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("wrote a/last: Qwen3ForCausalLM, ")
    assert lines[0].endswith(" parameters, step 6 of 6 (prepared)")
    assert max(map(len, lines)) <= 80
    done = telescope("export-model", "mine/width-64", "--out", "b", "--step", "4", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = results / "mine" / "target" / "width-64"
    for out, step in (("a/last", 6), ("b", 4)):
        written = load_file(folder / out / "model.safetensors")
        kept = load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")
        up = "blocks.0.mlp.up.weight"
        assert torch.equal(written["model.layers.0.mlp.up_proj.weight"], kept[up])
        assert torch.equal(written["lm_head.weight"], kept["embedding.weight"] * 0.25)
        facts = json.loads((folder / out / "telescope.json").read_text())
        assert (facts["sweep"], facts["run"], facts["step"]) == ("mine", "width-64", step)
        assert (folder / out / "tokenizer.json").exists()


def test_the_commands_errors_are_one_line_with_their_exit_code(results: Path) -> None:
    (results.parent / "full").mkdir()
    (results.parent / "full" / "x").write_text("")
    shutil.copytree(results / "mine" / "target" / "width-64", results / "mine" / "target" / "other")
    run = results / "mine" / "target" / "other" / "run.json"
    record = json.loads(run.read_text())
    text = edited("F.silu(", "F.gelu(")
    record["config"]["model"]["text"] = text
    run.write_text(json.dumps(record))
    (results / "bare").mkdir()
    (results / "bare" / "spec.json").write_text("{}")
    for arguments, code, said in (
        (("mine", "--out", "x"), 2, "name one: mine/other, mine/width-64"),
        (("mine/other", "--out", "x"), 1, "computes something else"),
        (("mine/width-64", "--out", "full"), 2, "--out full: has files in it"),
        (("mine/width-64", "--out", "x", "--step", "5"), 2, "must be one of the checkpoints: 4, 6"),
        (("mine/width-64", "--out", "x", "--to", "gguf"), 2, "--to: got 'gguf', must be hf"),
        (("mine/width-64", "--out", "x", "--tokenizer", "no"), 2, "--tokenizer: cannot read no"),
        (("bare", "--out", "x"), 2, "`telescope launch bare` trains one"),
        (("nothing", "--out", "x"), 2, "no target run of that name"),
    ):
        done = telescope("export-model", *arguments, cwd=results.parent)
        assert done.returncode == code, arguments
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (results.parent / "x").exists()


def test_a_damaged_run_says_which_file(tmp_path: Path, corpus_file: Path) -> None:
    folder = tmp_path / "target" / "r"
    write_run(folder, trial_config(corpus_file), 32, (6,))
    run = RunFolder(folder)
    weights = folder / "checkpoints" / "step-6" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ResumeError, match=r"model.safetensors: cannot be read"):
        export_run(run, tmp_path / "out")
    tensors = load_file(write_bytes(weights, whole))
    shape = tensors["norm.weight"].shape
    save_file({**tensors, "norm.weight": torch.ones(3)}, weights)
    with pytest.raises(ResumeError, match=rf"norm.weight: is \(3,\), the model's \({shape[0]},\)"):
        export_run(run, tmp_path / "out")
    save_file({"extra": torch.ones(3), **tensors}, weights)
    with pytest.raises(ResumeError, match="differ in extra"):
        export_run(run, tmp_path / "out")
    record = json.loads((folder / "run.json").read_text())
    del record["config"]["model"]["text"]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ResumeError, match=r"run.json cannot be read"):
        export_run(run, tmp_path / "out")
    del record["config"]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match="a trainer of your own"):
        export_run(run, tmp_path / "out")
    with pytest.raises(SpecError, match="no target run"):
        find_run("r", tmp_path / "results")


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_the_runs_tokenizer_is_the_one_it_was_trained_with(
    tmp_path: Path, corpus_file: Path, bpe: Path
) -> None:
    own = tmp_path / "own.json"
    shutil.copy(bpe, own)
    run = tmp_path / "results" / "mine" / "target" / "r"
    config = trial_config(
        corpus_file, model=gpt_config(vocab_size=290), optimizer=OptimizerConfig()
    )
    data = DataConfig(source=(str(corpus_file),), tokenizer=str(own))
    write_run(run, replace(config, data=data), 32, (6,))
    digest = load_tokenizer(str(own)).digest
    spec = {"comparable_if_equal": {"data.tokenizer (hash)": digest}}
    (tmp_path / "results" / "mine" / "spec.json").write_text(json.dumps(spec))
    facts = export_run(RunFolder(run), tmp_path / "a")
    assert facts["tokenizer"] == digest
    own.unlink()
    with pytest.raises(SpecError, match=r"cannot read .*own.json.*give the run's tokenizer with"):
        export_run(RunFolder(run), tmp_path / "b")
    assert export_run(RunFolder(run), tmp_path / "b", tokenizer=str(bpe))["tokenizer"] == digest
    other = tmp_path / "other.json"
    other.write_text(train_bpe(["abcabc" * 9], 260))
    with pytest.raises(SpecError, match=f"is not the one that the run was trained with.*{digest}"):
        export_run(RunFolder(run), tmp_path / "c", tokenizer=str(other))
    with pytest.raises(SpecError, match="has 290 tokens, the model 256"):
        export_model(built(), tmp_path / "c", sequence_length=8, tokenizer=str(bpe))
