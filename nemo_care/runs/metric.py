"""The definition of a metric: name, meaning, reduction to one value per step, panel in the report.

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
    """There is one value, equal on all ranks."""


class Over(StrEnum):
    """What the mean, the sum or the maximum of a metric is taken over."""

    COMPLETIONS = "completions sampled"
    ANSWERS = "completions with an answer likelihood"
    WELL_FORMED = "completions whose format is right"
    GROUPS = "groups sampled"
    CHOICES = "groups with at least two accurate answers"
    LOSS_TERMS = "completions or tokens trained on, depending on `algorithm.loss`"
    TRAINED = "completions trained on"
    TOKENS = "tokens of the completions trained on"
    REFERENCE_TOKENS = "tokens that the reference scored (all with a KL term, otherwise answers)"
    ROUTES = "tokens trained on with recorded experts, in each layer"
    LAYERS = "layers with experts"
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
    """Omitted if every value is 0, as it should be."""


class Metric(str):
    """The name of a metric (`section/name`), with its declaration.

    It is a string, so records, loggers and files use it as a key; pickled for another rank, it
    becomes a plain string.

    Example:
        >>> LOSS = Metric("train/loss", Reduction.MEAN, Over.TOKENS, "the loss", "falls slowly")
        >>> step.metrics[LOSS] = 0.1
    """

    reduction: Reduction
    over: Over
    meaning: str
    """One phrase for the page of metrics."""
    good: str
    """Description of a good value; empty if it depends on the run alone."""
    panel: Panel | None
    """Panel of the report; None: not drawn."""
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
        """Create a metric; `label` is by default the name within its section."""
        self = super().__new__(cls, name)
        self.reduction, self.over = reduction, over
        self.meaning, self.good, self.panel = meaning, good, panel
        self.label = label or self.short
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it as a plain string."""
        return str, (str(self),)

    @property
    def section(self) -> str:
        """The part before the slash, such as `train`."""
        return self.partition("/")[0]

    @property
    def short(self) -> str:
        """The name within its section, such as `loss`."""
        return self.rpartition("/")[2]

    def reduce(self, values: Iterable[float | bool | None]) -> float | None:
        """Reduce values by completion, group, replica or round; None if there are none.

        Raises:
            ValueError: the metric has a single value.
        """
        known = [value for value in values if value is not None]
        if self.reduction is Reduction.NONE:
            raise ValueError(f"{self} has one value for all ranks, so it is not reduced")
        if self.reduction is Reduction.MEAN:
            return mean_of_known(known)
        if self.reduction is Reduction.MAX:
            return max(known, default=None)
        return sum(known) if known else None


class Pattern(Metric):
    """Metrics whose names depend on the run: the parts in capitals are placeholders.

    Example:
        >>> OWN = Pattern("reward/NAME", Reduction.MEAN, Over.COMPLETIONS, "a reward of the user")
        >>> OWN.of("short_reasoning")
        'reward/short_reasoning'
    """

    def of(self, *parts: str) -> Metric:
        """Return the metric with these parts for its placeholders, in order."""
        values = iter(parts)
        return self._named(re.sub("[A-Z]+", lambda _: next(values), str(self)), parts[-1])

    def match(self, name: str) -> Metric | None:
        """Return the metric of this name, labelled by its last placeholder; None if none
        matches."""
        found = re.fullmatch(re.sub("[A-Z]+", "(.+)", str(self)), name, flags=re.DOTALL)
        return found and self._named(name, found.groups()[-1])

    def _named(self, name: str, label: str) -> Metric:
        return Metric(name, self.reduction, self.over, self.meaning, self.good, self.panel, label)
