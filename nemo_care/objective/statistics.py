"""Means over values some of which can be missing, and their confidence intervals."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

_DRAWS = 1000
_TAILS = (0.025, 0.975)


def mean_of_known(values: Iterable[float | bool | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none.

    Summed exactly, so that the result does not depend on the order of the values (and thus on the
    parallel layout).
    """
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% confidence interval of the mean of independent values; None without values.

    The percentile bootstrap (B. Efron, "Bootstrap methods: another look at the jackknife", 1979):
    the middle 95% of the means of 1000 samples that are drawn from the values with replacement. The
    draws are seeded: equal values in equal order give the same interval.
    """
    if not values:
        return None
    known = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(0)
    # One sample at a time: all together would take gigabytes for a large data set.
    means = [known[draw.integers(len(known), size=len(known))].mean() for _ in range(_DRAWS)]
    low, high = np.quantile(means, _TAILS)
    return float(low), float(high)
