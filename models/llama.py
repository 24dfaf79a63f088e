"""The Llama architecture in muP: pre-norm RMSNorm, RoPE, gated MLP. No QK-norm, no biases.

Readable alone: plain PyTorch and mup, like gpt.py. The feed-forward layer is as wide as in Llama's
code: `mlp_ratio` times the width, rounded up to a multiple. The last Linear of a residual branch
says `residual_output = True` and starts at zero.

Shapes: B batch, T tokens, D width, H heads, E head_dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from mup import MuReadout
from torch import Tensor, nn


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding: turn each pair (i, i + E/2) by its position's angle."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE


class Attention(nn.Module):
    """Causal self-attention; the scale 1/sqrt(E) is right because E is fixed."""

    def __init__(self, width: int, head_dim: int) -> None:
        """Make the four projections."""
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.output.residual_output = True

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Attend to the past: (B, T, D) to (B, T, D)."""
        q_BHTE, k_BHTE, v_BHTE = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q_BHTE, k_BHTE = rotate(q_BHTE, cos_TE, sin_TE), rotate(k_BHTE, cos_TE, sin_TE)
        mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
        return self.output(mixed_BHTE.transpose(1, 2).flatten(-2))


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.down.residual_output = True

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and on a residual branch."""

    def __init__(self, width: int, head_dim: int, hidden: int) -> None:
        """Make one layer."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, head_dim)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp = GatedMLP(width, hidden)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Llama(nn.Module):
    """Tokens to next-token logits."""

    frequencies_F: Tensor

    def __init__(
        self,
        width: int,
        *,
        vocab_size: int,
        depth: int,
        head_dim: int,
        hidden: int,
        rope_theta: float,
    ) -> None:
        """Make the whole model."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, head_dim, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.readout = MuReadout(width, vocab_size, bias=False)
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
    mlp_ratio: float = 8 / 3,
    multiple_of: int = 256,
    rope_theta: float = 10_000.0,
) -> nn.Module:
    """Make the model at one width.

    Args:
        width: a multiple of head_dim, at every width.
        vocab_size: number of tokens.
        depth: number of layers.
        head_dim: of every head, even and the same at every width.
        mlp_ratio: width of the feed-forward layer over that of the model, before rounding.
        multiple_of: the feed-forward layer is rounded up to a multiple of this. Small next to the
            base width's, or the layer does not grow as the width does.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: head_dim is odd or does not divide the width, or a number is not positive.
    """
    if head_dim % 2 or width % head_dim:
        raise ValueError(f"head_dim {head_dim}: must be even and divide the width, {width}")
    if mlp_ratio <= 0 or multiple_of < 1:
        raise ValueError(f"mlp_ratio {mlp_ratio} and multiple_of {multiple_of} must be positive")
    least = int(mlp_ratio * width)
    return Llama(
        width,
        vocab_size=vocab_size,
        depth=depth,
        head_dim=head_dim,
        hidden=-(-least // multiple_of) * multiple_of,
        rope_theta=rope_theta,
    )
