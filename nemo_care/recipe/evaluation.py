"""The keys under `evaluation` of the recipe's schema, and their checks (see schema.py)."""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from nemo_care.errors import InputError
from nemo_care.recipe.templates import template_problem

JUDGES = {
    "none": "nemo_care.evaluation.judges:NoJudge",
    "rule": "nemo_care.evaluation.judges:RuleJudge",
    "likelihood": "nemo_care.evaluation.likelihood_judge:LikelihoodJudge",
    "llm": "nemo_care.evaluation.leader_judge:LeaderJudge",
}
"""Name -> the class that judges (`Judge` in evaluation/judges.py)."""
FURTHER_JUDGES = ("rule", "likelihood")


@dataclass
class LLMJudgeConfig:
    """A judge at an OpenAI-compatible endpoint (evaluation.judge=llm)."""

    base_url: str | None = None
    """Address of the endpoint up to and including /v1, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model at the endpoint."""
    api_key_env: str | None = None
    """Name, in capital letters, of the environment variable that holds the key; the key itself is
    never written. null: the endpoint needs no key."""
    prompt_template: str | None = None
    """The judge's prompt, with {question}, {options}, {reasoning} and {answer}, each inserted as
    JSON on one line; the last two are required. null: the built-in text. It must require a last
    line with a single word, CONSISTENT or INCONSISTENT; after any different reply the request is
    repeated, up to twice."""
    temperature: float | None = 0.0
    """null: not sent, for models that refuse it."""
    implied_answer: bool = False
    """Also ask, in a separate request, which option the reasoning alone leads to, without showing
    the given answer (`implied_rate`; see docs/evaluation.md). prompt_template does not change that
    question."""
    concurrency: int = 8
    """Concurrent requests per model replica."""
    max_retries: int = 5
    """Retries, with growing pauses, after a temporary failure (overload, time-out)."""
    timeout_seconds: float = 120.0
    """Time limit of one attempt, from connecting (at most half of it) to the last byte of the
    reply."""
    cache: str | None = None
    """File that caches the replies for the same model, prompt, temperature and base_url; replicas
    and runs can share it. null: llm_judge.sqlite in the run directory."""


@dataclass
class EvaluationConfig:
    """Sampling and judging of completions, in `nemo-care evaluate` and in validation."""

    checkpoint: str | None = None
    """The model that `nemo-care evaluate` evaluates: a Hugging Face directory, a run directory (its
    newest checkpoint) or one of its checkpoints; null: model.hf_path."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """As rollout.top_p."""
    samples_per_batch: int = 8
    """Number of prompts generated together."""
    untagged: str = "wrong"
    """How to treat a completion without an answer in answer tags: wrong, as in training, or
    whole_text (the whole completion is its answer, as in the authors' evaluation)."""
    judge: str = "none"
    """How to decide whether a reasoning supports the answer: rule (for questions whose options are
    words that the reasoning names, as in the miniature), likelihood (the answer is the likeliest of
    the options given that reasoning, under a reference model), llm (by a language model) or none.
    The completions of training's rollouts are judged only by the rule, which is free."""
    reference: str | None = None
    """The model of evaluation.judge=likelihood in `nemo-care evaluate`: a Hugging Face directory,
    or a run directory or checkpoint, of which it is then the EMA reference; null: model.hf_path. It
    should not be the evaluated model, which finds its own answers likely. Validation during
    training uses the run's current reference."""
    llm: LLMJudgeConfig = field(default_factory=LLMJudgeConfig)
    further_judges: list[str] = field(default_factory=list)
    """Judges besides evaluation.judge, whose verdicts are separate measures
    (`consistency_rate_rule`, `consistency_rate_likelihood`): rule, likelihood, or both."""
    forced_reasoning_probe: bool = False
    """Also measure how much the answer follows a given reasoning."""
    option_shuffle: bool = False
    """Also measure whether the answer follows its option's text when the letters of a
    multiple-choice question's options change and the reasoning stays (`shuffle_rate`)."""
    peer_probe: int = 0
    """Number of completions of each multiple-choice prompt to sample, as in training, for the peer
    probe: how much likelier an answer is given its own reasoning than given one that led to a
    different
    answer (`peer_probe`). Requires algorithm.shared_prompt=true. 0: not measured."""


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Check the keys under `evaluation` against each other; their ranges are in schema.py."""
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
                f"evaluation.further_judges={further}: {name} is the judge already; name it once, "
                "here or in evaluation.judge"
            )
    if evaluation.peer_probe == 1:
        raise InputError(
            "evaluation.peer_probe=1: the peer probe needs at least two completions per prompt; "
            "set it to 2 or more, or to 0"
        )


def judged_by(evaluation: EvaluationConfig, name: str) -> bool:
    """Whether a judge is used, as the main or a further judge."""
    return name in (evaluation.judge, *evaluation.further_judges)


def check_llm_judge(llm: LLMJudgeConfig) -> None:
    """Reject an endpoint or a prompt with which no request is possible."""
    for key in ("base_url", "model"):
        if not getattr(llm, key):
            raise InputError(f"evaluation.judge=llm needs evaluation.llm.{key}")
    try:
        url = urlsplit(llm.base_url or "")
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    # Not printed: the part before an @ or after a ? can be a password or a key.
    if not usable or "@" in url.netloc or url.query or not str(llm.base_url).isprintable():
        raise InputError(
            "evaluation.llm.base_url: give an address such as http://localhost:8000/v1, without "
            "user name, password or ?key=value"
        )
    # Not printed either: it can be the key itself, in the wrong place.
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
            "{reasoning} and {answer}, at least the last two, and double every brace that is text"
        )
