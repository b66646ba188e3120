"""The language model judge in a model replica: only the leader sends requests."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from nemo_care.data.samples import Sample
from nemo_care.evaluation.implied_answer import IMPLIED_TEMPLATE
from nemo_care.evaluation.judges import Evaluation, Judge, Verdict, known
from nemo_care.evaluation.llm_judge import DEFAULT_TEMPLATE, REPLY_FORMAT, LLMJudge
from nemo_care.files.json_lines import Record
from nemo_care.groups.group import Group
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe


class AnswersQuestions(Protocol):
    """A judge of one completion at a time, such as a language model."""

    def submit(self, sample: Sample, completion: str) -> Future[Verdict]:
        """Submit a completion; the verdict comes later."""
        ...

    def close(self) -> None:
        """Release threads and files."""
        ...


class LeaderJudge(Judge):
    """Uses a judge on each replica's leader only, so that no request is repeated."""

    def __init__(self, judge: AnswersQuestions | None, ranks: Ranks) -> None:
        """Use `judge`, which is needed on the leader only."""
        assert (judge is not None) == ranks.is_model_leader
        self._judge = judge

    @classmethod
    def build(cls, evaluation: Evaluation) -> "LeaderJudge":
        """Return the language model judge, which the leader opens."""
        ranks = evaluation.ranks
        leads = ranks.is_model_leader
        return cls(build_llm_judge(evaluation.recipe, evaluation.folder) if leads else None, ranks)

    @classmethod
    def settings(cls, recipe: Recipe) -> Record:
        """Return the model's name and temperature, and how it is asked."""
        llm = recipe.evaluation.llm
        settings = {
            "evaluation.llm.model": llm.model,
            "evaluation.llm.temperature": llm.temperature,
            "evaluation.llm.prompt_template": llm.prompt_template or DEFAULT_TEMPLATE,
            "evaluation.llm reply format": REPLY_FORMAT,
        }
        if llm.implied_answer:
            settings["evaluation.llm.implied_answer"] = IMPLIED_TEMPLATE
        return settings

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Submit to the leader's judge; returns nothing on the other ranks."""
        if self._judge is None:
            return [known(Verdict(None)) for _ in groups]
        return [
            self._judge.submit(group.prompt.sample, group.completions[0].text) for group in groups
        ]

    def close(self) -> None:
        """End the leader's threads."""
        if self._judge is not None:
            self._judge.close()


def build_llm_judge(recipe: Recipe, folder: Path) -> LLMJudge:
    """Return the language model judge; `folder` is the run directory."""
    llm = recipe.evaluation.llm
    # In the run directory, so that a restart repeats no request.
    return LLMJudge(llm, Path(llm.cache) if llm.cache else folder / "llm_judge.sqlite")
