"""Time of a quickstart-sized sweep on the Ray dispatcher, against a perfect scheduler.

    python benchmarks/makespan.py [--workers 2] [--scale 1.0] [--spin]

Three stages of 21, 15 and 3 trials of about 1.2, 2 and 5 seconds. The perfect scheduler has the
same barriers and the same order, and loses no time between trials: a trial starts on the worker
that is free first. Its durations are those measured inside the trials, and both clocks start with
the first trial, when the first worker is up.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

from telescope.dispatch.queue import Trainer
from telescope.dispatch.ray.tune import Size, opened, run_ray
from telescope.records import Point, Result, Status, Trial, TrialSource

STAGES = ((21, 1.2), (15, 2.0), (3, 5.0))
"""Trials of a stage, and the seconds of one."""
JITTER = 0.15
"""Relative spread of the durations."""


class Stages(TrialSource):
    """A source with a barrier between stages, which notes when each trial began and ended."""

    def __init__(self) -> None:
        """Draw up the trials of all stages."""
        self.stages = [
            [Trial(32 << stage, Point.of(lr=0.01 * (n + 1)), 0) for n in range(count)]
            for stage, (count, _) in enumerate(STAGES)
        ]
        self.spans: dict[Trial, tuple[float, float]] = {}
        self.workers: set[str] = set()

    def ask(self) -> Sequence[Trial]:
        """The open stage's unanswered trials."""
        for stage in self.stages:
            if unanswered := [trial for trial in stage if trial not in self.spans]:
                return unanswered
        return []

    def tell(self, *results: Result) -> None:
        """Note the span, which the trainer returns as end and duration."""
        for result in results:
            assert result.loss is not None, result.reason
            self.spans[result.trial] = (result.loss - result.seconds, result.loss)
            self.workers.add(result.worker)


def make_trainer(scale: float, spin: bool) -> Trainer:
    """A trainer that takes a stage's time, asleep or at work; its loss is the time of its end."""
    seconds = {32 << stage: scale * each for stage, (_, each) in enumerate(STAGES)}

    def train(trial: Trial) -> Result:
        start = time.time()
        jitter = random.Random(str(trial)).uniform(-JITTER, JITTER)
        end = start + seconds[trial.width] * (1 + jitter)
        while (left := end - time.time()) > 0:
            if not spin:
                time.sleep(left)
        now = time.time()
        return Result(trial, Status.COMPLETE, loss=now, seconds=now - start)

    return train


def perfect_makespan(stages: Sequence[Sequence[float]], workers: int) -> float:
    """The makespan of durations handed out in order, with barriers and without any other loss."""
    now = 0.0
    for durations in stages:
        free = [now] * workers
        for duration in durations:
            first = free.index(min(free))
            free[first] += duration
        now = max(free)
    return now


def main() -> None:
    """Run the sweep once and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every duration")
    parser.add_argument("--spin", action="store_true", help="keep the CPU busy instead of sleeping")
    options = parser.parse_args()

    source = Stages()
    begin = time.time()
    with opened(Size(options.workers)) as session:
        run_ray(source, make_trainer(options.scale, options.spin), session)
    total = time.time() - begin

    spans = source.spans
    first, last = min(s for s, _ in spans.values()), max(e for _, e in spans.values())
    durations = [[spans[t][1] - spans[t][0] for t in stage] for stage in source.stages]
    ideal, actual = perfect_makespan(durations, options.workers), last - first
    print(f"{len(spans)} trials on {len(source.workers)} warm workers")
    print(f"makespan  {actual:6.2f} s")
    print(f"perfect   {ideal:6.2f} s")
    print(f"ratio     {ideal / actual:6.3f}   (aim: at least 0.90)")
    print(f"start and end of Ray  {total - actual:.2f} s")


if __name__ == "__main__":
    main()
