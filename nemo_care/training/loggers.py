"""The loggers of a run: TensorBoard, W&B, MLflow. Their errors never end the run."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Protocol

from nemo_care.process.screen import printable

_TABLE = "completions"
_COLUMNS = {
    "prompt_id": "prompt",
    "question": "question",
    "solution": "solution",
    "completion": "completion",
    "accuracy": "accuracy",
    "answer_likelihood": "likelihood",
    "bonus": "bonus",
    "reward": "reward",
    "advantage": "advantage",
}


class MetricLogger(Protocol):
    """A logger of NeMo's experiment manager: TensorBoard, W&B or MLflow."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record the metrics of a step."""
        ...


class Loggers:
    """Passes metrics to all loggers of a run, isolating the errors of each.

    The run directory already has every record, so an error of a logger is a warning, printed once
    per logger, and the others still receive the metrics. A failing logger may block for minutes
    (if a server does not respond), so it is skipped for the next call, then for the next 2, 4, 8,
    ... calls, until one succeeds.
    """

    def __init__(self, loggers: Sequence[MetricLogger], warn: Callable[[str], None]) -> None:
        """Report errors with `warn`, which prints one line."""
        self._loggers = [_Guarded(logger, warn) for logger in loggers]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics; rank 0 only. Never raises an error of a logger."""
        # A copy, because loggers add keys.
        self._each(step, lambda logger: logger.log_metrics(dict(metrics), step=step))

    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Record rows of `rollouts/` as a table, where a logger has tables or texts."""
        self._each(step, lambda logger: _log_table(logger, rows, step))

    def _each(self, step: int, record: Callable[[Any], None]) -> None:
        for logger in self._loggers:
            logger.log(record, step)


def _log_table(logger: Any, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """To W&B as a table, to TensorBoard as a text; MLflow has neither by step."""
    cells = [[_cell(row.get(key)) for key in _COLUMNS] for row in rows]
    if hasattr(logger, "log_table"):
        logger.log_table(_TABLE, columns=[*_COLUMNS.values()], data=cells, step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_text"):
        logger.experiment.add_text(_TABLE, _html([[*_COLUMNS.values()], *cells]), step)


def _cell(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _html(lines: Sequence[Sequence[Any]]) -> str:
    """A table as TensorBoard's Markdown takes it: HTML, in which nothing else is Markdown."""

    def text(value: Any) -> str:
        # No empty line, which would end the block of HTML.
        return escape(str(value)).replace("\n", "<br>")

    rows = ("".join(f"<td>{text(value)}</td>" for value in line) for line in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


class _Guarded:
    """One logger, and for how many calls it is still skipped."""

    def __init__(self, logger: MetricLogger, warn: Callable[[str], None]) -> None:
        self._logger = logger
        self._warn = warn
        self._failures = 0  # since the last success
        self._calls_left_out = 0
        self._has_warned = False

    def log(self, record: Callable[[Any], None], step: int) -> None:
        """Call `record` with the logger, unless it is left out."""
        if self._calls_left_out:
            self._calls_left_out -= 1
            return
        try:
            record(self._logger)
        except Exception as error:
            self._calls_left_out = 2**self._failures
            self._failures += 1
            if not self._has_warned:
                self._has_warned = True
                self._warn(
                    f"step {step}: {type(self._logger).__name__} could not record the metrics "
                    f"({reason(error)}); training continues, and metrics.jsonl has every step "
                    "(warned once; the logger is retried at growing intervals)"
                )
        else:
            self._failures = 0


def reason(error: BaseException) -> str:
    """Return the root cause on one line, with its type; loggers wrap it in their own errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}" if text else name
