"""What a trainer and an engine send each other; needs no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_care.models.architecture import UNRECORDED

# The name, among vLLM's, of the loader for checkpoints whose experts are stored output first.
OUTPUT_FIRST = "nemo_care_output_first"


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
    `load_format` is that of its loader, such as `OUTPUT_FIRST`. `config` are keys of config.json
    that replace the checkpoint's. `returns_routing`: replies have the experts of each token.
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
    load_format: str = "auto"
    config: Mapping[str, Any] = field(default_factory=dict)
    returns_routing: bool = False


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
    """One completion of C tokens, up to and including EOS if it ended; `log_probs` float32 [C].

    `routing` int16 [C, layers, top_k] are the experts that its tokens went to, -1 for the last one,
    which went through no layer; None unless the engine returns them.
    """

    token_ids: list[int]
    log_probs: np.ndarray
    routing: np.ndarray | None = None


@dataclass(frozen=True)
class SampleReply:
    """The completions of a prompt, and the prompt's P tokens in the engine's model.

    `prompt_routing` int16 [P, layers, top_k] are the experts of the prompt's tokens, like
    `Sampled.routing`.
    """

    prompt_token_ids: list[int]
    completions: list[Sampled]
    prompt_routing: np.ndarray | None = None


def split_routing(rows: np.ndarray, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the experts [P + C - 1, layers, top_k] of a sequence, as vLLM returns them.

    Returns those of the `prompt` tokens P, and of the completion's C tokens (see `Sampled`).
    """
    experts = rows.astype(np.int16)
    unrecorded = np.full_like(experts[:1], UNRECORDED)
    return experts[:prompt], np.concatenate([experts[prompt:], unrecorded])
