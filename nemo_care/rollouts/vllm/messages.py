"""What a trainer and an engine tell each other over their connection; needs no vLLM."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# The call of a trainer that has no more to ask.
LEAVE = "leave"


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is made; whoever connects to it later has to want the same.

    `folder` is the checkpoint's directory as the engine's machine sees it. `processor_files`
    replace the checkpoint's (see `Family.processor_files`). `dtype` is vLLM's name of the weights'
    type, `backend` that of its weight transfer.
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
    """Frames uint8 [T, H, W, 3], already resized, and how many of them cover one second."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class SampleRequest:
    """One prompt to sample `count` completions of.

    `token_ids` has one token per video and image. `images` are uint8 [H, W, 3] each. `seed` is that
    of the first completion; the next have the next numbers.
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
    """One completion of C tokens, up to and with EOS where it ended; `log_probs` float32 [C]."""

    token_ids: list[int]
    log_probs: np.ndarray


@dataclass(frozen=True)
class SampleReply:
    """Completions of a prompt, and the prompt's tokens as the engine's model saw them."""

    prompt_token_ids: list[int]
    completions: list[Sampled]


@dataclass(frozen=True)
class Call:
    """Trainer to engine: do something; `number` tells this call's reply from others'."""

    number: int
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """Engine to trainer: the result, or the error in words. Number -1: why there is no more."""

    number: int
    value: Any = None
    error: str | None = None
