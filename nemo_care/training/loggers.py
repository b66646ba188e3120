"""The loggers of a run: TensorBoard, W&B, MLflow. Their errors never end the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


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
        for logger in self._loggers:
            logger.log(metrics, step)


class _Guarded:
    """One logger, and for how many calls it is still skipped."""

    def __init__(self, logger: MetricLogger, warn: Callable[[str], None]) -> None:
        self._logger = logger
        self._warn = warn
        self._failures = 0  # since the last success
        self._calls_left_out = 0
        self._has_warned = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._calls_left_out:
            self._calls_left_out -= 1
            return
        try:
            # A copy, because loggers add keys.
            self._logger.log_metrics(dict(metrics), step=step)
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
