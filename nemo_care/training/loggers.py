"""The loggers of a run: TensorBoard, W&B, MLflow. None of them can end it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class MetricLogger(Protocol):
    """What NeMo's experiment manager gives: TensorBoard, W&B, MLflow."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record the metrics of a step."""
        ...


class Loggers:
    """Gives metrics to all loggers of a run, whatever happens to one of them.

    The run directory holds every record already, so an error of a logger is a warning, printed once
    for each logger, and the others still get the metrics. A failing logger may take minutes before
    it gives up (a server that does not answer), so it is left out of the next call, then of the
    next 2, 4, 8, ... calls, until one succeeds.
    """

    def __init__(self, loggers: Sequence[MetricLogger], warn: Callable[[str], None]) -> None:
        """`warn` prints one line."""
        self._loggers = [_Guarded(logger, warn) for logger in loggers]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics; rank 0 only. Raises nothing that a logger raises."""
        for logger in self._loggers:
            logger.log(metrics, step)


class _Guarded:
    """One logger, and how long it is still left out."""

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
            # A copy: loggers add keys of their own.
            self._logger.log_metrics(dict(metrics), step=step)
        except Exception as error:
            self._calls_left_out = 2**self._failures
            self._failures += 1
            if not self._has_warned:
                self._has_warned = True
                self._warn(
                    f"step {step}: {type(self._logger).__name__} could not record the metrics "
                    f"({reason(error)}); training continues, and metrics.jsonl has every step "
                    "(warned once; the logger is tried again at growing intervals)"
                )
        else:
            self._failures = 0


def reason(error: BaseException) -> str:
    """The error on one line, with its type; loggers hide the cause in errors of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}" if text else name
