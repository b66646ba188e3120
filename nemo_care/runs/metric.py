"""What a metric is: name, meaning, reduction to one value a step, and place in the report.

The metrics themselves are declared in `metrics.py`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nemo_care.objective.statistics import mean_of_known


class Reduction(StrEnum):
    """How the values of completions, micro-batches, ranks or rounds become the value of a step."""

    MEAN = "mean"
    SUM = "sum"
    MAX = "largest"
    NONE = "value"
    """There is one value, the same on all ranks."""


class Over(StrEnum):
    """What a metric is the mean, the sum or the largest of."""

    COMPLETIONS = "completions sampled"
    ANSWERS = "completions with an answer likelihood"
    WELL_FORMED = "completions whose format is right"
    GROUPS = "groups sampled"
    CHOICES = "groups with at least two accurate answers"
    LOSS_TERMS = "completions or tokens trained on, as `algorithm.loss` takes its mean"
    TRAINED = "completions trained on"
    TOKENS = "tokens of the completions trained on"
    REFERENCE_TOKENS = "tokens that the reference scored (with a KL term all, else the answers')"
    ROUNDS = "rounds of sampling of a step"
    REPLICAS = "model replicas"
    RANKS = "ranks"
    STEPS = "steps of the run"
    STEP = "the step"
    UPDATE = "the step's last update"
    LEVEL = "prompts of a validation level"


@dataclass(frozen=True)
class Sheet:
    """One picture of the report: panels side by side."""

    name: str
    title: str


@dataclass(frozen=True)
class Panel:
    """One set of axes of the report; its lines are the metrics that name it."""

    sheet: Sheet
    title: str
    unit: str = ""
    share: bool = False
    """A rate or probability: the axis is fixed to 0..1."""
    from_zero: bool = True
    smooth: bool = True
    needs_more_than_zero: bool = False
    """Left out where every value is 0, which is how it should be."""


class Metric(str):
    """The name of a metric (`section/name`), which knows what is known about the metric.

    It is a string, so records, loggers and files take it as the key that it is; sent to another
    rank it arrives as a plain string.

    Example:
        >>> LOSS = Metric("train/loss", Reduction.MEAN, Over.TOKENS, "the loss", "falls slowly")
        >>> step.metrics[LOSS] = 0.1
    """

    reduction: Reduction
    over: Over
    meaning: str
    """One phrase for the page of metrics."""
    good: str
    """What a good value looks like; empty where it depends on the run alone."""
    panel: Panel | None
    """Where the report draws it; None: nowhere."""
    label: str
    """Its name in that panel."""

    def __new__(
        cls,
        name: str,
        reduction: Reduction,
        over: Over,
        meaning: str,
        good: str = "",
        panel: Panel | None = None,
        label: str = "",
    ) -> "Metric":
        """`label` is by default the name within its section."""
        self = super().__new__(cls, name)
        self.reduction, self.over = reduction, over
        self.meaning, self.good, self.panel = meaning, good, panel
        self.label = label or self.short
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a plain string."""
        return str, (str(self),)

    @property
    def section(self) -> str:
        """What the name begins with, as `train`."""
        return self.partition("/")[0]

    @property
    def short(self) -> str:
        """The name within its section, as `loss`."""
        return self.rpartition("/")[2]

    def reduce(self, values: Iterable[float | bool | None]) -> float | None:
        """The metric of values by completion, group, replica or round; None where none is known.

        Raises:
            ValueError: the metric has one value to begin with.
        """
        known = [value for value in values if value is not None]
        if self.reduction is Reduction.NONE:
            raise ValueError(f"{self} has one value for all ranks; there is nothing to reduce")
        if self.reduction is Reduction.MEAN:
            return mean_of_known(known)
        if self.reduction is Reduction.MAX:
            return max(known, default=None)
        return sum(known) if known else None


class Pattern(Metric):
    """Metrics whose names a run chooses: the parts in capitals are open.

    Example:
        >>> OWN = Pattern("reward/NAME", Reduction.MEAN, Over.COMPLETIONS, "a reward of the user")
        >>> OWN.of("short_reasoning")
        'reward/short_reasoning'
    """

    def of(self, *parts: str) -> Metric:
        """The metric with these open parts, in their order."""
        values = iter(parts)
        return self._named(re.sub("[A-Z]+", lambda _: next(values), str(self)), parts[-1])

    def match(self, name: str) -> Metric | None:
        """The metric of this name, its last open part as label; None where it is none of these."""
        found = re.fullmatch(re.sub("[A-Z]+", "(.+)", str(self)), name, flags=re.DOTALL)
        return found and self._named(name, found.groups()[-1])

    def _named(self, name: str, label: str) -> Metric:
        return Metric(name, self.reduction, self.over, self.meaning, self.good, self.panel, label)
