"""The keys under `evaluation` of the recipe's schema, and their checks (see schema.py)."""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from nemo_care.errors import InputError
from nemo_care.recipe.templates import template_problem

JUDGES = ("none", "rule", "likelihood", "llm")
FURTHER_JUDGES = ("rule", "likelihood")
UNTAGGED = ("wrong", "whole_text")


@dataclass
class LLMJudgeConfig:
    """The judge behind an OpenAI-compatible endpoint (evaluation.judge=llm)."""

    base_url: str | None = None
    """Address of the endpoint up to and with /v1, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model there."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, in capital letters; the key itself is
    written nowhere. null: the endpoint asks for none."""
    prompt_template: str | None = None
    """What the judge is asked, with {question}, {options}, {reasoning} and {answer}, each put in as
    JSON on one line, of which the last two are needed; null: our own wording. It has to ask for a
    last line with a single word, CONSISTENT or INCONSISTENT; other replies are asked for again,
    twice."""
    temperature: float | None = 0.0
    """null: not sent, for models that refuse it."""
    implied_answer: bool = False
    """Also ask, in a request of its own, which option the reasoning alone leads to, without
    showing the answer given (`implied_rate`; see docs/evaluation.md). prompt_template does not
    change that question."""
    concurrency: int = 8
    """Requests at the same time, of each model replica."""
    max_retries: int = 5
    """Further attempts, with growing pauses, after a refusal that may pass (overload, time-out)."""
    timeout_seconds: float = 120.0
    """Longest time of one attempt, from connecting (half of it at most) to the last byte of the
    reply."""
    cache: str | None = None
    """File that keeps the replies, so that what was answered is not asked again by the same model
    with the same wording, temperature and base_url; replicas and runs may share it. null:
    llm_judge.sqlite in the run directory."""


@dataclass
class EvaluationConfig:
    """How completions are sampled and judged, in `nemo-care evaluate` and in validation."""

    checkpoint: str | None = None
    """What `nemo-care evaluate` evaluates: a Hugging Face directory, a run directory (its newest
    checkpoint) or one of its checkpoints; null: model.hf_path."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """As rollout.top_p."""
    samples_per_batch: int = 8
    """Prompts that are generated together."""
    untagged: str = "wrong"
    """What a completion without an answer in answer tags is: wrong, as in training, or whole_text,
    its own answer as a whole, as in the authors' evaluation."""
    judge: str = "none"
    """Who says whether a reasoning supports the answer: rule (for questions whose options are
    words that the reasoning names, as in the miniature), likelihood (the answer is the likeliest of
    the options behind that reasoning under a reference model), llm (a language model is asked) or
    none. The completions of training's rollouts are judged by the rule only: it costs nothing."""
    reference: str | None = None
    """The model of evaluation.judge=likelihood in `nemo-care evaluate`: a Hugging Face directory,
    or a run directory or checkpoint, whose EMA reference it then is; null: model.hf_path. It should
    not be the model that is evaluated, which finds its own answers likely. Validation in training
    takes the run's reference as it is at that step."""
    llm: LLMJudgeConfig = field(default_factory=LLMJudgeConfig)
    further_judges: list[str] = field(default_factory=list)
    """Judges beside evaluation.judge whose verdicts are measures of their own
    (`consistency_rate_rule`, `consistency_rate_likelihood`): rule, likelihood, or both."""
    forced_reasoning_probe: bool = False
    """Also measure how much the answer follows a reasoning put in the model's mouth."""
    option_shuffle: bool = False
    """Also measure whether the answer follows its option's text when the options of a
    multiple-choice question change their letters and the reasoning stays (`shuffle_rate`)."""
    peer_probe: int = 0
    """Completions of each multiple-choice prompt to sample, as in training, for the peer probe: how
    much likelier an answer is behind its own reasoning than behind one that led to another answer
    (`peer_probe`). Needs algorithm.shared_prompt=true. 0: not measured."""


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Check the keys under `evaluation` against each other; their ranges are in schema.py.

    Raises:
        InputError: names the key and what it may be.
    """
    if evaluation.judge == "llm":
        check_llm_judge(evaluation.llm)
    further = evaluation.further_judges
    for name in further:
        if name not in FURTHER_JUDGES:
            raise InputError(
                f"evaluation.further_judges has {name}: choose {' or '.join(FURTHER_JUDGES)}"
            )
        if name == evaluation.judge or further.count(name) > 1:
            raise InputError(
                f"evaluation.further_judges={further}: {name} judges already; name it once, here "
                "or in evaluation.judge"
            )
    if evaluation.peer_probe == 1:
        raise InputError(
            "evaluation.peer_probe=1: a probe of peers needs two completions of a prompt at least; "
            "set it to 2 or more, or to 0"
        )


def judged_by(evaluation: EvaluationConfig, name: str) -> bool:
    """Whether a judge is asked at all: as the judge, or beside it."""
    return name in (evaluation.judge, *evaluation.further_judges)


def check_llm_judge(llm: LLMJudgeConfig) -> None:
    """Refuse an endpoint or a wording that no request could be made of.

    Raises:
        InputError: names the key and what it may be.
    """
    for key in ("base_url", "model"):
        if not getattr(llm, key):
            raise InputError(f"evaluation.judge=llm needs evaluation.llm.{key}")
    try:
        url = urlsplit(llm.base_url or "")
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    # Not printed: what stands before an @ or behind a ? may be a password or a key.
    if not usable or "@" in url.netloc or url.query or not str(llm.base_url).isprintable():
        raise InputError(
            "evaluation.llm.base_url: give an address such as http://localhost:8000/v1, without "
            "user name, password or ?key=value"
        )
    # Not printed either: it may be the key itself, put in the wrong place.
    if llm.api_key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", llm.api_key_env):
        raise InputError(
            "evaluation.llm.api_key_env: give the name of an environment variable, in capital "
            "letters, which holds the key; never the key itself"
        )
    if llm.prompt_template is None:
        return
    problem = template_problem(
        llm.prompt_template,
        ("question", "options", "reasoning", "answer"),
        ("reasoning", "answer"),
    )
    if problem:
        raise InputError(
            f"evaluation.llm.prompt_template: {problem}; use {{question}}, {{options}}, "
            "{reasoning} and {answer}, the last two at least, and write a brace that is text twice"
        )
