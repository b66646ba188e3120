"""What a trainer and an engine send each other; needs no vLLM."""

from dataclasses import dataclass
from typing import Any

import numpy as np


class CallFailed(Exception):
    """An engine refused a call, but can take others."""


class EngineFailed(Exception):
    """vLLM has failed: the engine can take no further call."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine.

    `folder` is the checkpoint's directory on the engine's machine. `processor_files` replace the
    checkpoint's (see `Family.processor_files`). `dtype` is vLLM's name of the weights' type,
    `backend` that of its weight transfer, `executor` that of its workers: "uni" for its own
    process, "mp" for processes of its machine, "ray" for actors on several machines.
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
    executor: str


@dataclass(frozen=True)
class Video:
    """Frames uint8 [T, H, W, 3], already resized; `numbers` divided by `fps` are their seconds."""

    frames: np.ndarray
    fps: float
    numbers: list[float]


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
