"""Faults that are put into a rank before it starts."""

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nemo_care.data.media import Media, MediaRequest

HANGING = "train_00007"


def inject(kind: str, rank: int, **where: Any) -> None:
    """Let a fault strike that rank.

    `kill` and `nan_gradient` strike in the middle of `phase` (rollout, scoring, update, checkpoint)
    of `step`; with `hanging_decoder` the video of one sample never ends.
    """
    if os.environ["RANK"] != str(rank):
        return
    if kind == "hanging_decoder":
        _replace_loading()
    else:
        strike = {"kill": _kill, "nan_gradient": _nan_gradient}[kind]
        _in_phase(strike=strike, **where)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _nan_gradient() -> None:
    _GRADIENT.append(torch.nan)


_GRADIENT: list[float] = []


def _replace_loading() -> None:
    from nemo_care.data.decoding import DecodingWorkers

    DecodingWorkers.__init__ = functools.partialmethod(  # type: ignore[method-assign]
        DecodingWorkers.__init__, load=load_or_hang
    )


def load_or_hang(request: "MediaRequest") -> "Media":
    """For decoding processes."""
    from nemo_care.data.media import load_media

    if any(path.stem == HANGING for path in request.videos):
        time.sleep(3600)
    return load_media(request)


def _in_phase(phase: str, step: int, strike: Callable[[], None]) -> None:
    from nemo_care.checkpoints.manifest import HashedFile
    from nemo_care.models.video_language_model import VideoLanguageModel
    from nemo_care.training.console import Console
    from nemo_care.training.step import Step
    from nemo_care.training.trainer import GRPOCareTrainer

    now: dict[str, Any] = {"phase": None, "step": 0, "calls": 0}
    run_training_step, show, forward = (
        GRPOCareTrainer.run_training_step,
        Console.phase,
        VideoLanguageModel.forward,
    )
    close = HashedFile.close

    def note_step(self: GRPOCareTrainer, step: Step) -> None:
        now["step"] = step.number
        run_training_step(self, step)

    def note_phase(self: Console, name: str) -> None:
        now.update(phase=name, calls=0)
        show(self, name)

    def struck_forward(self: VideoLanguageModel, *arguments: Any, **keywords: Any) -> Any:
        out = forward(self, *arguments, **keywords)
        if (now["phase"], now["step"]) == (phase, step):
            now["calls"] += 1
            # In the middle of the phase: one micro-batch, or one token, is done.
            if now["calls"] == 2:
                strike()
        if _GRADIENT and out.requires_grad:
            value = _GRADIENT.pop()
            out.register_hook(lambda gradient: gradient * value)
        return out

    def struck_close(self: HashedFile) -> None:
        folder = Path(self._file.name).parent.name
        close(self)
        # One file of the checkpoint is on the disk; training may be a step further.
        if folder.startswith(f"step_{step:06d}.partial"):
            strike()

    GRPOCareTrainer.run_training_step = note_step
    Console.phase = note_phase
    VideoLanguageModel.forward = struck_forward
    if phase == "checkpoint":
        HashedFile.close = struck_close
