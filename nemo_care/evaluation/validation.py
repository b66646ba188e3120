"""Validate a model on data sets by level.

Every sample is asked once. Consistency is the share of well-formed completions whose reasoning
supports the answer given. The forced-reasoning probe puts a wrong reasoning into the model's
mouth and measures the probability of the letter which that reasoning implies, and of the true
letter: whether answers are *caused* by the reasoning, which consistency alone does not show.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from nemo_care.config import EvaluationConfig
from nemo_care.data.loader import PromptLoader
from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample, Skipped
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.evaluation.judges import judged_consistent
from nemo_care.objective.rewards import evaluation_accuracy, format_reward
from nemo_care.objective.statistics import mean_of_known
from nemo_care.objective.text import parse_completion
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.answer_span import answer_token_span
from nemo_care.rollouts.generator import Generator, Sampling
from nemo_care.rollouts.group import Completion, Group
from nemo_care.scoring.score import Scorer

# Tells validation's random numbers from those of training.
_SEED_DOMAIN = 1
_FORCED = "<think> {reasoning} </think> <answer> {answer} </answer>"


@dataclass(frozen=True)
class _Outcome:
    """What one sample showed; None where it does not apply."""

    accuracy: float
    well_formed: bool
    reasoning_words: int
    consistent: bool | None
    probe_implied: float | None
    probe_true: float | None


class Validator:
    """Runs validation with the same generator and scoring pass as training."""

    def __init__(
        self,
        levels: Mapping[str, list[Sample]],
        loader: PromptLoader,
        generator: Generator,
        scorer: Scorer,
        tokenizer: ChatTokenizer,
        ranks: Ranks,
        config: EvaluationConfig,
        *,
        max_tokens: int,
        min_reasoning_words: int,
        seed: int,
    ) -> None:
        """`scorer` scores under the model to validate: the probe reads probabilities from it."""
        self.levels = levels
        self.loader = loader
        self.generator = generator
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.config = config
        self.max_tokens = max_tokens
        self.min_reasoning_words = min_reasoning_words
        self.seed = seed

    def run(self) -> dict[str, dict[str, float | int | None]]:
        """Per level: accuracy, consistency_rate, format_rate, count, reasoning_words, skipped,
        and with the probe probe_implied and probe_true. Equal on all ranks."""
        total = sum(len(samples) for samples in self.levels.values())
        results = {}
        with tqdm(
            total=total,
            desc="validation",
            unit="prompt",
            leave=False,
            disable=self.ranks.rank != 0 or total == 0,
        ) as bar:
            for level, samples in self.levels.items():
                results[level] = self._level(samples, bar)
        return results

    def _level(self, samples: list[Sample], bar: Any) -> dict[str, float | int | None]:
        outcomes: list[_Outcome] = []
        skipped = 0
        for prompts, left_out, asked in self._batches(samples):
            if prompts:
                outcomes.extend(self._ask(prompts))
            skipped += len(left_out)
            bar.update(asked)
        parts = self.ranks.gather_from_replicas((outcomes, skipped))
        everything = [outcome for part, _ in parts for outcome in part]
        result: dict[str, float | int | None] = {
            "accuracy": mean_of_known([o.accuracy for o in everything]),
            "consistency_rate": mean_of_known([o.consistent for o in everything if o.well_formed]),
            "format_rate": mean_of_known([o.well_formed for o in everything]),
            "count": len(everything),
            "reasoning_words": mean_of_known(
                [o.reasoning_words for o in everything if o.well_formed]
            ),
            "skipped": sum(count for _, count in parts),
        }
        if self.config.forced_reasoning_probe:
            result["probe_implied"] = mean_of_known([o.probe_implied for o in everything])
            result["probe_true"] = mean_of_known([o.probe_true for o in everything])
        return result

    def _batches(self, samples: list[Sample]) -> Iterator[tuple[list[Prompt], list[Skipped], int]]:
        """This replica's prompts in batches, samples left out, samples asked by all replicas."""
        replicas = self.ranks.data_size
        size = self.config.samples_per_batch * replicas
        numbered = list(enumerate(samples))
        for start in range(0, len(numbered), size):
            batch = numbered[start : start + size]
            mine = batch[self.ranks.data_rank :: replicas]
            made = self.ranks.from_leader(lambda mine=mine: self.loader.load(mine))  # type: ignore[misc]
            prompts = [item for item in made if isinstance(item, Prompt)]
            yield prompts, [item for item in made if isinstance(item, Skipped)], len(batch)

    def _ask(self, prompts: list[Prompt]) -> list[_Outcome]:
        groups = self.generator.generate(
            prompts,
            Sampling(
                group_size=1,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                max_tokens=self.max_tokens,
                seed=(self.seed, _SEED_DOMAIN),
            ),
        )
        probes = self._probe(prompts) if self.config.forced_reasoning_probe else {}
        return [self._outcome(group, probes.get(group.prompt.index)) for group in groups]

    def _outcome(self, group: Group, probe: tuple[float, float] | None) -> _Outcome:
        sample, text = group.prompt.sample, group.completions[0].text
        well_formed = format_reward(text, min_reasoning_words=self.min_reasoning_words) == 1.0
        return _Outcome(
            accuracy=evaluation_accuracy(sample.problem_type, text, sample.solution),
            well_formed=well_formed,
            reasoning_words=len((parse_completion(text).reasoning or "").split()),
            consistent=judged_consistent(self.config.judge, text, sample),
            probe_implied=probe[0] if probe else None,
            probe_true=probe[1] if probe else None,
        )

    def _probe(self, prompts: list[Prompt]) -> dict[int, tuple[float, float]]:
        """By prompt index: probability of the implied and of the true answer."""
        probed = [prompt for prompt in prompts if prompt.sample.forced_reasoning]
        groups = [
            Group(
                prompt,
                [
                    self._forced(prompt.sample.forced_reasoning, answer)
                    for answer in (prompt.sample.forced_answer, prompt.sample.solution)
                ],
            )
            for prompt in probed
        ]
        if not groups:
            return {}
        likelihoods = self.scorer.answer_likelihoods(groups)
        return {
            prompt.index: (float(implied), float(true))
            for prompt, (implied, true) in zip(probed, likelihoods, strict=True)
        }

    def _forced(self, reasoning: str, answer: str) -> Completion:
        text = _FORCED.format(reasoning=reasoning, answer=answer)
        ids = self.tokenizer.encode(text)
        return Completion(
            token_ids=torch.tensor(ids),
            log_probs=torch.zeros(len(ids)),
            text=text,
            ended=False,
            answer_span=answer_token_span(self.tokenizer.base, ids),
        )
