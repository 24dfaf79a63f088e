"""A readout without its multiplier, with folded settings, trains as the one that has it.

By training both, plain torch in float64: the arithmetic differs by the multiplier alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from telescope import Shapes
from telescope.errors import RefusedError, SpecError
from telescope.rules.scaling import Role, Tag

WIDTH, BASE, VOCABULARY, STEPS = 32, 8, 11, 12
POINT = {"lr": 0.03, "weight_decay": 0.4, "init_scale": 0.7}
TAGS = (
    Tag("embed", Role.EMBEDDING, (VOCABULARY, WIDTH), (VOCABULARY, BASE)),
    Tag("hidden", Role.HIDDEN, (WIDTH, WIDTH), (BASE, BASE)),
    Tag("readout", Role.READOUT, (VOCABULARY, WIDTH), (VOCABULARY, BASE)),
)
SHAPES = Shapes(WIDTH, BASE, {tag.name: tag for tag in TAGS})
ADAMW = {"name": "adamw", "eps": 1e-3}
"""With an eps of the size of the gradients, so that a wrong one shows."""


class Net(nn.Module):
    def __init__(self, multiplier: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.hidden, self.readout = (
            nn.Parameter(0.3 * torch.randn(tag.shape, generator=generator, dtype=torch.float64))
            for tag in TAGS
        )
        self.multiplier = multiplier

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(self.embed[tokens], self.hidden))
        return nn.functional.linear(hidden, self.readout) * self.multiplier


def logits_after(net: Net, groups: tuple[dict[str, Any], ...]) -> Tensor:
    """Train as a reader of the groups would; returns the logits of all steps."""
    parameters = dict(net.named_parameters())
    settings = [
        {
            "params": [parameters[name] for name in group["names"]],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            **group["kwargs"],
        }
        for group in groups
    ]
    optimizer = torch.optim.AdamW(settings)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (16, 2), generator=generator)
        logits = net(tokens[:, 0])
        seen.append(logits.detach())
        nn.functional.cross_entropy(logits, tokens[:, 1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(seen)


def with_and_without(
    change: Callable[[dict[str, Any]], None] = lambda group: None,
) -> tuple[Tensor, Tensor]:
    """Logits with the multiplier, and of folded settings without it."""
    plain = SHAPES.groups(POINT, optimizer=ADAMW)
    folded = SHAPES.groups(POINT, optimizer=ADAMW, fold_readout=True)
    before, after = Net(plain[-1]["multiplier"]), Net(folded[-1]["multiplier"])
    with torch.no_grad():
        after.readout.mul_(plain[-1]["multiplier"])
    change(folded[-1])
    return logits_after(before, plain), logits_after(after, folded)


def test_folded_settings_train_alike() -> None:
    before, after = with_and_without()
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    assert (before[-1] - before[0]).abs().max() > 0.1  # it did move


@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps"])
def test_each_of_the_settings_is_needed(key: str) -> None:
    plain = SHAPES.groups(POINT, optimizer=ADAMW)[-1]

    def leave_unfolded(group: dict[str, Any]) -> None:
        if key == "eps":
            group["kwargs"] = {**group["kwargs"], "eps": plain["kwargs"]["eps"]}
        else:
            group[key] = plain[key]

    before, after = with_and_without(leave_unfolded)
    assert (after - before).abs().max() > 1e-4


def test_by_hand_at_r_4() -> None:
    """Settings of AdamW with lr 0.03 and decay 0.4, the multiplier 1/4."""
    plain, folded = (
        SHAPES.groups(POINT, optimizer=ADAMW, fold_readout=fold)[-1] for fold in (False, True)
    )
    assert (plain["multiplier"], plain["lr"], plain["weight_decay"]) == (0.25, 0.03, 0.4)
    assert folded["multiplier"] == 1
    assert folded["lr"] == pytest.approx(0.0075)
    assert folded["weight_decay"] == pytest.approx(1.6)
    assert folded["kwargs"]["eps"] == pytest.approx(4e-3)
    assert "folded" in folded["note"]
    assert "folded" not in plain["note"]


def test_under_muon_only_the_readout_changes() -> None:
    plain, folded = (SHAPES.groups(POINT, fold_readout=fold) for fold in (False, True))
    assert plain[:2] == folded[:2]
    assert plain[2] != folded[2]


def test_a_rule_without_a_multiplier_has_nothing_to_fold() -> None:
    standard = {"name": "adamw", "rule": "standard"}
    plain, folded = (
        SHAPES.groups(POINT, optimizer=standard, fold_readout=fold) for fold in (False, True)
    )
    assert plain == folded


def test_a_tied_readout_is_refused_in_words() -> None:
    tied = Shapes(WIDTH, BASE, {"embed": Tag("embed", Role.TIED, (11, WIDTH), (11, BASE))})
    with pytest.raises(RefusedError, match=r"embed is tied: .* multiply the logits by 0\.25"):
        tied.groups(POINT, fold_readout=True)
    at_base = Shapes(BASE, BASE, {"embed": Tag("embed", Role.TIED, (11, BASE), (11, BASE))})
    assert at_base.groups(POINT, fold_readout=True)[0]["multiplier"] == 1


def test_groups_without_lr_are_refused() -> None:
    with pytest.raises(SpecError, match="lr is missing; got weight_decay"):
        SHAPES.groups(weight_decay=0.1)
    with pytest.raises(SpecError, match=r"optimizer\.rul: unknown key; allowed: name, rule"):
        SHAPES.groups(POINT, optimizer={"rul": "mup"})
