"""Shapes of Hugging Face transformers' models, from their own configurations, no role by hand.

Roles, layouts and starts are compared with what is known of the architectures, and with the same
models built on the CPU. The library is imported in a process of its own: it needs torchvision away,
which mup brings along. Needs transformers, which is of the test extra.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

from telescope.rules.scaling import Role

LOOK = """
import json, sys
sys.modules["torchvision"] = None
import torch, transformers
from torch import nn
from telescope import Shapes

SIZES = dict(vocab_size=96, num_hidden_layers=2, max_position_embeddings=32)
SIZES |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

def family(config, model, tied):
    def build(width):
        heads = dict(num_attention_heads=width // 16, num_key_value_heads=width // 32, head_dim=16)
        sizes = dict(hidden_size=width, intermediate_size=2 * width, tie_word_embeddings=tied)
        made = getattr(transformers, config)(**SIZES, **heads, **sizes)
        return getattr(transformers, model)(made)
    return build

def gpt2(width):
    sizes = dict(n_embd=width, n_head=width // 16, n_layer=1, n_positions=32, vocab_size=96)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    )

class Mine(transformers.LlamaForCausalLM):
    pass

def mine(width):
    plain = family("LlamaConfig", "LlamaForCausalLM", False)(width)
    return nn.ModuleDict({"inner": Mine(plain.config)})

builds = {"gpt2": gpt2, "mine": mine}
for name, (config, model) in json.loads(sys.argv[1]).items():
    for tied in (False, True):
        builds[f"{name} {tied}"] = family(config, model, tied)
seen = {}
for name, build in builds.items():
    shapes = Shapes.of(build, width=64, base_width=32)
    values = dict(build(64).named_parameters())
    seen[name] = {
        "roles": {n: tag.role for n, tag in shapes.tags.items()},
        "logical": {n: tag.shape for n, tag in shapes.tags.items()},
        "stored": {n: tag.stored_shape for n, tag in shapes.tags.items()},
        "starts": {n: tag.start for n, tag in shapes.tags.items() if len(tag.shape) < 2},
        "groups": shapes.groups(lr=0.05, weight_decay=0.3),
        "true shapes": {n: tuple(v.shape) for n, v in values.items()},
        "true values": {n: v.unique().tolist() for n, v in values.items() if v.ndim < 2},
    }
print(json.dumps(seen))
"""
BLOCK = {
    **{f"self_attn.{part}_proj": "hidden" for part in "qkv"},
    **{"self_attn.o_proj": "residual", "mlp.down_proj": "residual"},
    **{"mlp.gate_proj": "hidden", "mlp.up_proj": "hidden"},
    **{"input_layernorm": "vector", "post_attention_layernorm": "vector"},
}
QK_NORM = {"self_attn.q_norm": "finite", "self_attn.k_norm": "finite"}
ENDS_NORMED = {
    **{"self_attn.o_proj": "hidden", "mlp.down_proj": "hidden"},
    **{"pre_feedforward_layernorm": "vector", "post_feedforward_layernorm": "vector"},
}
FAMILIES: dict[str, tuple[str, str, dict[str, str]]] = {
    # family: configuration, model, what its block has beside a Llama's
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", QK_NORM),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", ENDS_NORMED),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**QK_NORM, **ENDS_NORMED}),
}


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, Any]]:
    """Return the Shapes of every family, and the models themselves."""
    pytest.importorskip("transformers", reason="of the test extra")
    named = json.dumps({name: family[:2] for name, family in FAMILIES.items()})
    done = subprocess.run(
        [sys.executable, "-c", LOOK, named], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return data


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_needs_no_roles(
    seen: dict[str, dict[str, Any]], family: str, tied: bool
) -> None:
    block = {**BLOCK, **FAMILIES[family][2]}
    expected = {
        "model.embed_tokens.weight": "tied" if tied else "embedding",
        **{f"model.layers.{i}.{n}.weight": role for i in (0, 1) for n, role in block.items()},
        "model.norm.weight": "vector",
    }
    if family == "qwen2":
        biases = {f"self_attn.{part}_proj.bias": "vector" for part in "qkv"}
        expected |= {f"model.layers.{i}.{n}": role for i in (0, 1) for n, role in biases.items()}
    if not tied:
        expected["lm_head.weight"] = "readout"
    assert seen[f"{family} {tied}"]["roles"] == expected


def test_shapes_and_starts_are_those_of_the_models(seen: dict[str, dict[str, Any]]) -> None:
    for name, found in seen.items():
        assert found["stored"] == found["true shapes"], name
        numbers = {n: {"zeros": 0, "ones": 1}[start] for n, start in found["starts"].items()}
        assert {n: [number] for n, number in numbers.items()} == found["true values"], name
    gains = {name: set(found["starts"].values()) for name, found in seen.items()}
    assert gains["gemma3 True"] == {"zeros"}  # it multiplies by one plus the gain
    assert gains["llama True"] == {"ones"}
    assert gains["gpt2"] == {"zeros", "ones"}


def test_gpt2_keeps_its_matrices_transposed(seen: dict[str, dict[str, Any]]) -> None:
    found, block = seen["gpt2"], "transformer.h.0"
    matrices = {n for n, shape in found["stored"].items() if len(shape) == 2}
    assert {n: (found["roles"][n], found["logical"][n]) for n in matrices} == {
        "transformer.wte.weight": (Role.TIED, [96, 64]),
        "transformer.wpe.weight": (Role.EMBEDDING, [32, 64]),
        f"{block}.attn.c_attn.weight": (Role.HIDDEN, [192, 64]),
        f"{block}.attn.c_proj.weight": (Role.RESIDUAL, [64, 64]),
        f"{block}.mlp.c_fc.weight": (Role.HIDDEN, [256, 64]),
        f"{block}.mlp.c_proj.weight": (Role.RESIDUAL, [64, 256]),
    }
    (up,) = [g for g in found["groups"] if g["names"] == [f"{block}.mlp.c_fc.weight"]]
    assert (up["shape"], up["init_std"], up["init"]) == ([64, 256], 1 / 8, "normal")
    assert "transposed" in up["note"]


def test_a_class_that_is_made_from_the_librarys(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["mine"]["roles"]["inner.model.layers.0.mlp.down_proj.weight"] == "residual"
