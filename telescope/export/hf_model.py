"""A trained model as a folder that Hugging Face transformers loads: weights, config, tokenizer.

A model with the modules of `models/gpt.py` has the layout of Qwen3, or without QK-norm that of
Llama. Modules are matched by their names. A name does not say what the model's forward computes, so
the layout's formula is evaluated here too and must give the same logits as the model.

Shapes: T tokens, D width, E head_dim.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telescope.data.tokenizer import PortableTokenizer, portable_tokenizer
from telescope.errors import RefusedError, SpecError
from telescope.files import UNFINISHED, write_atomic, write_json
from telescope.rules.parametrization import multiplier_of

READOUT = "readout"
OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", READOUT: "lm_head"}
"""Module of `models/gpt.py` outside its blocks → the layout's."""
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""The same in a block: ``blocks.0.mlp.up`` is ``model.layers.0.mlp.up_proj``."""
QK_NORM = ("attention.query_norm", "attention.key_norm")
FREQUENCIES = "frequencies_F"
"""The buffer of RoPE's frequencies, E/2 numbers."""
AGREEMENT = 1e-5
"""Largest difference between equal logits, as a share of the largest one; fp32 rounds."""
CHECKED = 64
"""Most tokens that logits are compared on."""
MOST_NAMES = 6
"""Names that a message lists of each fault."""


@dataclass(frozen=True)
class Layout:
    """A model in a layout of transformers."""

    config: dict[str, Any]
    """Content of config.json, but for what depends on the tokenizer and the training."""
    tensors: dict[str, Tensor]
    """Name in the layout → the model's tensor; a head that was multiplied is a new one."""


def export_model(
    model: nn.Module,
    out: str | Path,
    *,
    sequence_length: int,
    tokenizer: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as a folder for transformers, in fp32.

    Args:
        model: with the modules of `models/gpt.py`, by name, and in fp32.
        out: the folder; it must not exist, or be empty. It appears when it is whole.
        sequence_length: number of tokens of a training sequence.
        tokenizer: the training data's, "bytes" or a file of Hugging Face tokenizers; left out, the
            folder has none.
        about: JSON-able facts to be kept in the folder's ``telescope.json``.

    Returns:
        The content of ``telescope.json``: `about`; "layout", "tokenizer" (its hash), "parameters",
        "multiplier" (of the logits, folded into the head) and "difference" (the largest between the
        logits of model and layout, as a share of the largest logit).

    Raises:
        RefusedError: transformers has no layout for the model, or a weight is not finite.
        ModelError: mup's readout has no base shapes.
        SpecError: the folder is not empty or cannot be written, or the tokenizer cannot be read or
            has more tokens than the model.
    """
    out = Path(out)
    check_free(out)
    portable = portable_tokenizer(tokenizer) if tokenizer else None
    difference = check_layout(model, min(sequence_length, CHECKED))
    layout = layout_of(model)
    _check_finite(layout)
    vocabulary = layout.config["vocab_size"]
    if portable and portable.vocabulary > vocabulary:
        raise SpecError(
            f"--tokenizer: {tokenizer} has {portable.vocabulary} tokens, the model {vocabulary}; "
            "give the one that the model was trained with"
        )
    facts = {
        **(about or {}),
        "layout": layout.config["architectures"][0],
        "tokenizer": portable.digest if portable else None,
        "parameters": sum(tensor.numel() for tensor in layout.tensors.values()),
        "multiplier": multiplier_of(model.get_submodule(READOUT)),
        "difference": difference,
    }
    with _whole(out) as folder:
        _write_weights(folder / "model.safetensors", layout)
        _write_settings(folder, layout, sequence_length, portable)
        write_json(folder / "telescope.json", facts)
    return facts


def check_free(out: Path) -> None:
    """Check that a folder to be written is not there, or empty.

    Raises:
        SpecError: it is a file, or has files.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise SpecError(f"--out {out}: has files in it; give another folder")
    elif os.path.lexists(out):
        raise SpecError(f"--out {out}: is no folder; give another path")


def layout_of(model: nn.Module) -> Layout:
    """Return a model in the layout of Qwen3, or without QK-norm in that of Llama.

    The tensors are the model's own, without copies.

    Raises:
        RefusedError: it has modules that the layout lacks, lacks some, or has other shapes.
    """
    modules = dict(model.named_modules())
    names = _names(model, modules)
    weights = {name: _weight(modules[name]) for name in names}
    others = [name for name, weight in weights.items() if weight.dtype != torch.float32]
    _refuse({"not in fp32 (call model.float()): {}": others})
    config = _config(model, weights)
    shapes = _shapes(config)
    odd = [
        f"{name} {tuple(weight.shape)}, not {shape}"
        for name, weight in weights.items()
        if tuple(weight.shape) != (shape := shapes[names[name].rpartition(".")[2]])
    ]
    _refuse({f"of another shape than in {config['architectures'][0]}: {{}}": odd})
    if (multiplier := multiplier_of(modules[READOUT])) != 1:
        weights[READOUT] = weights[READOUT] * multiplier
    if config["tie_word_embeddings"]:
        del weights[READOUT]
    return Layout(config, {f"{names[name]}.weight": weights[name] for name in weights})


def _names(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map the model's modules with weights to the layout's.

    Raises:
        RefusedError: the layout lacks some of the parameters, or the model some of the modules.
    """
    numbers = [m[1] for name in modules if (m := re.fullmatch(r"blocks\.(\d+)", name))]
    has_qk_norm = any(f"blocks.{n}.{norm}" in modules for n in numbers for norm in QK_NORM)
    names = OUTSIDE | {
        f"blocks.{number}.{name}": f"model.layers.{number}.{BLOCK[name]}"
        for number in numbers or ["0"]
        for name in BLOCK
        if has_qk_norm or name not in QK_NORM
    }
    known = {f"{name}.weight" for name in names}
    missing = [name for name in names if name not in modules]
    if FREQUENCIES not in dict(model.named_buffers()):
        missing.append(f"buffer {FREQUENCIES}")
    _refuse(
        {
            "the layouts of transformers, Qwen3's and Llama's, have nothing for {}": [
                name for name, _ in model.named_parameters() if name not in known
            ],
            "the model lacks, of the modules in models/gpt.py, {}": missing,
        }
    )
    return names


def _weight(module: nn.Module) -> Tensor:
    """Return a module's weight; a norm's without one is ones."""
    weight = getattr(module, "weight", None)
    if weight is None and isinstance(module, nn.RMSNorm):
        return torch.ones(module.normalized_shape)
    return weight.detach() if isinstance(weight, Tensor) else torch.empty(0)


def _config(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config that fits the weights.

    Raises:
        RefusedError: the norms' eps differ, or the frequencies are not those of plain RoPE.
    """
    head_dim, theta = _rope(model.get_buffer(FREQUENCIES))
    (vocabulary, width), inside = weights["embedding"].shape, "blocks.0."
    heads, kv_heads = (
        weights[f"{inside}attention.{name}"].shape[0] // head_dim for name in ("query", "key")
    )
    is_qwen = inside + QK_NORM[0] in weights
    is_tied = model.get_submodule(READOUT).weight is model.get_submodule("embedding").weight
    return {
        "architectures": ["Qwen3ForCausalLM" if is_qwen else "LlamaForCausalLM"],
        "model_type": "qwen3" if is_qwen else "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights[f"{inside}mlp.gate"].shape[0],
        "num_hidden_layers": sum(name.endswith("mlp.gate") for name in weights),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _eps(model),
        # transformers 4 reads rope_theta, 5 rope_parameters.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({} if is_qwen else {"mlp_bias": False}),
        "tie_word_embeddings": is_tied and multiplier_of(model.get_submodule(READOUT)) == 1,
        "dtype": "float32",
    }


def _rope(frequencies: Tensor) -> tuple[int, float]:
    """Return head_dim and theta of RoPE's frequencies: the number of the fewest digits that fits.

    >>> _rope(10_000.0 ** (-torch.arange(0, 16, 2) / 16))
    (16, 10000.0)

    Raises:
        RefusedError: they are not theta^(-2i/E).
    """
    numbers, head_dim = frequencies.double().cpu(), 2 * len(frequencies)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    # A single frequency is 1 for any theta.
    near = float(numbers[-1]) ** (-1 / float(exponents[-1])) if head_dim > 2 else 10_000.0
    for digits in range(1, 13):
        theta = float(f"{near:.{digits}g}")
        if theta > 0 and torch.allclose(theta**-exponents, numbers, rtol=4e-7, atol=0):
            return head_dim, theta
    raise RefusedError(
        f"export-model: {FREQUENCIES}: is no plain RoPE, theta^(-2i/head_dim) for i = 0, 1, …: "
        f"transformers' scaled kinds are not written; got {_listed(map(str, numbers.tolist()))}"
    )


def _eps(model: nn.Module) -> float:
    """Return the eps that all norms share.

    Raises:
        RefusedError: they differ.
    """
    found: dict[float, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
            found.setdefault(eps, name)
    if len(found) > 1:
        given = ", ".join(f"{eps:g} of {name}" for eps, name in found.items())
        raise RefusedError(f"export-model: the layout has one eps for all norms; got {given}")
    return next(iter(found), 1e-6)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Map the last part of a module's name in the layout to its weight's shape."""
    width, head_dim, inner = (config[k] for k in ("hidden_size", "head_dim", "intermediate_size"))
    queries, keys = (config[f"num_{k}_heads"] * head_dim for k in ("attention", "key_value"))
    table = config["vocab_size"], width
    norms = ("norm", "input_layernorm", "post_attention_layernorm")
    return {
        **{"embed_tokens": table, "lm_head": table},
        **dict.fromkeys(norms, (width,)),
        **{"q_norm": (head_dim,), "k_norm": (head_dim,)},
        **{"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width)},
        **{"o_proj": (width, queries), "down_proj": (width, inner)},
        **{"gate_proj": (inner, width), "up_proj": (inner, width)},
    }


def logits_of(layout: Layout, tokens_T: Tensor) -> Tensor:
    """Evaluate a layout's formula, as transformers does: logits (T, vocabulary)."""
    config, tensors, device = layout.config, layout.tensors, tokens_T.device
    head_dim, eps = config["head_dim"], config["rms_norm_eps"]
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    positions_T = torch.arange(len(tokens_T), device=device)
    angles_TE = torch.outer(positions_T, config["rope_theta"] ** -exponents).repeat(1, 2)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight = tensors.get(f"{name}.weight")
        return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)

    def heads(x_TD: Tensor, name: str) -> Tensor:
        return linear(x_TD, name).reshape(len(x_TD), -1, head_dim).transpose(0, 1)

    def rotated(x_HTE: Tensor) -> Tensor:
        first, second = x_HTE.chunk(2, dim=-1)
        return x_HTE * angles_TE.cos() + torch.cat((-second, first), dim=-1) * angles_TE.sin()

    x_TD = F.embedding(tokens_T, tensors["model.embed_tokens.weight"])
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        a_TD, attention = norm(x_TD, f"{layer}.input_layernorm"), f"{layer}.self_attn"
        q_HTE = rotated(norm(heads(a_TD, f"{attention}.q_proj"), f"{attention}.q_norm"))
        k_KTE = rotated(norm(heads(a_TD, f"{attention}.k_proj"), f"{attention}.k_norm"))
        v_KTE = heads(a_TD, f"{attention}.v_proj")
        mixed_HTE = F.scaled_dot_product_attention(
            q_HTE[None], k_KTE[None], v_KTE[None], is_causal=True, enable_gqa=True
        )[0]
        x_TD = x_TD + linear(mixed_HTE.transpose(0, 1).flatten(-2), f"{attention}.o_proj")
        m_TD = norm(x_TD, f"{layer}.post_attention_layernorm")
        gate, up = (linear(m_TD, f"{layer}.mlp.{name}") for name in ("gate_proj", "up_proj"))
        x_TD = x_TD + linear(F.silu(gate) * up, f"{layer}.mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return linear(norm(x_TD, "model.norm"), head)


@torch.no_grad()
def check_layout(model: nn.Module, length: int) -> float:
    """Compare the model's logits with its layout's, for random parameters.

    Random, because a trained or a new model may have zeros that hide a difference. The model's own
    are restored.

    Args:
        model: the model, in fp32.
        length: number of random tokens.

    Returns:
        The largest difference, as a share of the largest logit.

    Raises:
        RefusedError: the layouts lack something that the model has, or the logits differ.
    """
    kept, was_training = [p.detach().clone() for p in model.parameters()], model.training
    try:
        model.eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.ndim > 1
            parameter.copy_(values / math.sqrt(values.shape[-1]) if is_matrix else values.exp())
        layout = layout_of(model)
        tokens_T = torch.randint(layout.config["vocab_size"], (length,), generator=generator)
        tokens_T = tokens_T.to(next(model.parameters()).device)
        theirs, ours = logits_of(layout, tokens_T), model(tokens_T[None])
    finally:
        for parameter, values in zip(model.parameters(), kept, strict=True):
            parameter.copy_(values)
        model.train(was_training)
    name = layout.config["architectures"][0]
    if not isinstance(ours, Tensor) or ours.shape[1:] != theirs.shape:
        raise RefusedError(f"export-model: the model's forward gives no logits as {name}'s")
    difference = float((ours[0] - theirs).abs().max() / theirs.abs().max())
    if not difference <= AGREEMENT:
        raise RefusedError(
            f"export-model: the model has the modules of {name} and computes something else: with "
            f"random weights the logits differ by {difference:.2g} of the largest. transformers "
            "cannot be told of a changed forward, such as another attention scale or activation, "
            "or factors on embedding and branches"
        )
    return difference


def _check_finite(layout: Layout) -> None:
    """Refuse weights that are not finite."""
    bad = [name for name, tensor in layout.tensors.items() if not tensor.isfinite().all()]
    _refuse({"weights that are not finite, for the training has diverged: {}": bad})


def _refuse(faults: Mapping[str, list[str]]) -> None:
    """Raise one error with all the faults that name something.

    Raises:
        RefusedError: one of them does.
    """
    if said := [text.format(_listed(names)) for text, names in faults.items() if names]:
        raise RefusedError(f"export-model: {'; '.join(said)}")


def _listed(names: Iterable[str]) -> str:
    """List names for a message; of many the first, and the number of the others."""
    first, more = list(names)[:MOST_NAMES], len(list(names)) - MOST_NAMES
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a folder to write in, which is renamed to `out` at the end, or removed on an error."""
    place = out.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{place.name}."
        folder = Path(tempfile.mkdtemp(UNFINISHED, prefix, place.parent))
        try:
            yield folder
            folder.chmod(0o755)
            folder.rename(place)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise SpecError(f"--out {out}: cannot be written: {error.strerror or error}") from error


def _write_weights(path: Path, layout: Layout) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in layout.tensors.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers asks for the metadata
    except Exception as error:  # the library's own class, for a full disk too
        raise OSError(None, str(error)) from error
    path.chmod(0o644)


def _write_settings(
    folder: Path, layout: Layout, sequence_length: int, tokenizer: PortableTokenizer | None
) -> None:
    """Write everything but the weights."""
    end = tokenizer.end if tokenizer else None
    # A text that was trained on stands behind the end of another one, but bytes have no such token.
    kinds = ("eos", "pad") if tokenizer and tokenizer.is_bytes else ("bos", "eos", "pad")
    ids = {f"{kind}_token_id": end[1] for kind in kinds if end}
    config = {**layout.config, "max_position_embeddings": sequence_length, **ids}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    if tokenizer:
        write_atomic(folder / "tokenizer.json", tokenizer.text)
        unknown = {"unk_token": tokenizer.unknown} if tokenizer.unknown else {}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{kind}_token": end[0] for kind in kinds if end},
            **unknown,
            "model_max_length": sequence_length,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": tokenizer.is_bytes,
        }
        write_json(folder / "tokenizer_config.json", settings)
