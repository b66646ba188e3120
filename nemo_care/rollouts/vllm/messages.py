"""The messages between a trainer and an engine over their connection; needs no vLLM."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# The call of a trainer that disconnects.
LEAVE = "leave"


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine; all its clients must use the same.

    `folder` is the checkpoint's directory on the engine's machine. `processor_files` replace the
    checkpoint's (see `Family.processor_files`). `dtype` is vLLM's name of the weights' type,
    `backend` that of its weight transfer.
    """

    folder: str
    dtype: str
    tensor_parallel_size: int
    max_tokens: int
    processor_files: dict[str, dict[str, Any]]
    backend: str
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    enforce_eager: bool
    sleeps: bool


@dataclass(frozen=True)
class Video:
    """Frames uint8 [T, H, W, 3], already resized, and the number of them per second."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class SampleRequest:
    """One prompt of which to sample `count` completions.

    `token_ids` has one token per video and image. `images` are uint8 [H, W, 3] each. `seed` is the
    first completion's; each further one's is one higher.
    """

    name: str
    token_ids: list[int]
    videos: list[Video]
    images: list[np.ndarray]
    count: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    eos_ids: list[int]


@dataclass(frozen=True)
class Sampled:
    """One completion of C tokens, up to and including EOS if it ended; `log_probs` float32 [C]."""

    token_ids: list[int]
    log_probs: np.ndarray


@dataclass(frozen=True)
class SampleReply:
    """The completions of a prompt, and the prompt's tokens in the engine's model."""

    prompt_token_ids: list[int]
    completions: list[Sampled]


@dataclass(frozen=True)
class Call:
    """A trainer's request to an engine; `number` identifies the reply to it."""

    number: int
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An engine's result, or its error as text. Number -1: the reason why no more will follow."""

    number: int
    value: Any = None
    error: str | None = None
