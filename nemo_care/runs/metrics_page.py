"""Make a page with every metric from the declarations.

python -m nemo_care.runs.metrics_page > docs/metrics.md
"""

from nemo_care.process.screen import say
from nemo_care.runs.metric import Metric, Reduction
from nemo_care.runs.metrics import DECLARED, SECTIONS, SHEETS

_HEAD = """# Metrics

Made by `make docs` from the declarations in `nemo_care/runs/metrics.py`. Each step of a run is a
line of `metrics.jsonl` in the run directory; TensorBoard, W&B and MLflow receive the same names,
and `nemo-care report` draws those with a panel. A value is null if there is nothing to measure: no
answer, no reference, no GPU, an update that was left out. Sampled completions count whether the
step trained on them or not (`rollout.dynamic_sampling`). With several updates per rollout, `train/`
describes the last one, and the comparisons with rollout and reference are made before the first.
Parts of a name in capitals depend on the run.
"""


def page() -> str:
    """Return the page as Markdown."""
    lines = [_HEAD]
    for section, title in SECTIONS.items():
        lines += [f"## {title}", ""]
        lines += ["| metric | meaning | over | a good value | report |", "| --- " * 5 + "|"]
        lines += [_row(metric) for metric in DECLARED.values() if metric.section == section]
        lines.append("")
    sheets = ", ".join(f"{sheet.title.lower()} (`report/{sheet.name}.png`)" for sheet in SHEETS)
    lines += [f"The report's pictures of these metrics: {sheets}.", ""]
    return "\n".join(lines)


def _row(metric: Metric) -> str:
    over = str(metric.over)
    if metric.reduction is not Reduction.NONE:
        over = f"{metric.reduction} over the {over}"
    panel = metric.panel.title if metric.panel else ""
    return f"| `{metric}` | {metric.meaning} | {over} | {metric.good} | {panel} |"


if __name__ == "__main__":
    say(page(), end="")
