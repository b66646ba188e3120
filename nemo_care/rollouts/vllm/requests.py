"""A prompt as vLLM takes it: the same tokens, frames and positions as in training.

Videos and images were decoded once, and a prompt holds their patches. vLLM cuts frames into patches
itself, so the frames are made of the patches again, which is exact.
"""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig

from nemo_care.data.patches import Grid, PatchSize
from nemo_care.data.prompts import Prompt
from nemo_care.data.unpatch import patches_to_frames
from nemo_care.errors import RunFailed
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.vllm.messages import SampleRequest, Video

# Rounding of two computations can be told apart by a few units in the last place.
_STEPS = 16


class RequestBuilder:
    """Makes requests for one model."""

    def __init__(self, hf: Qwen2_5_VLConfig, eos_ids: frozenset[int]) -> None:
        """`hf` is the model's configuration; a completion ends at any of `eos_ids`."""
        vision = hf.vision_config
        self.hf = hf
        self.eos_ids = sorted(eos_ids)
        self.patch = PatchSize(
            vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        )

    def build(self, prompt: Prompt, sampling: Sampling) -> SampleRequest:
        """The request for a group of completions of this prompt."""
        videos: list[Video] = []
        images: list[np.ndarray] = []
        for is_video, grid, seconds, frames in self._items(prompt):
            if is_video:
                fps = self._fps(prompt, grid, seconds)
                videos.append(Video(frames.numpy(), fps))
            else:
                images.append(frames[0].numpy())
        return SampleRequest(
            name=prompt.sample.sample_id,
            token_ids=self._collapsed(prompt),
            videos=videos,
            images=images,
            # vLLM refuses several greedy completions, which would be the same.
            count=sampling.group_size if sampling.temperature > 0 else 1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed_of(sampling, prompt.index),
            eos_ids=self.eos_ids,
        )

    def _grids(self, prompt: Prompt) -> list[Grid]:
        return [] if prompt.grid_thw is None else [tuple(g) for g in prompt.grid_thw.tolist()]

    def _starts(self, prompt: Prompt) -> list[int]:
        """Where the tokens of each video and image begin."""
        starts, cursor = [], 0
        for grid in self._grids(prompt):
            cursor += int(prompt.is_vision[cursor:].nonzero()[0])
            starts.append(cursor)
            cursor += self.patch.tokens(grid)
        return starts

    def _collapsed(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens with one for each video and image, as before they were decoded."""
        keep = torch.ones(prompt.length, dtype=torch.bool)
        for start, grid in zip(self._starts(prompt), self._grids(prompt), strict=True):
            keep[start + 1 : start + self.patch.tokens(grid)] = False
        return prompt.token_ids[keep].tolist()

    def _items(self, prompt: Prompt) -> Iterator[tuple[bool, Grid, float, torch.Tensor]]:
        """Each item of the prompt: whether it is a video, its grid, seconds per grid, frames."""
        grids = self._grids(prompt)
        if not grids:
            return
        assert prompt.pixel_values is not None, "a prompt with grids has patches"
        parts = prompt.pixel_values.split([t * h * w for t, h, w in grids])
        for start, grid, seconds, part in zip(
            self._starts(prompt), grids, prompt.seconds_per_grid, parts, strict=True
        ):
            is_video = int(prompt.token_ids[start]) == self.hf.video_token_id
            yield is_video, grid, seconds, patches_to_frames(part, grid, self.patch)

    def _fps(self, prompt: Prompt, grid: Grid, seconds: float) -> float:
        """The frame rate from which vLLM computes our positions.

        vLLM makes seconds per grid of it, keeps them as float32 and multiplies in another order.
        Where a product is a whole number but for rounding, the seconds are moved by a few units in
        the last place.
        """
        speed = self.hf.vision_config.tokens_per_second
        steps = torch.arange(grid[0])
        ours = (steps * seconds * speed).long().numpy()
        exact = np.float32(seconds)
        lower = upper = exact
        candidates = [exact]
        for _ in range(_STEPS):
            lower, upper = np.nextafter(lower, np.float32(0)), np.nextafter(upper, np.float32(1e9))
            candidates += [lower, upper]
        for candidate in candidates:
            fps = self.patch.frames / float(candidate)
            if np.array_equal(vllm_times(fps, grid[0], self.patch.frames, speed), ours):
                return fps
        raise RunFailed(
            f"sample {prompt.sample.sample_id}: no frame rate near {self.patch.frames / seconds:g} "
            f"gives vLLM the positions {ours.tolist()} of its {grid[0]} grid steps; sample with "
            "rollout.backend=megatron, or report it with the video's frame rate"
        )


def vllm_times(
    fps: float, steps: int, frames_per_step: int, tokens_per_second: float
) -> np.ndarray:
    """Positions in time [steps] that vLLM gives a video of this frame rate, from 0."""
    seconds = float(np.float32(frames_per_step / fps))
    return (np.arange(steps) * (seconds * tokens_per_second)).astype(np.int64)


def seed_of(sampling: Sampling, index: int) -> int:
    """A seed below 2**62 for the prompt of this index; its completions take the next numbers."""
    words = np.random.SeedSequence([*sampling.seed, index]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(2))
