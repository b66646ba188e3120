"""A step of training: what it is made of, and what its phases find out about it."""

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
    """One step, handed from phase to phase; each sets its fields on every rank.

    Example:
        >>> step = Step(1, trained=groups)
        >>> policy.update(step)
        >>> step.metrics[metrics.LOSS]
    """

    number: int
    """From 1, over all starts of the run."""
    is_last: bool = False
    """No step follows, so nothing is sampled ahead."""
    groups: list[Group] = field(default_factory=list)
    """Rollouts: all that this replica has sampled, over all rounds, in the stream's order."""
    trained: list[Group] = field(default_factory=list)
    """Rollouts: those that this replica trains on, as many on each; another may have sampled some.
    """
    skipped: list[Skipped] = field(default_factory=list)
    """Rollouts: samples that could not be used, the same on all ranks."""
    optimizer_steps: int = 0
    """Update: how many optimizer steps of the run there had been before it."""
    not_finite: NotFinite | None = None
    """Update: why it was left out; None where it was not."""
    metrics: dict[Metric, float | None] = field(default_factory=dict)
    """All phases: equal on all ranks. Those of the completions are added when it is recorded."""
    timing: dict[Metric, float] = field(default_factory=dict)
    """All phases: seconds of this rank, summed over the rounds."""
    shown: Callable[[str], None] = field(default=lambda name: None, repr=False)
    """Called with the name of each phase that begins."""

    @contextmanager
    def timed(self, phase: Metric) -> Iterator[None]:
        """Time a phase of the step, which may have several parts."""
        self.shown(phase.short)
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.timing[phase] = self.timing.get(phase, 0.0) + time.perf_counter() - started

    def of_round(self, metric: Metric, value: float) -> None:
        """Add a round's value to that of the rounds before, as the metric is reduced."""
        self.metrics[metric] = metric.reduce([self.metrics.get(metric), value])
