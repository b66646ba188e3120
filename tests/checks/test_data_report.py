"""What a check of the data concludes from what it found."""

import numpy as np
import pytest

from nemo_care.checks.data import DataFile, FileReport, Problem
from nemo_care.data.samples import Sample
from nemo_care.reporting.data_report import token_histogram


def report_with(*, bad: int, unusable: int, good: int, training: bool = True) -> FileReport:
    samples = [Sample(str(place), "?", "A") for place in range(unusable + good)]
    return FileReport(
        DataFile("a", "jsonl", ".", "a.jsonl", training),
        lines=bad + len(samples),
        samples=len(samples),
        checked=samples,
        problems=[
            *(Problem("bad line", str(place), None, "") for place in range(bad)),
            *(Problem("missing", str(place), place, "") for place in range(unusable)),
        ],
    )


@pytest.mark.parametrize(
    ("report", "stops"),
    [
        (report_with(bad=2, unusable=3, good=95), False),
        (report_with(bad=2, unusable=4, good=94), True),
        (report_with(bad=6, unusable=0, good=94), True),
        (report_with(bad=5, unusable=9, good=86, training=False), False),
        (report_with(bad=6, unusable=0, good=94, training=False), True),
        (FileReport(DataFile("a", "jsonl", ".", "a.jsonl", False), error="no such file"), True),
    ],
)
def test_a_run_stops_above_the_skipped_fraction(report, stops):
    assert report.stops_a_run(0.05) is stops


@pytest.mark.parametrize(
    ("tokens", "edges", "counts"),
    [
        ([7], [7, 8], [1]),
        ([18, 24, 24], list(range(18, 26)), [1, 0, 0, 0, 0, 0, 2]),
        ([100, 119, 290], list(range(100, 320, 20)), [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ([1000, 15999], list(range(1000, 16001, 1000)), [1, *[0] * 13, 1]),
        ([999, 16384], list(range(0, 18001, 2000)), [1, *[0] * 7, 1]),
    ],
)
def test_bins_of_the_histogram_are_few_and_round(tokens, edges, counts):
    assert token_histogram(np.array(tokens)) == (edges, counts)
