"""Put an evaluator together from a recipe; training and `nemo-care evaluate` both do."""

from pathlib import Path

from nemo_care.config import Recipe
from nemo_care.data.prompts import PromptBuilder
from nemo_care.evaluation.evaluator import Evaluator
from nemo_care.evaluation.judges import AnswersQuestions, Judge, LeaderJudge, NoJudge, RuleJudge
from nemo_care.evaluation.likelihood_judge import LikelihoodJudge, Likelihoods
from nemo_care.evaluation.probe import ForcedReasoningProbe
from nemo_care.evaluation_config import LLMJudgeConfig
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.scoring.score import Scorer


def build_evaluator(
    recipe: Recipe,
    ranks: Ranks,
    scorer: Scorer,
    prompts: PromptBuilder,
    *,
    likelihoods: Likelihoods | None,
    folder: Path,
) -> Evaluator:
    """An evaluator of the scorer's model.

    `likelihoods` scores under the reference of the likelihood judge and is None without one;
    `folder` is the run directory.
    """
    tokenizer = prompts.tokenizer
    evaluation = recipe.evaluation
    return Evaluator(
        prompts.build,
        MegatronGenerator(
            scorer.model, tokenizer, ranks, groups_per_batch=evaluation.samples_per_batch
        ),
        _build_judge(recipe, ranks, prompts, likelihoods, folder),
        ForcedReasoningProbe(scorer, tokenizer) if evaluation.forced_reasoning_probe else None,
        ranks,
        evaluation,
        max_tokens=recipe.rollout.max_completion_tokens,
        min_reasoning_words=recipe.algorithm.min_reasoning_words,
        seed=recipe.trainer.seed,
    )


def _build_judge(
    recipe: Recipe,
    ranks: Ranks,
    prompts: PromptBuilder,
    likelihoods: Likelihoods | None,
    folder: Path,
) -> Judge:
    name, llm = recipe.evaluation.judge, recipe.evaluation.llm
    if name == "rule":
        return RuleJudge()
    if name == "likelihood":
        assert likelihoods is not None, "check_training"
        return LikelihoodJudge(likelihoods, prompts.tokenizer)
    if name == "llm":
        return LeaderJudge(make_llm_judge(llm, folder) if ranks.is_model_leader else None, ranks)
    return NoJudge()


def make_llm_judge(config: LLMJudgeConfig, folder: Path) -> AnswersQuestions:
    """The language model as a judge, its replies kept in the run directory or where asked."""
    from nemo_care.evaluation.llm_judge import LLMJudge

    return LLMJudge(config, Path(config.cache) if config.cache else folder / "llm_judge.sqlite")
