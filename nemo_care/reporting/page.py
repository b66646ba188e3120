"""Parts of the report page. Whatever comes from a run is escaped here and nowhere else."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nemo_care.files.json_lines import Kinds, Record, complete_lines
from nemo_care.runs.metrics import OWN_REWARD
from nemo_care.runs.reader import number

_STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5c6770; --back: #ffffff;
  --card: #f5f7f9; --line: #d9dfe4; --accent: #0b66a8; --good: #0a7a4b; --bad: #b4451a; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7ea; --soft: #9aa6af; --back: #14181b; --card: #1d2327; --line: #343c43;
    --accent: #6bb6ee; --good: #5fce9d; --bad: #f09a72; }
  /* Turns the white ground dark and keeps the hues. */
  figure img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: var(--back);
  color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.state { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
thead th { color: var(--soft); font-weight: 600; font-size: .9rem; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 1.5rem; margin: 0; }
dl div { width: 14rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
figure img { display: block; height: auto; min-width: min(100%, 36rem); border-radius: 6px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem 1rem; margin: .75rem 0; }
article p { margin: .4rem 0 0; max-width: none; font-size: .85rem; color: var(--soft); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .88rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
.warning { border-left: 4px solid var(--bad); padding-left: .8rem; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--accent); }
"""

_COMPLETION: Kinds = {"prompt_index": int, "completion": str, "reward": float | None}
_LONGEST_COMPLETION = 4000  # characters
_PARTS = {
    "accuracy": "accuracy",
    "format": "format",
    "answer_likelihood": "answer likelihood",
    "bonus": "bonus",
    "reward": "reward",
    "advantage": "advantage",
}


def document(title: str, sections: Sequence[str]) -> str:
    """A whole HTML page that needs no other file; `sections` are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section with its heading; nothing where all parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, css: str = "") -> str:
    """One paragraph of plain text."""
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heading)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and values; a value of None is left out."""
    pairs = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in values.items()
        if value is not None
    )
    return "<dl>" + "\n".join(pairs) + "</dl>"


def image(file: Path, title: str, width: float) -> str:
    """A PNG file, put into the page itself; `width` is relative to the text's."""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(title)}" style="width: {min(width, 1.0):.0%}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def folded(label: str, body: str) -> str:
    """Something to unfold; `body` is HTML already."""
    return f"<details><summary>{escape(label)}</summary>\n{body}\n</details>"


def preformatted(text: str) -> str:
    """Plain text with its own line breaks."""
    return f"<pre>{escape(text)}</pre>"


def _spread(group: Sequence[Record]) -> float:
    rewards = [float(number(row.get("reward"))) for row in group]
    return max(rewards) - min(rewards)


def choose_samples(rows: Sequence[Record], groups: int = 2) -> list[Record]:
    """The best and the worst rewarded completion of the groups whose rewards differ most.

    A group whose rewards are all equal gives one completion.
    """
    by_prompt: dict[Any, list[Record]] = {}
    for row in rows:
        if not math.isnan(number(row.get("reward"))):
            by_prompt.setdefault(row.get("prompt_index"), []).append(row)
    chosen: list[Record] = []
    for group in sorted(by_prompt.values(), key=_spread, reverse=True)[:groups]:
        chosen.append(max(group, key=lambda row: row["reward"]))
        if _spread(group) > 0:
            chosen.append(min(group, key=lambda row: row["reward"]))
    return chosen


def _sample(row: Record) -> str:
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
    return f"<article>{preformatted(text)}{paragraph(' · '.join(parts))}</article>"


def samples(file: Path, step: int) -> str:
    """A few completions of one step with the parts of their rewards.

    Raises:
        InputError: a broken line.
    """
    chosen = choose_samples(complete_lines(file, optional=_COMPLETION))
    if not chosen:
        return ""
    return f"<h3>Step {step}</h3>\n" + "\n".join(_sample(row) for row in chosen)
