"""Pages that work offline: Jinja templates filled with the data of a run or a study."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_care.files.json_lines import Kinds, Record, complete_lines
from nemo_care.process.os_errors import naming
from nemo_care.runs.metrics import OWN_REWARD
from nemo_care.runs.reader import number

_COMPLETION: Kinds = {"prompt_index": int, "completion": str, "reward": float | None}
_LONGEST_COMPLETION = 4000  # characters
_SHOWN_GROUPS = 2
_PARTS = {
    "accuracy": "accuracy",
    "format": "format",
    "answer_likelihood": "answer likelihood",
    "bonus": "bonus",
    "reward": "reward",
    "advantage": "advantage",
}


def write_page(target: Path, template: str, **values: Any) -> None:
    """Fill a file of `templates/` and write it; all values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(values)
    # JSON can contain lone surrogates, which can't be written as UTF-8.
    with naming(target):
        target.write_text(text, encoding="utf-8", errors="replace")


def _spread(group: Sequence[Record]) -> float:
    rewards = [float(number(row.get("reward"))) for row in group]
    return max(rewards) - min(rewards)


def choose_samples(rows: Sequence[Record]) -> list[Record]:
    """Return the best and worst completion of the two groups whose rewards differ most.

    A group whose rewards are all equal gives one completion.
    """
    by_prompt: dict[Any, list[Record]] = {}
    for row in rows:
        if not math.isnan(number(row.get("reward"))):
            by_prompt.setdefault(row.get("prompt_index"), []).append(row)
    chosen: list[Record] = []
    for group in sorted(by_prompt.values(), key=_spread, reverse=True)[:_SHOWN_GROUPS]:
        chosen.append(max(group, key=lambda row: row["reward"]))
        if _spread(group) > 0:
            chosen.append(min(group, key=lambda row: row["reward"]))
    return chosen


def _sample(row: Record) -> tuple[str, str]:
    text = str(row.get("completion", ""))
    if len(text) > _LONGEST_COMPLETION:
        left = len(text) - _LONGEST_COMPLETION
        text = f"{text[:_LONGEST_COMPLETION]} … ({left} more characters)"
    parts = [f"prompt {row.get('prompt_id', '?')}"]
    own = {key: key for key in row if OWN_REWARD.match(key)}
    for key, name in (_PARTS | own).items():
        value = number(row.get(key))
        if not math.isnan(value):
            parts.append(f"{name} {value:.3g}")
        elif key == "answer_likelihood":
            parts.append("no answer to score")
    tokens = row.get("tokens")
    if tokens is not None:
        parts.append(f"{tokens} tokens" + ("" if row.get("ended", True) else ", cut off"))
    return text, " · ".join(parts)


def samples(file: Path) -> list[tuple[str, str]]:
    """Return a few completions of one step, each with the parts of its reward.

    Raises:
        InputError: a line is damaged.
    """
    return [_sample(row) for row in choose_samples(complete_lines(file, optional=_COMPLETION))]
