"""Moonlight in muP: a mixture of experts with multi-head latent attention (arXiv 2502.16982).

Readable alone: plain PyTorch and mup, like gpt.py. With the width grow the heads, the latent that
keys and values come from, and every expert; fixed are the sizes of a head and of the rotary key,
the number of experts and the number that a token goes to. docs/moonlight.md has the rule of every
matrix. Three marks tell the program what it cannot see: `residual_output` (ends a branch, starts at
zero), `latent` (a side of this matrix is fixed on purpose), `active_share` (of a stack, per token).

Shapes: B batch, T tokens, D width, H heads, E size of a head, R of its rotary part, L latent,
X experts, K experts per token, F features of an expert, N = B·T, V vocabulary.
"""

import torch
import torch.nn.functional as F
from mup import MuReadout
from torch import Tensor, nn


def rotate(x_BHTR: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotary position embedding: turn each pair (i, i + R/2) by its position's angle."""
    first, second = x_BHTR.chunk(2, dim=-1)
    return x_BHTR * cos_TR + torch.cat((-second, first), dim=-1) * sin_TR


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from one narrow latent, as in DeepSeek-V2.

    Position is in R further features: of each query, and of one key that all heads share.
    """

    def __init__(self, width: int, head_dim: int, rotary_dim: int, latent_dim: int) -> None:
        """Make the five projections; the scale 1/sqrt(E + R) is right because both are fixed."""
        super().__init__()
        self.parts = [head_dim, rotary_dim]
        heads = width // head_dim
        self.query = nn.Linear(width, heads * (head_dim + rotary_dim), bias=False)
        self.compress = nn.Linear(width, latent_dim, bias=False)
        self.latent_norm = nn.RMSNorm(latent_dim, eps=1e-6)
        self.key_value = nn.Linear(latent_dim, heads * 2 * head_dim, bias=False)
        self.rotary_key = nn.Linear(width, rotary_dim, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.rotary_key.latent = True
        self.output.residual_output = True

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Attend to the past: (B, T, D) to (B, T, D)."""
        head_dim, rotary_dim = self.parts
        q_BHTS = self.query(x_BTD).unflatten(-1, (-1, head_dim + rotary_dim)).transpose(1, 2)
        kv_BTS = self.key_value(self.latent_norm(self.compress(x_BTD)))
        kv_BHTS = kv_BTS.unflatten(-1, (-1, 2 * head_dim)).transpose(1, 2)
        k_BHTE, v_BHTE = kv_BHTS.chunk(2, dim=-1)
        q_BHTE, q_BHTR = q_BHTS.split(self.parts, dim=-1)
        q_BHTR = rotate(q_BHTR, cos_TR, sin_TR)
        k_BHTR = rotate(self.rotary_key(x_BTD)[:, None], cos_TR, sin_TR)
        k_BHTR = k_BHTR.expand(-1, k_BHTE.shape[1], -1, -1)
        mixed_BHTE = F.scaled_dot_product_attention(
            torch.cat((q_BHTE, q_BHTR), dim=-1),
            torch.cat((k_BHTE, k_BHTR), dim=-1),
            v_BHTE,
            is_causal=True,
        )
        return self.output(mixed_BHTE.transpose(1, 2).flatten(-2))


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward layer."""

    def __init__(self, width: int, features: int) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate = nn.Linear(width, features, bias=False)
        self.up = nn.Linear(width, features, bias=False)
        self.down = nn.Linear(features, width, bias=False)
        self.down.residual_output = True

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Stack(nn.Module):
    """One matrix (out, in) per expert, in one parameter; Muon orthogonalises each by itself."""

    def __init__(self, experts: int, out: int, in_: int, active_share: float) -> None:
        """Leave the values to the program, which starts every matrix by its role."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out, in_))
        self.active_share = active_share

    def forward(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Give each expert its rows: the first `sizes[0]` to the first, and so on."""
        parts = zip(torch.split(rows, sizes), self.weight, strict=True)
        return torch.cat([part @ matrix.mT for part, matrix in parts if len(part)])


class RoutedMLP(nn.Module):
    """Experts of which each token uses K, chosen by a router, beside one that all tokens use.

    A bias per expert, which no gradient trains, keeps the load even (arXiv 2408.15664): every
    training step raises it where an expert got less than its share, and lowers it where more. It
    takes part in the choice alone, not in the weights of the sum.
    """

    bias_X: Tensor
    load_X: Tensor

    def __init__(
        self,
        width: int,
        features: int,
        *,
        experts: int,
        top_k: int,
        shared: int,
        gate_scale: float,
        bias_rate: float,
    ) -> None:
        """Make the router, the stacks of experts and the shared one, `shared` times as wide."""
        super().__init__()
        self.top_k, self.gate_scale, self.bias_rate = top_k, gate_scale, bias_rate
        share = top_k / experts
        self.router = nn.Linear(width, experts, bias=False)
        self.router.latent = True
        self.gate = Stack(experts, features, width, share)
        self.up = Stack(experts, features, width, share)
        self.down = Stack(experts, width, features, share)
        self.down.residual_output = True
        self.shared = GatedMLP(width, shared * features)
        self.register_buffer("bias_X", torch.zeros(experts))
        self.register_buffer("load_X", torch.zeros(experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_ND = x_BTD.flatten(0, -2)
        scores_NX = self.router(x_ND).float().sigmoid()
        chosen_NK = (scores_NX.detach() + self.bias_X).topk(self.top_k).indices
        gates_NK = scores_NX.gather(-1, chosen_NK)
        gates_NK = self.gate_scale * gates_NK / gates_NK.sum(-1, keepdim=True)
        load_X = self._count(chosen_NK)
        # Rows in the order of their experts, through the stacks, and back.
        order = chosen_NK.flatten().argsort(stable=True)
        rows = x_ND[order // self.top_k]
        # Without values, on meta, the first expert gets every row: the work to count is the same.
        sizes = load_X.int().tolist() if not load_X.is_meta else [len(order)]
        sizes += [0] * (len(load_X) - len(sizes))
        rows = self.down(F.silu(self.gate(rows, sizes)) * self.up(rows, sizes), sizes)
        out_NKD = rows[order.argsort()].unflatten(0, (-1, self.top_k))
        routed_ND = (out_NKD * gates_NK[..., None]).sum(1).to(x_BTD.dtype)
        return routed_ND.view_as(x_BTD) + self.shared(x_BTD)

    @torch.no_grad()
    def _count(self, chosen_NK: Tensor) -> Tensor:
        """Count the tokens of every expert; in training, move the bias for the next step."""
        ones = torch.ones_like(chosen_NK, dtype=torch.float32).flatten()
        load_X = torch.zeros_like(self.load_X).scatter_add_(0, chosen_NK.flatten(), ones)
        if self.training:
            self.load_X.copy_(load_X)
            self.bias_X += self.bias_rate * (load_X.mean() - load_X).sign()
        return load_X


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and on a residual branch."""

    def __init__(self, width: int, attention: LatentAttention, mlp: nn.Module) -> None:
        """Make one layer of these two."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = mlp

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TR, sin_TR)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Moonlight(nn.Module):
    """Tokens to next-token logits."""

    frequencies_R: Tensor

    def __init__(
        self, width: int, vocab_size: int, blocks: list[Block], rotary_dim: int, rope_theta: float
    ) -> None:
        """Put embedding and readout around the blocks."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.readout = MuReadout(width, vocab_size, bias=False)
        exponents_R = torch.arange(0, rotary_dim, 2) / rotary_dim
        self.register_buffer("frequencies_R", rope_theta**-exponents_R, persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        angles_TR = torch.outer(positions_T, self.frequencies_R).repeat(1, 2)
        cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TR, sin_TR)
        return self.readout(self.norm(x_BTD))

    def diagnostics(self) -> dict[str, float]:
        """Load of the busiest expert over the mean, in the last training step: 1 to X / K."""
        routed = [m.load_X for m in self.modules() if isinstance(m, RoutedMLP)]
        if not routed:
            return {}
        return {"expert_load": max((load.max() / load.mean()).item() for load in routed)}


def build(
    width: int,
    *,
    vocab_size: int,
    depth: int,
    head_dim: int,
    dense_layers: int = 1,
    experts: int = 64,
    top_k: int = 6,
    shared: int = 2,
    mlp_ratio: float = 5.5,
    expert_ratio: float = 0.6875,
    latent_ratio: float = 0.25,
    gate_scale: float = 2.446,
    bias_rate: float = 0.001,
    rope_theta: float = 50_000.0,
) -> nn.Module:
    """Make the model at one width; the defaults are Moonlight's, of width 2048 and head_dim 128.

    Args:
        width: D; the features of a layer are D times `mlp_ratio` or, of an expert, `expert_ratio`.
        vocab_size: V.
        depth: number of layers, of which the first `dense_layers` have no experts.
        head_dim: E, of queries, keys and values; the rotary part has half as many features more.
        dense_layers: number of leading layers with one dense MLP.
        experts: X, in every other layer.
        top_k: K.
        shared: features of the shared expert, in those of one routed expert.
        mlp_ratio: features of a dense layer over the width.
        expert_ratio: features of a routed expert over the width.
        latent_ratio: size of the latent of keys and values over the width.
        gate_scale: factor of the routed experts' sum.
        bias_rate: step of the routing bias.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: head_dim is no multiple of 4 or does not divide the width, or top_k is not
            between 1 and experts.
    """
    if head_dim % 4 or width % head_dim:
        raise ValueError(
            f"width {width} with head_dim {head_dim}: head_dim must be a multiple of 4 and divide "
            "the width"
        )
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k {top_k} of {experts} experts: must be from 1 to all of them")

    def mlp(layer: int) -> nn.Module:
        if layer < dense_layers:
            return GatedMLP(width, round(mlp_ratio * width))
        return RoutedMLP(
            width,
            round(expert_ratio * width),
            experts=experts,
            top_k=top_k,
            shared=shared,
            gate_scale=gate_scale,
            bias_rate=bias_rate,
        )

    rotary_dim, latent_dim = head_dim // 2, round(latent_ratio * width)
    blocks = [
        Block(width, LatentAttention(width, head_dim, rotary_dim, latent_dim), mlp(layer))
        for layer in range(depth)
    ]
    return Moonlight(width, vocab_size, blocks, rotary_dim, rope_theta)
