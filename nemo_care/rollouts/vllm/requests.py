"""A prompt as a vLLM request: the same tokens, frames and positions as in training.

vLLM cuts frames into patches itself and gets them in the size that they have in training.
"""

import numpy as np

from nemo_care.data.prompts import Prompt
from nemo_care.errors import RunFailed
from nemo_care.models.family import Family
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.vllm.messages import SampleRequest, Video


class RequestBuilder:
    """Builds requests for one model."""

    def __init__(self, family: Family, eos_ids: frozenset[int]) -> None:
        """`family` is the model's; a completion ends at any of `eos_ids`."""
        self.family = family
        self.eos_ids = sorted(eos_ids)

    def build(self, prompt: Prompt, sampling: Sampling) -> SampleRequest:
        """Return the request for a group of completions of this prompt, whose frames are here."""
        videos: list[Video] = []
        images: list[np.ndarray] = []
        grids = [] if prompt.grid_thw is None else [tuple(g) for g in prompt.grid_thw.tolist()]
        token_ids = self.family.prompt.collapsed(prompt.token_ids.tolist(), grids)
        placeholders = self.family.prompt.placeholders
        items = [token for token in token_ids if token in placeholders.values()]
        for token, grid, seconds, times, frames in zip(
            items, grids, prompt.seconds_per_grid, prompt.prompt_times, prompt.frames, strict=True
        ):
            if token == placeholders["video"]:
                try:
                    fps = self.family.video_fps(grid, seconds)
                except RunFailed as error:
                    raise RunFailed(f"sample {prompt.sample.sample_id}: {error}") from error
                numbers = self.family.frame_numbers(times, len(frames))
                videos.append(Video(frames.numpy(), fps, numbers))
            else:
                images.append(frames[0].numpy())
        return SampleRequest(
            name=prompt.sample.sample_id,
            token_ids=token_ids,
            videos=videos,
            images=images,
            # vLLM refuses several greedy completions, which would be equal.
            count=sampling.group_size if sampling.temperature > 0 else 1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed_of(sampling, prompt.index),
            eos_ids=self.eos_ids,
        )


def seed_of(sampling: Sampling, index: int) -> int:
    """Return a seed below 2**62 for a prompt's index; its completions use the next numbers."""
    words = np.random.SeedSequence([*sampling.seed, index]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(2))
