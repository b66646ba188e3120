"""What vLLM has to be given to see a Qwen2.5-VL's prompts as they are trained."""

from typing import Any

import numpy as np
import torch

from nemo_care.data.patches import Grid
from nemo_care.errors import RunFailed
from nemo_care.models.families.patches import PatchSize
from nemo_care.models.families.processor_files import processing
from nemo_care.models.families.qwen2_5_vl.prompt import Qwen25VLPrompt

_LEAST_PIXELS = 28 * 28
# Two computations differ by rounding, a few units in the last place.
_STEPS = 16


def processor_files(patching: PatchSize, max_pixels: int) -> dict[str, dict[str, Any]]:
    """As `Family.processor_files`."""
    common = {
        # vLLM normalises on the GPU, and reads here alone how.
        **processing(patching),
        "size": {"shortest_edge": _LEAST_PIXELS, "longest_edge": max(max_pixels, _LEAST_PIXELS)},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    return {
        "preprocessor_config.json": common | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": common
        | {"video_processor_type": "Qwen2VLVideoProcessor"},
    }


def video_fps(prompt: Qwen25VLPrompt, grid: Grid, seconds: float) -> float:
    """As `Family.video_fps`.

    vLLM makes seconds per grid of it, keeps them as float32 and multiplies in another order. Where
    a product is a whole number but for rounding, the seconds are moved by a few units in the last
    place.
    """
    speed, frames = prompt.tokens_per_second, prompt.patching.frames
    steps = torch.arange(grid[0])
    ours = (steps * seconds * speed).long().numpy()
    exact = np.float32(seconds)
    lower = upper = exact
    candidates = [exact]
    for _ in range(_STEPS):
        lower, upper = np.nextafter(lower, np.float32(0)), np.nextafter(upper, np.float32(1e9))
        candidates += [lower, upper]
    for candidate in candidates:
        fps = frames / float(candidate)
        if np.array_equal(vllm_times(fps, grid[0], frames, speed), ours):
            return fps
    raise RunFailed(
        f"no frame rate near {frames / seconds:g} gives vLLM the positions {ours.tolist()} of its "
        f"{grid[0]} grid steps; sample with rollout.backend=megatron, or report it with the "
        "video's frame rate"
    )


def vllm_times(
    fps: float, steps: int, frames_per_step: int, tokens_per_second: float
) -> np.ndarray:
    """Positions in time [steps] that vLLM gives a video of this frame rate, from 0."""
    seconds = float(np.float32(frames_per_step / fps))
    return (np.arange(steps) * (seconds * tokens_per_second)).astype(np.int64)
