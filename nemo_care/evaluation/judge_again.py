"""Repeat the judging of existing completions for which the judge was not available."""

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from nemo_care.data.samples import Sample
from nemo_care.evaluation.files import EvaluationFiles
from nemo_care.evaluation.leader_judge import AnswersQuestions

Unjudged = dict[str, list[int]]
"""By level, the indices of samples whose well-formed completion lacks a requested verdict or
implied answer."""


def unjudged(files: EvaluationFiles) -> Unjudged:
    """Find the rows that lack a verdict or implied answer."""
    found = {
        level: [
            row["index"]
            for row in files.rows(level)
            if row["format"] == 1 and (row["consistent"] is None or "implied_error" in row)
        ]
        for level in files.levels
    }
    return {level: indices for level, indices in found.items() if indices}


def judge_again(
    files: EvaluationFiles,
    samples: Mapping[str, Sequence[Sample]],
    missing: Unjudged,
    judge: AnswersQuestions,
) -> None:
    """Add verdicts that can be obtained now to the rows; rank 0 only.

    Raises:
        InputError: no request can succeed.
    """
    total = sum(map(len, missing.values()))
    with tqdm(total=total, desc="judging again", unit="completion", dynamic_ncols=True) as bar:
        for level, indices in missing.items():
            rows = {row["index"]: row for row in files.rows(level)}
            asked = {
                index: judge.submit(samples[level][index], rows[index]["completion"])
                for index in indices
            }
            for index, verdict in asked.items():
                for error in ("judge_error", "implied_error"):
                    rows[index].pop(error, None)
                rows[index] |= {
                    "consistent": verdict.result().consistent,
                    **verdict.result().details,
                }
                bar.update()
            files.replace(level, list(rows.values()))
