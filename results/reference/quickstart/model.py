"""A small GPT in muP: pre-norm RMSNorm, RoPE, QK-norm, gated MLP, optional grouped queries.

Readable alone: plain PyTorch and mup. The program calls `build` at several widths, finds each
parameter's role from what grows, and initialises by role, so no initialisation stands here.
The last Linear of a residual branch says `residual_output = True` and starts at zero.

Shapes: B batch, T tokens, D width, H query heads, K key-value heads, E head_dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from mup import MuReadout, MuSharedReadout
from torch import Tensor, nn


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding: turn each pair (i, i + E/2) by its position's angle."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE


class Attention(nn.Module):
    """Causal self-attention with QK-norm; the scale 1/sqrt(E) is right because E is fixed."""

    def __init__(self, width: int, head_dim: int, heads_per_kv: int) -> None:
        """Make the four projections; keys and values have `heads_per_kv` times fewer heads."""
        super().__init__()
        self.head_dim = head_dim
        kv_width = width // heads_per_kv
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_width, bias=False)
        self.value = nn.Linear(width, kv_width, bias=False)
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.output = nn.Linear(width, width, bias=False)
        self.output.residual_output = True

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Attend to the past: (B, T, D) to (B, T, D)."""
        q_BHTE, k_BKTE, v_BKTE = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q_BHTE = rotate(self.query_norm(q_BHTE), cos_TE, sin_TE)
        k_BKTE = rotate(self.key_norm(k_BKTE), cos_TE, sin_TE)
        grouped = q_BHTE.shape[1] != k_BKTE.shape[1]
        mixed_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=grouped
        )
        return self.output(mixed_BHTE.transpose(1, 2).flatten(-2))


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward layer."""

    def __init__(self, width: int, mlp_ratio: int) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate = nn.Linear(width, mlp_ratio * width, bias=False)
        self.up = nn.Linear(width, mlp_ratio * width, bias=False)
        self.down = nn.Linear(mlp_ratio * width, width, bias=False)
        self.down.residual_output = True

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and on a residual branch."""

    def __init__(self, width: int, head_dim: int, heads_per_kv: int, mlp_ratio: int) -> None:
        """Make one layer."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, head_dim, heads_per_kv)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = GatedMLP(width, mlp_ratio)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    """Tokens to next-token logits."""

    frequencies_F: Tensor

    def __init__(
        self,
        width: int,
        *,
        vocab_size: int,
        depth: int,
        head_dim: int,
        heads_per_kv: int,
        mlp_ratio: int,
        tied: bool,
        rope_theta: float,
    ) -> None:
        """Make the whole model; `tied` shares the embedding with the readout."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(width, head_dim, heads_per_kv, mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.readout = (
            MuSharedReadout(self.embedding.weight, bias=False)
            if tied
            else MuReadout(width, vocab_size, bias=False)
        )
        exponents_F = torch.arange(0, head_dim, 2) / head_dim
        self.register_buffer("frequencies_F", rope_theta**-exponents_F, persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        angles_TE = torch.outer(positions_T, self.frequencies_F).repeat(1, 2)
        cos_TE, sin_TE = angles_TE.cos(), angles_TE.sin()
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TE, sin_TE)
        return self.readout(self.norm(x_BTD))


def build(
    width: int,
    *,
    vocab_size: int,
    depth: int,
    head_dim: int,
    heads_per_kv: int = 1,
    mlp_ratio: int = 4,
    tied: bool = False,
    rope_theta: float = 10_000.0,
) -> nn.Module:
    """Make the model at one width; depth and head_dim are the same at every width.

    Raises:
        ValueError: head_dim is odd, or the heads cannot be divided as asked.
    """
    heads, rest = divmod(width, head_dim)
    if head_dim % 2 or rest or heads % heads_per_kv:
        raise ValueError(
            f"width {width} with head_dim {head_dim} and heads_per_kv {heads_per_kv}: head_dim "
            "must be even and divide the width, heads_per_kv must divide the number of heads"
        )
    return GPT(
        width,
        vocab_size=vocab_size,
        depth=depth,
        head_dim=head_dim,
        heads_per_kv=heads_per_kv,
        mlp_ratio=mlp_ratio,
        tied=tied,
        rope_theta=rope_theta,
    )
