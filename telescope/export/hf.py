"""Hugging Face Trainer, and what is built on it such as TRL: an optimizer factory."""

from __future__ import annotations

from typing import Any

from telescope.export import python_source as source
from telescope.export.handover import Handover, comment, head, logits_by_hand, without_schedule

WRITTEN_FOR = "transformers 5.24 (Trainer's optimizer_cls_and_kwargs), torch 2.9 and later"

FACTORY = '''\
class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer for the Trainer; its groups are the very groups of the two inside."""

    def __init__(self, groups):
        self.parts = [
            getattr(torch.optim, name)([g for g in groups if g["optimizer"] == name])
            for name in dict.fromkeys(group["optimizer"] for group in groups)
        ]
        super().__init__([g for part in self.parts for g in part.param_groups], {})
        self.share()

    def share(self):
        """Let the parts see the lr that a scheduler sets, and checkpoints see the parts' state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class Factory:
    """Trainer(..., optimizer_cls_and_kwargs=(Factory, {}))"""

    def __call__(self, model, **kwargs):
        tensors = claim(model)
        return MuonAndAdamW(
            [
                {
                    "params": [tensors[name] for name in group["names"]],
                    "optimizer": group["optimizer"],
                    "lr": group["lr"],
                    "weight_decay": group["weight_decay"],
                    **group["kwargs"],
                }
                for group in GROUPS
            ]
        )
'''

MAIN = """\
if __name__ == "__main__":  # a look at the settings, without your model
    for group in GROUPS:
        print(group["role"], group["shape"], group["optimizer"], group["lr"], group["weight_decay"])
"""


def hf(handover: Handover) -> str:
    """Write a module with `Factory` and the keyword arguments of TrainingArguments."""
    words = arguments(handover)
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor="none: lr of torch's match_rms_adamw, 0.2·√max(out,in), is each group's own",
        schedule=f"{words['lr_scheduler_type']}: see ARGUMENTS" if words else without_schedule(),
        not_expressed=[
            *logits_by_hand(handover),
            *_left_open(words),
            "GPT-2's Conv1D weights, which lie (in, out); the names and shapes are those given",
            "the schedule's step: the Trainer's warm-up starts from 0, one step later than here",
            "learning_rate and weight_decay of TrainingArguments: not read, the groups have theirs",
        ],
    )
    parts = [
        comment(lines) + "import torch\n",
        source.groups_literal(handover) + "\n" + ARGUMENTS + source.literal("ARGUMENTS", words),
        *(source.CLAIM, source.START, FACTORY, MAIN),
    ]
    return "\n\n".join(parts)


def _left_open(words: dict[str, Any]) -> list[str]:
    """Lines on the schedule where the Trainer's is not telescope's."""
    if not words:
        return ["schedule and clipping: by the Trainer's own defaults lr falls to 0, and it clips"]
    final = words.get("lr_scheduler_kwargs", {}).get("min_lr_ratio", 0)
    if final == 0:
        return []
    return [f"the start of the warm-up: the Trainer's is {final:g} of the peak here, not 0"]


ARGUMENTS = "# TrainingArguments(output_dir=..., **ARGUMENTS)\n"


def arguments(handover: Handover) -> dict[str, Any]:
    """The schedule and the clipping as TrainingArguments has them."""
    schedule = handover.transfer.schedule
    if schedule is None:
        return {}
    words: dict[str, Any] = {"max_steps": handover.transfer.steps}
    # warmup_stable_decay warms up from final_lr; if that is the peak, not at all.
    match "constant" if schedule["final_lr"] == 1 else schedule["name"]:
        case "constant":
            words["lr_scheduler_type"] = "constant_with_warmup"
        case "cosine":
            words["lr_scheduler_type"] = "cosine_with_min_lr"
            words["lr_scheduler_kwargs"] = {"min_lr_rate": schedule["final_lr"]}
        case _:
            words["lr_scheduler_type"] = "warmup_stable_decay"
            words["lr_scheduler_kwargs"] = {
                "num_decay_steps": schedule["decay_steps"],
                "decay_type": "linear",
                "min_lr_ratio": schedule["final_lr"],
            }
    return {**words, "warmup_steps": schedule["warmup_steps"], "max_grad_norm": 0.0}
