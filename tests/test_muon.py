"""Muon against the SVD, against a plain reference written here, and against torch.optim.Muon."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from telescope.rules.quintics import quintics
from telescope.train import muon
from telescope.train.muon import Muon, orthogonalize

SHAPES = [(16, 16), (32, 8), (8, 32), (96, 96), (80, 160)]  # fp32 batches up to 64, bf16 to 256


def reference_newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """The textbook iteration, in float64, written out."""
    x = matrix.double()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if tall else x  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_the_textbook_iteration(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = orthogonalize(matrix, steps=5, dtype=torch.float32)
    torch.testing.assert_close(got.double(), reference_newton_schulz(matrix), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_vectors_stay_and_values_come_near_one(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    # Singular values from 0.1 to 1: the iteration leaves smaller ones below its band.
    generator = torch.Generator().manual_seed(1)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.1, 1, min(shape))) @ vt
    got = orthogonalize(matrix, steps=5, dtype=dtype).float()
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.6
    assert values.max() < 1.25
    mixed = u.T @ got @ vt.T
    off_diagonal = mixed - torch.diag(torch.diag(mixed))
    assert off_diagonal.abs().max() < (0.03 if dtype is torch.bfloat16 else 1e-4)


def test_polar_express_is_algorithm_1_of_its_paper() -> None:
    """Singular values by scalars alone, in float64: where they end, and the matrix version's."""
    values = np.geomspace(1e-3, 1, 2000)
    ends = {}
    for ns, steps in (("polar-express", 5), ("polar-express", 6), ("jordan", 5)):
        x = values / (1.01 if ns == "polar-express" else 1.0)
        for a, b, c in quintics(ns, steps):
            x = a * x + b * x**3 + c * x**5
        ends[ns, steps] = (x.min(), x.max())
    assert 0.84 < ends["polar-express", 5][0] < ends["polar-express", 5][1] < 1.13
    assert 0.99 < ends["polar-express", 6][0] < ends["polar-express", 6][1] < 1.01
    assert ends["jordan", 5][0] < 0.5  # what Polar Express mends
    # A matrix whose Frobenius norm is its largest singular value has them untouched.
    matrix = torch.diag(torch.tensor([1.0, 1e-3, 0.0, 0.0]))
    got = orthogonalize(matrix, steps=6, dtype=torch.float32, ns="polar-express")
    torch.testing.assert_close(got, torch.diag(torch.tensor([1.0, 1.0, 0, 0])), atol=0.01, rtol=0)


def test_quintics_go_on_with_the_last() -> None:
    assert len(quintics("polar-express", 11)) == 11
    assert quintics("polar-express", 11)[7:] == [(1.875, -1.25, 0.375)] * 4
    first = quintics("polar-express", 1)[0]
    assert first == pytest.approx((8.28721 / 1.01, -23.59589 / 1.01**3, 17.30039 / 1.01**5), 1e-5)


def test_a_batch_is_its_matrices() -> None:
    batch = torch.randn(3, 2, 12, 20, generator=torch.Generator().manual_seed(2))
    got = orthogonalize(batch, steps=5, dtype=torch.float32)
    for i in range(3):
        for j in range(2):
            alone = orthogonalize(batch[i, j], steps=5, dtype=torch.float32)
            torch.testing.assert_close(got[i, j], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("elements", [2**19, 600, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_at_once_are_each_alone(
    monkeypatch: pytest.MonkeyPatch, elements: int, dtype: torch.dtype
) -> None:
    """Tall and wide ones in one batch, stacks, one of its shape, sides too long for a batch."""
    monkeypatch.setattr(muon, "BATCHED_ELEMENTS", elements)
    shapes = [(8, 24), (24, 8), (8, 8), (24, 8), (3, 24, 8), (3, 8, 24), (300, 310), (310, 300)]
    generator = torch.Generator().manual_seed(5)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    many = muon.orthogonalize_all(matrices, steps=5, dtype=dtype, ns="jordan")
    for matrix, got in zip(matrices, many, strict=True):
        alone = orthogonalize(matrix, steps=5, dtype=dtype).float()
        atol = 1e-5 if dtype is torch.float32 else 0.02  # bf16 has 8 bits
        torch.testing.assert_close(got, alone, atol=atol, rtol=0)
        assert got.is_contiguous()


def test_groups_that_share_a_batch_keep_their_settings() -> None:
    """Four groups, of two shapes up to transposition, against torch's Muon."""
    shapes, lrs, decays = (
        [(8, 24), (24, 8), (16, 16), (16, 16)],
        (0.1, 0.02, 0.05, 0.3),
        (0, 2, 1, 3),
    )
    arms: list[torch.optim.Optimizer] = []
    for make_optimizer in (
        lambda groups: Muon(groups, momentum=0.9, nesterov=True, ns_steps=5, ns_dtype="bf16"),
        lambda groups: torch.optim.Muon(groups, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    ):
        generator = torch.Generator().manual_seed(6)
        starts = [[torch.randn(shape, generator=generator) for _ in range(2)] for shape in shapes]
        groups: list[dict[str, Any]] = [
            {"params": [torch.nn.Parameter(s) for s in start], "lr": lr, "weight_decay": decay}
            for start, lr, decay in zip(starts, lrs, decays, strict=True)
        ]
        optimizer = make_optimizer(groups)
        for _ in range(4):
            for group in groups:
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        arms.append(optimizer)
    ours, theirs = ([p for g in arm.param_groups for p in g["params"]] for arm in arms)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=0.01, rtol=0)


def test_trials_stacked_move_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(7)
    how = {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "ns_dtype": "fp32", "ns": "jordan"}
    grads, buffers = ([torch.randn(4, 12, 20, generator=generator)] for _ in range(2))
    alone = [
        muon.muon_updates([grads[0][k]], [buffers[0][k].clone()], **how)[0]  # type: ignore[arg-type]
        for k in range(4)
    ]
    stacked = muon.muon_updates(grads, buffers, **how)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(stacked, torch.stack(alone), atol=1e-5, rtol=0)


def test_a_zero_gradient_gives_a_zero_step() -> None:
    assert not orthogonalize(torch.zeros(8, 8), steps=5, dtype=torch.float32).any()


def make(
    shape: tuple[int, ...], *, nesterov: bool = True, dtype: str = "bf16", copies: int = 2
) -> Muon:
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(copies)]
    group = {"params": params, "lr": 0.03, "weight_decay": 0.2}
    return Muon([group], momentum=0.9, nesterov=nesterov, ns_steps=5, ns_dtype=dtype)


def take_steps(optimizers: list[torch.optim.Optimizer], steps: int = 8) -> None:
    """The same gradients for every optimizer's parameters."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        first = optimizers[0].param_groups[0]["params"]
        grads = [torch.randn(p.shape, generator=generator) for p in first]
        for optimizer in optimizers:
            for p, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_agrees_with_torch(shape: tuple[int, int], nesterov: bool) -> None:
    ours = make(shape, nesterov=nesterov)
    starts = [p.detach().clone() for p in ours.param_groups[0]["params"]]
    copies = [torch.nn.Parameter(p.clone()) for p in starts]
    torchs = torch.optim.Muon(
        copies,
        lr=0.03,
        weight_decay=0.2,
        momentum=0.9,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    take_steps([ours, torchs])
    for start, p, q in zip(starts, ours.param_groups[0]["params"], copies, strict=True):
        # Both round to bf16; batched products may round in another order.
        assert (p - q).norm() < 5e-3 * (q - start).norm()


def test_a_step_is_the_formula() -> None:
    """p(1 − lr·wd) − lr · 0.2 · √max(out, in) · O of the looked-ahead momentum, by hand."""
    optimizer = make((24, 12), dtype="fp32", copies=1)
    (p,) = optimizer.param_groups[0]["params"]
    start, momentum = p.detach().double(), torch.zeros(24, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        grad = torch.randn(24, 12, generator=generator)
        p.grad = grad.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = reference_newton_schulz(0.1 * grad + 0.9 * momentum)
        start = start * (1 - 0.03 * 0.2) - 0.03 * 0.2 * math.sqrt(24) * update
    torch.testing.assert_close(p.double(), start, atol=1e-5, rtol=0)


def test_a_stack_trains_as_its_matrices() -> None:
    stack, alone = make((5, 8, 16), dtype="fp32", copies=1), make((8, 16), dtype="fp32", copies=5)
    with torch.no_grad():
        for i, p in enumerate(alone.param_groups[0]["params"]):
            p.copy_(stack.param_groups[0]["params"][0][i])
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        grad = torch.randn(5, 8, 16, generator=generator)
        stack.param_groups[0]["params"][0].grad = grad
        for i, p in enumerate(alone.param_groups[0]["params"]):
            p.grad = grad[i].clone()
        stack.step()
        alone.step()
    for i, p in enumerate(alone.param_groups[0]["params"]):
        torch.testing.assert_close(stack.param_groups[0]["params"][0][i], p, atol=1e-6, rtol=0)


def test_a_parameter_without_a_gradient_stays() -> None:
    optimizer = make((8, 8))
    with_grad, without = optimizer.param_groups[0]["params"]
    before = without.detach().clone()
    with_grad.grad = torch.ones(8, 8)
    optimizer.step()
    assert torch.equal(without, before)
    assert not torch.equal(with_grad, before)
