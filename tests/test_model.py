"""Model files: what is wrong with one is said in a line with its place; ours is causal."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import gpt_config, one_line

from telescope.config import ModelConfig, OptimizerConfig, TrainConfig
from telescope.errors import ModelError, SpecError
from telescope.train.cost import StepCost
from telescope.train.flops import step_cost
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


TINY = """
import dataclasses, mup, numpy, torch
from torch import nn
from torch.nn import functional as F

@dataclasses.dataclass
class Output:
    logits: torch.Tensor

class Twice(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        return 2 * grad

class Model(nn.Module):
    def __init__(self, width, vocab_size):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(vocab_size, width), nn.Linear(width, width)
        self.readout = mup.MuReadout(width, vocab_size)
        self.register_buffer("table", torch.from_numpy(numpy.zeros((64, width), "float32")))

    def forward(self, tokens):
        x = self.embedding(tokens)
        device = x.device.type
        BODY
        logits = self.readout(x)
        return RESULT

def build(width, *, vocab_size):
    return Model(width, vocab_size)
"""
FEW = TrainConfig(steps=1, batch_size=1, sequence_length=16)


def tiny(body: str = "x = self.hidden(x)", result: str = "logits") -> ModelConfig:
    return model_file(TINY.replace("BODY", body).replace("RESULT", result))


def cost_of(config: ModelConfig) -> StepCost:
    return step_cost(config, FEW, OptimizerConfig(), width=32, base_width=16)


@pytest.mark.parametrize(
    "body",
    [
        "x = self.hidden(x)",
        "with torch.autocast(device, enabled=False): x = self.hidden(x)",
        "with torch.autocast(device_type=device, dtype=torch.bfloat16): x = self.hidden(x)",
        "x = self.hidden(x) if torch.is_autocast_enabled(device) else self.hidden(x)",
        "x = self.hidden(x.to(torch.get_autocast_dtype(device)).float())",
        "with torch.device(x.device): x = self.hidden(x + torch.zeros(32))",
        "x = self.hidden(Twice.apply(x))",
        "x = self.hidden(x + self.table[: x.shape[1]])",
        "assert device in ('cpu', 'cuda'); x = self.hidden(x)",
    ],
)
def test_a_right_model_is_counted_whatever_it_asks_of_its_device(body: str) -> None:
    tokens, width = 16, 32
    assert cost_of(tiny(body)).model == 6 * tokens * (width**2 + 256 * width)


def test_attention_is_counted_alike_on_meta_and_elsewhere() -> None:
    """A CPU's fused attention is none that torch's counter knows."""
    attend = "x = F.scaled_dot_product_attention(*3 * [self.hidden(x)[:, None]])[:, 0]"
    on_meta = cost_of(tiny(attend))
    assert on_meta.attention == 3 * 4 * 16 * 16 * 32
    elsewhere = cost_of(tiny(f"with torch.autocast(device, enabled=False): {attend}"))
    assert elsewhere == on_meta


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('my own words')", r"^mine.py:\d+: ValueError: my own words$"),
        (
            "with torch.autocast(device): x = x @ torch.zeros(3, 3)",
            r"^mine.py:\d+: RuntimeError: .*\[16, 32\] X \[3, 3\]",
        ),
        ("x = x * x.sum().item()", r"^mine.py:\d+: .*without values, so forward must not ask"),
        ("x = x if x.sum() > 0 else -x", r"^mine.py:\d+: .*without values"),
    ],
)
def test_a_real_error_keeps_its_words(
    body: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        cost_of(tiny(body))
    one_line(caught.value)
    assert not caplog.records  # torch logs what fails without values


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("logits, None", r"a tuple \(0: shape \(1, 16, 256\), 1: NoneType\).*return its item 0$"),
        ("[x, logits]", r"a list .*return its item 1$"),
        ("{'logits': logits, 'aux': 0}", r"a dict \('logits': .*return its item 'logits'$"),
        ("Output(logits)", r"a Output, must be .*return its .logits$"),
        ("None", r"forward gave None, must be the logits alone, one tensor"),
        ("logits.flatten(0, 1)", r"forward gave shape \(16, 256\) for tokens \(1, 16\)"),
        ("logits.detach()", r"lead back to no parameter"),
        ("logits.argmax(-1, keepdim=True).expand(-1, -1, 256)", r"torch.int64 that lead back"),
    ],
)
def test_forward_that_gives_no_logits_is_told_what_to_return(result: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        cost_of(tiny(result=result))
    one_line(caught.value)
