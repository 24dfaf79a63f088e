"""FLOP counts against the closed forms of a dense transformer, at 4B parameters as at 40k."""

from __future__ import annotations

import pytest
from conftest import gpt_config

from telescope.config import OptimizerConfig, TrainConfig
from telescope.train.flops import newton_schulz_flops, step_cost

TRAIN = TrainConfig(steps=1, batch_size=4, sequence_length=64)
TOKENS = 4 * 64


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("width", "depth"), [(32, 2), (128, 3)])
def test_a_dense_gpt_by_hand(width: int, depth: int, tied: bool) -> None:
    model = gpt_config(depth=depth, head_dim=16, tied=tied)
    cost = step_cost(model, TRAIN, OptimizerConfig(), width=width, base_width=32)
    per_layer = 4 * width**2 + 3 * 4 * width**2  # q, k, v, o; gate, up, down at ratio 4
    assert cost.parameters == depth * per_layer + 256 * width * (1 if tied else 2)  # no gains
    # 6 per parameter and token; the embedding is a look-up, the readout a product. The input's
    # gradient is needed of every matrix, since the embedding below them learns.
    assert cost.model == 6 * TOKENS * (depth * per_layer + 256 * width)
    assert cost.attention == 12 * TOKENS * 64 * width * depth  # in full, not halved
    squares, rectangles = 4 * 6 * width**3, 3 * 18 * width**3  # 4n²m + 2n³ at m = n and m = 4n
    assert cost.optimizer == 5 * depth * (squares + rectangles)
    assert cost.total == cost.model + cost.attention + cost.optimizer


def test_grouped_queries_cost_less_model_and_the_same_attention() -> None:
    def cost_with(heads_per_kv: int) -> tuple[float, float]:
        model = gpt_config(heads_per_kv=heads_per_kv)
        cost = step_cost(model, TRAIN, OptimizerConfig(), width=64, base_width=32)
        return cost.model, cost.attention

    full, grouped = cost_with(1), cost_with(2)
    assert full[0] - grouped[0] == 6 * TOKENS * 64**2  # half of k and half of v
    assert full[1] == grouped[1]


def test_newton_schulz_counts_its_shares_at_quickstart_size() -> None:
    """SCIENCE's figures for depth 3, 1,024 tokens per step: 47 % and 98 % of forward and backward
    without attention and readout; with them a little less."""
    train = TrainConfig(steps=1, batch_size=16, sequence_length=64)
    for width, share in ((128, 0.46), (256, 0.965)):
        model = gpt_config(depth=3, head_dim=16)
        cost = step_cost(model, train, OptimizerConfig(), width=width, base_width=32)
        assert cost.optimizer / (cost.model + cost.attention) == pytest.approx(share, abs=0.005)


def test_a_stack_costs_its_matrices_and_adamw_nothing() -> None:
    assert newton_schulz_flops((7, 32, 16), 5) == 7 * newton_schulz_flops((16, 32), 5)
    cost = step_cost(gpt_config(), TRAIN, OptimizerConfig(name="adamw"), width=32, base_width=32)
    assert cost.optimizer == 0


def test_four_billion_parameters_take_no_memory() -> None:
    """The published ladder's target: 3.6707 B in its matrices. From arXiv 2505.02222, derived."""
    model = gpt_config(depth=34, head_dim=128, tied=True, heads_per_kv=2, vocab_size=128_256)
    train = TrainConfig(steps=1, batch_size=1, sequence_length=8192)
    cost = step_cost(model, train, OptimizerConfig(), width=2560, base_width=256)
    assert cost.parameters / 1e9 == pytest.approx(3.6707, abs=5e-5)
