"""torch: a Python file with the groups, the optimizers and the scheduler."""

from __future__ import annotations

from telescope.export import python_source as source
from telescope.export.handover import Handover, comment, head, logits_by_hand, without_schedule

WRITTEN_FOR = "torch 2.9 and later (torch.optim.Muon), read in 2.13"
EXACTLY = "lr of torch's match_rms_adamw, 0.2·√max(out,in), and weight_decay are each group's own"

OPTIMIZERS = '''\
def make_optimizers(model):
    """One optimizer per class; lr is the schedule's peak."""
    tensors = claim(model)
    by_class = {}
    for group in GROUPS:
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], **group["kwargs"]}
        settings["params"] = [tensors[name] for name in group["names"]]
        by_class.setdefault(group["optimizer"], []).append(settings)
    return [getattr(torch.optim, name)(groups) for name, groups in by_class.items()]
'''

SCHEDULERS = '''\
def make_schedulers(optimizers):
    """One scheduler per optimizer; call `step` of each after every optimizer step."""
    return [torch.optim.lr_scheduler.LambdaLR(o, share_of_peak) for o in optimizers]
'''

MAIN = """\
if __name__ == "__main__":  # a look at the settings, without your model
    for group in GROUPS:
        print(group["role"], group["shape"], group["optimizer"], group["lr"], group["weight_decay"])
"""


def torch_file(handover: Handover) -> str:
    """Write a module that takes the user's model and gives optimizers and schedulers."""
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor=f"none: {EXACTLY}",
        schedule=described_schedule(handover),
        not_expressed=[
            *logits_by_hand(handover),
            "clipping; the sweep's trials had none",
            "the loop; after start(model): make_optimizers, make_schedulers, and step all of them",
        ],
    )
    schedule = source.share_of_peak(handover.transfer.schedule, handover.transfer.steps)
    parts = [
        comment(lines) + source.imports(schedule),
        f"STEPS = {handover.transfer.steps}\n" + source.groups_literal(handover),
        *(source.CLAIM, source.START, OPTIMIZERS, schedule, SCHEDULERS, MAIN),
    ]
    return "\n\n".join(parts)


def described_schedule(handover: Handover) -> str:
    """The schedule as `share_of_peak` of an export has it."""
    schedule = handover.transfer.schedule
    if schedule is None:
        return without_schedule()
    decay = f", {schedule['decay_steps']} steps of decay" if "decay_steps" in schedule else ""
    return (
        f"{schedule['name']}, {schedule['warmup_steps']} of {handover.transfer.steps} steps of "
        f"warm-up{decay}, final lr {schedule['final_lr']:g} of the peak: share_of_peak has it"
    )
