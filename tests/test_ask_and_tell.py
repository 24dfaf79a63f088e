"""Ask and tell for loops of other people's: the page's own lines, any axes, costs, budget."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from blocks import blocks_of
from conftest import one_line

from telescope import Ladder, Spec
from telescope.errors import RefusedError, TrialError


def test_the_pages_lines_find_the_optimum() -> None:
    """The loss of docs/own-loop.md is least at lr 0.06, whatever the width."""
    block = next(block for block in blocks_of("docs/own-loop.md") if block.language == "python")
    names: dict[str, Any] = {}
    exec(block.code, names)
    assert all(result.trial.point["dropout"] == 0.1 for result in names["ladder"].results)
    answer = names["answer"]
    assert answer.lr == pytest.approx(0.06, rel=0.1)
    assert answer.certificate.intervals["lr"] is not None
    assert any("telescope does not see it" in line for line in answer.certificate.assumptions)
    assert names["again"].choices == names["ladder"].choices


def spec(**tables: Any) -> Spec:
    return Spec.from_dict(
        {
            "name": "mine",
            "ladder": {"widths": [16, 32]},
            "target": {"width": 64},
            "axes": {"alpha": {"low": 0.1, "high": 10.0, "points": 5}},
            **tables,
        }
    )


def test_no_axis_need_be_called_lr() -> None:
    ladder = Ladder(spec())
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(trial, loss=1 + 0.1 * math.log2(trial.point["alpha"]) ** 2)
    answer = ladder.transfer(steps=100)
    assert answer.point["alpha"] == pytest.approx(1, rel=0.1)
    assert answer.as_dict()["lr"] is None
    assert answer.as_dict()["weight_decay"] is None
    assert answer.certificate is not None
    assert answer.certificate.verdict == "WARN"
    assert any("optimizer.rule is not given" in line for line in answer.certificate.problems)


def test_divergences_and_failures_are_told_apart() -> None:
    ladder = Ladder(spec(ladder={"widths": [16], "policy": "paper"}))
    for trial in ladder.ask():
        if trial.point["alpha"] > 3:
            ladder.tell(trial, status="diverged", reason="NaN at step 3")
        else:
            ladder.tell(trial, loss=1 + abs(math.log2(trial.point["alpha"])))
    assert ladder.choices[0].counts == {"complete": 3, "diverged": 2}
    failing = Ladder(spec(ladder={"widths": [16], "policy": "paper"}))
    for trial in failing.ask():
        failing.tell(trial, status="failed", reason="no disk")
    assert "failed" in str(failing.stuck)


@pytest.mark.parametrize(
    ("told", "status", "loss", "reason"),
    [
        ({"loss": 2}, "complete", 2.0, ""),
        ({"loss": np.float32(2)}, "complete", 2.0, ""),
        ({"loss": np.array([2.0])}, "complete", 2.0, ""),
        ({"loss": torch.tensor(2.0, requires_grad=True)}, "complete", 2.0, ""),
        ({"loss": Decimal("2.0")}, "complete", 2.0, ""),
        ({"loss": math.nan}, "diverged", None, "loss nan"),
        ({"loss": -math.inf}, "diverged", None, "loss -inf"),
        ({"loss": 10**400}, "diverged", None, "loss inf"),
        ({"loss": torch.tensor(math.nan)}, "diverged", None, "loss nan"),
        ({"loss": math.nan, "reason": "at step 3"}, "diverged", None, "at step 3"),
        ({"loss": math.nan, "status": "diverged"}, "diverged", None, "loss nan"),
        ({"loss": math.nan, "status": "complete"}, "diverged", None, "loss nan"),
        ({"loss": math.nan, "status": "failed"}, "failed", None, "loss nan"),
        ({"status": "failed", "reason": "no disk"}, "failed", None, "no disk"),
    ],
)
def test_what_may_be_told(told: Any, status: str, loss: float | None, reason: str) -> None:
    ladder = Ladder(spec())
    ladder.tell(ladder.ask()[0], **told)
    (result,) = ladder.results
    assert (result.status, result.loss, result.reason) == (status, loss, reason)
    assert result.loss is None or type(result.loss) is float


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "got no loss; give loss=, or status='diverged' or 'failed'"),
        ({"status": "complete"}, "got no loss; give loss="),
        ({"loss": "1.9"}, r"loss: got '1\.9' \(str\), must be a number"),
        ({"loss": "nan"}, r"loss: got 'nan' \(str\), must be a number"),
        ({"loss": True}, r"loss: got True \(bool\)"),
        ({"loss": np.bool_(True)}, r"loss: got .*True_?\)? \(bool"),
        ({"loss": [1.9]}, r"loss: got \[1\.9\] \(list\)"),
        ({"loss": torch.ones(2)}, r"\(Tensor\), must be a number"),
        ({"loss": 1j}, r"\(complex\), must be a number"),
        ({"loss": 2.0, "status": "diverged"}, r"got loss 2\.0 and status 'diverged'; give one"),
        ({"status": "crashed"}, "status: got 'crashed', must be 'complete', 'diverged', 'failed'"),
        ({"status": ""}, "status: got '', must be"),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_trial_stays_open(told: Any, message: str) -> None:
    ladder = Ladder(spec())
    trial = ladder.ask()[0]
    with pytest.raises(TrialError, match=message) as caught:
        ladder.tell(trial, **told)
    one_line(caught.value)
    assert trial in ladder.ask()


def test_a_budget_below_the_least_is_refused() -> None:
    cost = {"parameters": {"16": 1.0, "32": 4.0, "64": 16.0}}
    with pytest.raises(RefusedError, match=r"mine: the sweep would cost at least .* target runs"):
        Ladder(spec(cost=cost, budget={"max_over_target": 0.1}))
    with pytest.raises(RefusedError, match=r"would fit: .*without \[cost\] a run costs its width²"):
        Ladder(spec(budget={"max_over_target": 0.1}))


@pytest.mark.parametrize(
    "given",
    [{"cost": {"parameters": {"16": 1.0, "32": 4.0, "64": 16.0}}}, {}],
    ids=["cost", "width²"],
)
def test_a_budget_is_never_passed(given: dict[str, Any]) -> None:
    cost = {"16": 1.0, "32": 4.0}
    dear = Ladder(spec(**given, budget={"max_over_target": 2.0}))
    spent = 0.0
    while trials := dear.ask():
        for trial in trials:
            spent += cost[str(trial.width)]
            dear.tell(trial, loss=1 + 0.3 * math.sin(50 * trial.point["alpha"]))
    assert spent <= 2.0 * 16
