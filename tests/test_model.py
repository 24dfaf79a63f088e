"""Model files: what is wrong with one is said in a line with its place; ours is causal."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import gpt_config

from telescope.errors import ModelError, SpecError
from telescope.train.config import ModelConfig
from telescope.train.model import (
    build_meta,
    build_model,
    check_keywords,
    checked_logits,
    load_model_file,
)

GOOD = gpt_config()


def model_file(text: str, **kwargs: object) -> ModelConfig:
    return ModelConfig(name="mine.py", text=text, kwargs={"vocab_size": 256, **kwargs})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(:\n", r"^mine.py:1: SyntaxError"),
        ("x = 1\nimport nothing_there\n", r"^mine.py:2: ModuleNotFoundError"),
        ("x = 1\n", r"^mine.py: defines no function build"),
        ("def build(width, *, vocab_size):\n    return 1 / 0\n", r"^mine.py:2: ZeroDivisionError"),
        (
            "def build(width, *, vocab_size):\n    return 3\n",
            r"build returned int, not a torch module",
        ),
    ],
)
def test_a_broken_file_says_where(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_meta(model_file(text), width=32, base_width=16)


def test_a_lazy_layer_is_named_with_its_file() -> None:
    text = (
        "from torch import nn\n"
        "def build(width, *, vocab_size):\n"
        "    return nn.Sequential(nn.Embedding(vocab_size, width), nn.LazyLinear(width))\n"
    )
    with pytest.raises(ModelError, match=r"^mine.py: 1.weight: has no shape before"):
        build_meta(model_file(text), width=32, base_width=16)


def test_keywords_must_fit() -> None:
    with pytest.raises(SpecError, match=r"^model.deep: gpt.py takes no such keyword; .*depth"):
        check_keywords(gpt_config(deep=3))
    with pytest.raises(SpecError, match=r"^model.depth: missing"):
        check_keywords(
            ModelConfig(name="gpt.py", text=GOOD.text, kwargs={"vocab_size": 256, "head_dim": 8})
        )
    check_keywords(GOOD)
    check_keywords(model_file("def build(width, **anything):\n    pass\n", x=1))


def test_the_files_own_errors_are_named() -> None:
    with pytest.raises(ModelError, match=r"gpt.py:\d+: ValueError: width 48 with head_dim 32"):
        build_meta(gpt_config(head_dim=32), width=48, base_width=32)


def test_the_loaded_module_has_its_source_and_hash() -> None:
    module = load_model_file(GOOD)
    assert GOOD.digest in str(module.__file__)
    assert inspect.getsource(module.build).startswith("def build(")


def test_forward_must_give_logits() -> None:
    tagged = build_meta(GOOD, width=32, base_width=16)
    checked_logits(GOOD, tagged.module, sequence_length=16, vocab_size=256)
    with pytest.raises(ModelError, match=r"gave shape \(1, 16, 256\).*\(1, 16, 300\)"):
        checked_logits(GOOD, tagged.module, sequence_length=16, vocab_size=300)


@pytest.mark.parametrize("kwargs", [{}, {"tied": True}, {"heads_per_kv": 2}])
def test_gpt_is_causal(kwargs: dict[str, object]) -> None:
    model = build_model(
        gpt_config(**kwargs),
        width=32,
        base_width=16,
        seed=0,
        optimizer="muon",
        rule="mup",
        device="cpu",
    ).module
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # zero readouts and residual outputs would hide everything
        tokens = torch.randint(256, (2, 12))
        changed = tokens.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % 256
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_gpt_sees_positions() -> None:
    """Without RoPE, attention over equal tokens would be blind to where they stand."""
    model = build_model(
        GOOD, width=32, base_width=16, seed=0, optimizer="muon", rule="mup", device="cpu"
    ).module
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        one = model(torch.tensor([[5, 9, 7, 7]]))[0, -1]
        other = model(torch.tensor([[9, 5, 7, 7]]))[0, -1]
    assert not torch.allclose(one, other)
