"""A step of training: its groups, and the results of its phases."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from nemo_care.data.samples import Skipped
from nemo_care.groups.group import Group
from nemo_care.runs.metric import Metric
from nemo_care.training.finite import NotFinite


@dataclass
class Step:
    """One step, passed from phase to phase; each sets its fields on every rank.

    Example:
        >>> step = Step(1, trained=groups)
        >>> policy.update(step)
        >>> step.metrics[metrics.LOSS]
    """

    number: int
    """Counted from 1, over all starts of the run."""
    left: int = 1
    """The number of steps that follow, so that nothing is sampled in vain."""
    groups: list[Group] = field(default_factory=list)
    """Set by rollouts: all groups sampled by this replica in all rounds, in the stream's order."""
    trained: list[Group] = field(default_factory=list)
    """Set by rollouts: the groups this replica trains on, equally many per replica. Some may have
    been sampled by another replica."""
    skipped: list[Skipped] = field(default_factory=list)
    """Set by rollouts: unusable samples, the same on all ranks."""
    optimizer_steps: int = 0
    """Set by the update: the number of the run's optimizer steps before it."""
    not_finite: NotFinite | None = None
    """Set by the update: why it was left out; None if it was not."""
    metrics: dict[Metric, float | None] = field(default_factory=dict)
    """Set by all phases: equal on all ranks. Recording adds those of the completions."""
    timing: dict[Metric, float] = field(default_factory=dict)
    """Set by all phases: seconds of this rank, summed over the rounds."""
    shown: Callable[[str], None] = field(default=lambda name: None, repr=False)
    """Called with the name of each phase when it begins."""

    @contextmanager
    def timed(self, phase: Metric) -> Iterator[None]:
        """Time a phase of the step, possibly in several parts."""
        self.shown(phase.short)
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.timing[phase] = self.timing.get(phase, 0.0) + time.perf_counter() - started

    def of_round(self, metric: Metric, value: float) -> None:
        """Add a round's value to that of the previous rounds, by the metric's reduction."""
        self.metrics[metric] = metric.reduce([self.metrics.get(metric), value])
