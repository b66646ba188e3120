"""Report a check of the data: tables and a histogram for the terminal, everything as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_care.checks.data import CAUSES, FileReport, Length, Problem
from nemo_care.data.annotations import shown
from nemo_care.process.screen import one_line, plain
from nemo_care.recipe.data import DataConfig
from nemo_care.reporting.sheet import new_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PROBLEMS_SHOWN = 20
_MOST_BINS = 16
_LONGEST_BAR = 40


def check_record(reports: Sequence[FileReport], config: DataConfig) -> dict[str, Any]:
    """Return all findings, ready for JSON."""
    return {
        "usable": not any(report.error or report.problems for report in reports),
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_skipped_fraction": config.max_skipped_fraction,
        "prompt_tokens": _tokens_record(
            [length for report in reports for length in report.lengths]
        ),
        "files": [_file_record(report, config.max_skipped_fraction) for report in reports],
        "problems": [
            {"file": report.file.name, **asdict(problem)}
            for report in reports
            for problem in report.problems
        ],
    }


def _file_record(report: FileReport, max_skipped_fraction: float) -> dict[str, Any]:
    return {
        "name": report.file.name,
        "kind": report.file.kind,
        "path": str(report.file.path),
        "error": report.error,
        "lines": report.lines,
        "samples": report.samples,
        "checked": len(report.checked),
        "usable": report.usable,
        "normalised": [asdict(solution) for solution in report.normalised],
        "one_word_solutions": report.one_word_solutions,
        "unusable": {cause: report.causes[cause] for cause in CAUSES},
        "unusable_fraction": report.unusable_fraction,
        "stops_a_run": report.stops_a_run(max_skipped_fraction),
        "missing_files": sorted(map(str, report.missing_files)),
        "problem_types": dict(_problem_types(report)),
        "media": _media(report),
        "videos_by_pyav": report.videos_by_pyav,
        "prompt_tokens": _tokens_record(report.lengths),
    }


def _problem_types(report: FileReport) -> Counter[str]:
    return Counter(sample.problem_type for sample in report.checked)


def _media(report: FileReport) -> dict[str, int]:
    """Count checked samples with videos, with images, with neither; one can have both."""
    return {
        "videos": sum(bool(sample.videos) for sample in report.checked),
        "images": sum(bool(sample.images) for sample in report.checked),
        "text only": sum(not (sample.videos or sample.images) for sample in report.checked),
    }


def _tokens_record(lengths: Sequence[Length]) -> dict[str, Any] | None:
    """Summarise all prompts of known length, including those that are too long."""
    if not lengths:
        return None
    tokens = np.array([length.tokens for length in lengths])
    usable = [length for length in lengths if length.vision_tokens is not None]
    edges, counts = token_histogram(tokens)
    return {
        "min": int(tokens.min()),
        "median": float(np.median(tokens)),
        "mean": float(tokens.mean()),
        "p95": float(np.percentile(tokens, 95)),
        "max": int(tokens.max()),
        "vision_share": (
            sum(length.vision_tokens or 0 for length in usable)
            / sum(length.tokens for length in usable)
            if usable
            else None
        ),
        "histogram": {"edges": edges, "counts": counts},
    }


def token_histogram(tokens: np.ndarray) -> tuple[list[int], list[int]]:
    """Return edges and counts of at most 16 bins; a bin includes its lower edge only.

    Edges are multiples of a round width: 1, 2 or 5 times a power of ten.
    """
    low, high = int(tokens.min()), int(tokens.max())
    widths = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < _MOST_BINS)
    first, last = low // width, high // width
    edges = [width * number for number in range(first, last + 2)]
    counts = np.bincount(tokens // width - first, minlength=last - first + 1)
    return edges, counts.tolist()


def print_report(
    console: Console, reports: Sequence[FileReport], config: DataConfig, *, whole: bool
) -> None:
    """Print tables, the histogram and the first problems.

    `whole`: every sample was checked, and decoded.
    """
    console.print(_usability_table(reports, config.max_skipped_fraction))
    if not whole:
        console.print("Not everything was checked: a complete check can find more.\n")
    read = [report for report in reports if report.checked]
    if read:
        console.print(_contents_table(read))
    by_pyav = sum(report.videos_by_pyav for report in read)
    if by_pyav:
        console.print(
            f"{by_pyav:,} video{'s' if by_pyav > 1 else ''} decoded by PyAV: decord can't open "
            "them, or would return wrong frames.\n"
        )
    measured = [report for report in read if report.lengths]
    if measured:
        console.print(_tokens_table(measured))
        lengths = [length.tokens for report in measured for length in report.lengths]
        for line in _histogram_lines(np.array(lengths), config.max_prompt_tokens):
            console.print(line)
        console.print()
    for line in (*_solution_lines(reports), *_problem_lines(reports)):
        console.print(one_line(line))


def _table(title: str, *columns: str) -> Table:
    table = new_table(title)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _usability_table(reports: Sequence[FileReport], max_skipped_fraction: float) -> Table:
    table = _table(
        f"Samples (a run skips up to {100 * max_skipped_fraction:g}%)",
        *("lines", "checked", "usable", "unusable", "a run"),
    )
    table.add_column("what is wrong")
    for report in reports:
        numbers = (report.lines, len(report.checked), report.usable)
        table.add_row(
            plain(report.file.name),
            *(f"{number:,}" for number in numbers),
            f"{100 * report.unusable_fraction:.1f}%",
            "stops" if report.stops_a_run(max_skipped_fraction) else "continues",
            "the file" if report.error else plain(_counts(report.causes) or "–"),
        )
    return table


def _counts(found: Counter[str]) -> str:
    """Format counts, the most frequent first."""
    return ", ".join(f"{name} {count:,}" for name, count in found.most_common())


def _contents_table(reports: Sequence[FileReport]) -> Table:
    table = _table("Contents", "videos", "images", "text only")
    table.add_column("problem types")
    for report in reports:
        table.add_row(
            plain(report.file.name),
            *(f"{count:,}" for count in _media(report).values()),
            plain(_counts(_problem_types(report))),
        )
    return table


def _tokens_table(reports: Sequence[FileReport]) -> Table:
    table = _table("Tokens of a prompt", "min", "median", "mean", "p95", "max", "vision")
    for report in reports:
        record = _tokens_record(report.lengths)
        assert record is not None, "only files with lengths"
        vision = record["vision_share"]
        table.add_row(
            plain(report.file.name),
            *(f"{record[key]:,.0f}" for key in ("min", "median", "mean", "p95", "max")),
            "–" if vision is None else f"{100 * vision:.0f}%",
        )
    return table


def _histogram_lines(tokens: np.ndarray, max_prompt_tokens: int) -> list[str]:
    edges, counts = token_histogram(tokens)
    ranges = [
        f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}"
        for low, high in pairwise(edges)
    ]
    width = max(map(len, ranges))
    lines = []
    for text, (low, high), count in zip(ranges, pairwise(edges), counts, strict=True):
        bar = "█" * -(-count * _LONGEST_BAR // max(counts))
        limit = " <- data.max_prompt_tokens" if low <= max_prompt_tokens < high else ""
        lines.append(f"{text:>{width}} {bar} {count:,}{limit}")
    return lines


def _solution_lines(reports: Sequence[FileReport]) -> list[str]:
    """Return notes on usable solutions."""
    lines = []
    for report in reports:
        name, count = report.file.name, len(report.normalised)
        if count:
            first = report.normalised[0]
            lines.append(
                f"{name}: solutions not in the form of answers, normalised: {count:,}; the first: "
                f"{first.where}: {shown(first.given)} -> {shown(first.solution)}"
            )
        if report.one_word_solutions:
            lines.append(
                f"{name}: free-form solutions of one word, for which an answer scores at most 0.67 "
                f"(ROUGE-2 compares pairs of words): {report.one_word_solutions:,}"
            )
    return lines


def _problem_lines(reports: Sequence[FileReport]) -> list[str]:
    """Return the first problems of each file and cause, and the number of the rest."""
    groups = {
        (report.file.name, cause): [p for p in report.problems if p.cause == cause]
        for report in reports
        for cause in report.causes
    }
    # One of each group, then the next of each, until the limit is reached.
    turns = [problem for turn in zip_longest(*groups.values()) for problem in turn if problem]
    shown = turns[:_PROBLEMS_SHOWN]
    lines = [f"{report.file.name}: {report.error}" for report in reports if report.error]
    for (name, cause), problems in groups.items():
        first = [problem for problem in problems if any(problem is other for other in shown)]
        lines.append(f"{name}, {cause}: {len(problems):,}")
        lines += [f"  {_problem_line(problem)}" for problem in first]
        if first and len(problems) > len(first):
            lines.append(f"  ... and {len(problems) - len(first):,} more")
    return lines


def _problem_line(problem: Problem) -> str:
    # A line's problem names the line; a file's problem does not name the sample.
    of = "" if problem.place is None else f"sample {problem.sample_id}: "
    return of + problem.reason
