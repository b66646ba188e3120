"""Validation during training: the current policy is evaluated on every level's samples."""

from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from nemo_care.data.samples import Sample, Skipped
from nemo_care.evaluation.evaluator import Evaluator
from nemo_care.evaluation.results import Results, level_results
from nemo_care.evaluation.rows import Row


class Validator:
    """Evaluates the policy level by level."""

    def __init__(self, levels: Mapping[str, Sequence[Sample]], evaluator: Evaluator) -> None:
        """Use `levels`, the samples by level."""
        self.levels = levels
        self.evaluator = evaluator

    def run(
        self, between_batches: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Results], dict[str, list[Skipped]]]:
        """Return results (see `level_results`) and skipped samples, by level, equal on all ranks.

        `between_batches` is called on all ranks and can end the validation with an exception.
        """
        results: dict[str, Results] = {}
        left_out: dict[str, list[Skipped]] = {}
        with tqdm(
            total=sum(map(len, self.levels.values())),
            desc="validation",
            unit="prompt",
            leave=False,
            disable=self.evaluator.ranks.rank != 0 or not self.levels,
        ) as bar:
            for level, samples in self.levels.items():
                rows: list[Row] = []
                skipped: list[Skipped] = []
                for batch in self.evaluator.run(samples):
                    rows.extend(batch.rows)
                    skipped.extend(batch.skipped)
                    bar.update(len(batch.rows) + len(batch.skipped))
                    between_batches()
                left_out[level] = skipped
                results[level] = level_results(
                    rows,
                    skipped=len(skipped),
                    judged=self.evaluator.config.judge != "none",
                )
        return results, left_out
