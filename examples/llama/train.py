"""A small Llama of Hugging Face transformers, trained with the settings that a width rule gives.

    python train.py --width 64 --lr 0.03 --weight-decay 0.1 --seed 0      a trial of the sweep
    python train.py --settings transfer.json                              the run that it was for
    python train.py --write-shapes shapes.json                            what `transfer` needs

The model is the library's own, from its configuration, with no weights from anywhere; nothing in it
knows of muP. The rule is in two lines: `Shapes.of` says what each parameter is, `groups` what to
train it with at this width.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from pathlib import Path

import torch

# transformers imports torchvision where it finds it; a language model has no use for it, and the
# one that comes along with mup need not fit this torch.
sys.modules["torchvision"] = None
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from telescope import Shapes  # noqa: E402
from telescope.transfer.shapes import write_shapes  # noqa: E402

BASE_WIDTH = 32
WIDTHS = (32, 64, 128)
STEPS, BATCH, SEQUENCE = 60, 8, 64


def build(width: int) -> LlamaForCausalLM:
    """A Llama whose heads keep their size: more of them in a wider one."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            head_dim=16,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def shapes_at(width: int) -> Shapes:
    """Return each parameter's role and shape at a width."""
    return Shapes.of(build, width=width, base_width=BASE_WIDTH)


def initialise(model: torch.nn.Module, groups: list[dict]) -> None:
    """Start every parameter as its group says; gains and biases as the library does."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group in groups:
            if group["role"] in ("vector", "finite"):
                continue
            for name in group["names"]:
                parameters[name].normal_(0.0, 1.0).mul_(group["init_std"])


def make_optimizers(model: torch.nn.Module, groups: list[dict]) -> list[torch.optim.Optimizer]:
    """Plain torch optimizers, one per group."""
    parameters = dict(model.named_parameters())
    return [
        getattr(torch.optim, group["optimizer"])(
            [parameters[name] for name in group["names"]],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            **group["kwargs"],
        )
        for group in groups
    ]


def read_bytes() -> tuple[torch.Tensor, torch.Tensor]:
    """Python's own standard library as bytes: what is trained on, and what is measured on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[:-200_000], tokens[-200_000:]


def batch_of(tokens: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences from random places."""
    starts = torch.randint(len(tokens) - SEQUENCE, (size,), generator=generator)
    return torch.stack([tokens[start : start + SEQUENCE] for start in starts.tolist()])


def train(width: int, groups: list[dict], seed: int) -> float:
    """Train, and return the loss on bytes that were not trained on, in nats."""
    torch.manual_seed(seed)
    model = build(width)
    initialise(model, groups)
    optimizers = make_optimizers(model, groups)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    training, held_out = read_bytes()
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        batch = batch_of(training, BATCH, generator)
        model(input_ids=batch, labels=batch).loss.backward()
        share = min(1.0, (step + 1) / 8) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / STEPS)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
    batch = batch_of(held_out, 128, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=batch, labels=batch).loss.item()


def main() -> None:
    """Train once, and print the result as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--write-shapes", type=Path)
    arguments = parser.parse_args()
    if arguments.write_shapes:
        write_shapes(arguments.write_shapes, [shapes_at(width) for width in WIDTHS])
        return
    if arguments.settings:
        settings = json.loads(arguments.settings.read_text())
        width, groups = settings["width"], settings["groups"]
    else:
        width = arguments.width
        groups = shapes_at(width).groups(
            lr=arguments.lr, weight_decay=arguments.weight_decay, fold_readout=True
        )
    loss = train(width, groups, arguments.seed)
    print(json.dumps({"loss": loss} if math.isfinite(loss) else {"status": "diverged"}))


if __name__ == "__main__":
    main()
