"""The tables by which two optimizers are compared: what each has of its own in a spec.

Everything else of two specs made here is the same, so that they differ in nothing but the
optimizer.
"""

from __future__ import annotations

from typing import Any, Literal

from telescope.config import ADAMW_RULES
from telescope.spec.tables import AxisTable, Table


class OptimizerTable(Table):
    """A table such as ``[frontier.adamw]``: keys of [optimizer], and ranges of axes.

    A key left out is as in [optimizer]; an axis left out as in [axes].
    """

    rule: Literal["mup", "paper", "moonlight", "standard"] | None = None
    adamw_lr_ratio: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    ns: Literal["jordan", "polar-express"] | None = None
    ns_steps: int | None = None
    ns_dtype: Literal["bf16", "fp32"] | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    axes: dict[str, AxisTable] | None = None


class ComparedTable(Table):
    """The keys that ``[frontier]`` and ``[scaling]`` share: the optimizers, and what each has."""

    optimizers: tuple[Literal["muon", "adamw"], ...] = ("muon", "adamw")
    muon: OptimizerTable | None = None
    """Settings of Muon alone: keys of [optimizer], and axes."""
    adamw: OptimizerTable | None = None
    """Settings of AdamW alone: keys of [optimizer], and axes."""

    def of(self, optimizer: str) -> OptimizerTable | None:
        """Return the settings of one optimizer alone."""
        return self.muon if optimizer == "muon" else self.adamw


def optimizer_changes(name: str, rule: str, own: OptimizerTable | None) -> dict[str, Any]:
    """Return the changes, for `variants.replaced`, that give a spec one of the optimizers.

    Args:
        name: "muon" or "adamw".
        rule: the spec's width rule, which AdamW has only where it knows it: at base width all
            rules are the same.
        own: the settings of this optimizer alone.
    """
    table: dict[str, Any] = {"name": name}
    if name == "adamw" and rule not in ADAMW_RULES:
        table["rule"] = ADAMW_RULES[0]
    given = own.model_dump(mode="json", exclude_none=True) if own else {}
    axes = given.pop("axes", {})
    return {"optimizer": table | given, "axes": axes}
