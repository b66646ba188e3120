"""Means over values of which some may be missing."""

import math
from collections.abc import Iterable


def mean_of_known(values: Iterable[float | bool | None]) -> float | None:
    """Mean of the values that are not None; None where there is none.

    Summed exactly, so that the order of the values (and so the parallel layout) does not show.
    """
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
