"""Build an evaluator from a recipe, for training and for `nemo-care evaluate`."""

from collections.abc import Sequence
from pathlib import Path

from nemo_care.data.loader import PromptLoader
from nemo_care.evaluation.agreement import check_agreement
from nemo_care.evaluation.evaluator import Evaluator
from nemo_care.evaluation.judges import Evaluation, Likelihoods, judge_class
from nemo_care.evaluation.likelihood_judge import LikelihoodJudge
from nemo_care.evaluation.measures import FurtherJudge, Measure, OptionShuffle, PeerProbe
from nemo_care.evaluation.probe import ForcedReasoningProbe
from nemo_care.groups.group import Group
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.rollouts.build import build_generator
from nemo_care.rollouts.generator import Generator, Sampling
from nemo_care.scoring.scorer import Scorer

# Separates the peer probe's random numbers from those of training (0) and evaluation (1).
_PEERS_SEED_DOMAIN = 2


def build_evaluator(
    recipe: Recipe,
    ranks: Ranks,
    scorer: Scorer,
    prompts: PromptLoader,
    *,
    likelihoods: Likelihoods | None,
    folder: Path,
    generator: Generator | None = None,
    from_checkpoint: bool = False,
) -> Evaluator:
    """Build an evaluator of the scorer's model.

    `likelihoods` scores with the reference of the likelihood judge and is None without one;
    `folder` is the run directory. Without a `generator` of that model, one is created;
    `from_checkpoint`: the model's weights are those in model.hf_path.
    """
    tokenizer = prompts.builder.tokenizer
    evaluation = recipe.evaluation
    generator = generator or build_generator(
        recipe,
        ranks,
        scorer.model,
        tokenizer,
        groups_per_batch=evaluation.samples_per_batch,
        shared_prompt=True,
        folder=folder,
        from_checkpoint=from_checkpoint,
    )
    parts = Evaluation(recipe, ranks, tokenizer, likelihoods, folder)

    def check(groups: Sequence[Group]) -> None:
        # Megatron samples with the model itself.
        if recipe.rollout.backend == "vllm":
            check_agreement(scorer, groups, recipe.rollout.max_logprob_difference)

    return Evaluator(
        prompts,
        generator,
        judge_class(evaluation.judge).build(parts),
        _measures(parts, scorer, prompts, generator),
        ranks,
        evaluation,
        max_tokens=recipe.rollout.max_completion_tokens,
        min_reasoning_words=recipe.algorithm.min_reasoning_words,
        seed=recipe.trainer.seed,
        check=check,
    )


def _measures(
    parts: Evaluation, scorer: Scorer, prompts: PromptLoader, generator: Generator
) -> list[Measure]:
    """Return the recipe's measures besides its judge."""
    recipe, tokenizer = parts.recipe, parts.tokenizer
    evaluation = recipe.evaluation
    measures: list[Measure] = [
        FurtherJudge(name, judge_class(name).build(parts)) for name in evaluation.further_judges
    ]
    if evaluation.forced_reasoning_probe:
        measures.append(ForcedReasoningProbe(scorer, tokenizer))
    if evaluation.option_shuffle:
        policy = LikelihoodJudge(scorer.answer_likelihoods, tokenizer)
        measures.append(OptionShuffle(policy, prompts.builder))
    if evaluation.peer_probe:
        sampling = Sampling(
            group_size=evaluation.peer_probe,
            temperature=recipe.rollout.temperature,
            top_p=recipe.rollout.top_p,
            max_tokens=recipe.rollout.max_completion_tokens,
            seed=(recipe.trainer.seed, _PEERS_SEED_DOMAIN),
        )
        measures.append(PeerProbe(generator, scorer, sampling))
    return measures
