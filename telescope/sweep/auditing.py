"""An answer audited: the target width trained around it, by the sweep's own trainer.

The trials are kept beside the sweep's, in a folder of their own: as results of the sweep they would
be evidence for its ladder, and change the answer that they audit.
"""

from __future__ import annotations

from collections.abc import Callable

from telescope.answer.derive import chosen_point
from telescope.answer.finished import Finished
from telescope.errors import RefusedError, SpecError
from telescope.ladder.audit import Audit, trials_of_audit, verdict_of
from telescope.report.live import Screen
from telescope.sweep.fixed import train_fixed, with_target
from telescope.sweep.prepare import prepare
from telescope.sweep.run import Options

FOLDER = "audit"
"""The audit's folder in the sweep's."""


def audit(
    finished: Finished, count: int, options: Options, make_screen: Callable[[], Screen]
) -> Audit:
    """Train what an audit of a sweep's answer misses, and return its finding.

    Args:
        finished: the sweep.
        count: number of trials; those of an earlier audit of the same answer count.
        options: the manner of the run; its `results` and `storage` are not used.
        make_screen: shows what happens.

    Raises:
        RefusedError: the sweep has no answer yet.
        SpecError: too few trials, or telescope does not train this sweep.
        ResumeError: the sweep's results are of another training, or an audit is running.
        StoreError, ModelError, DataError: see `run`.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    ladder = finished.ladder
    if ladder.stuck or not ladder.is_finished:
        why = ladder.stuck or "the sweep has not finished; go on with `telescope run`"
        raise RefusedError(f"{finished.spec.name}: nothing to audit: {why}")
    if not (finished.spec.model or finished.spec.trainer):
        raise SpecError(
            f"{finished.spec.name}: another program trains this sweep, so telescope cannot audit it"
        )
    certificate = finished.certificate
    # The sweep's own steps: nothing else is compared with the certificate.
    answer = chosen_point(ladder, certificate)
    trials = trials_of_audit(ladder.spec, answer, count)
    sweep = prepare(with_target(finished.spec))
    known = train_fixed(trials, sweep, finished.folder, FOLDER, options, make_screen)
    bound = certificate.excess_bound if certificate else None
    return verdict_of(ladder.spec, answer, [known[t] for t in trials if t in known], bound)
