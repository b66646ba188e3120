"""How Qwen3-VL writes videos and images into a prompt: each temporal patch after its time."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_care.data.media import Media
from nemo_care.data.patches import Grid
from nemo_care.data.prompt_format import Encode
from nemo_care.models.families.positions import mrope_positions
from nemo_care.models.families.qwen_vl import QwenVLPrompt


@dataclass(frozen=True)
class Qwen3VLPrompt(QwenVLPrompt):
    """The family's `PromptFormat`.

    An image's placeholder is repeated once per vision token. A video's becomes, for each temporal
    patch, the text `<1.5 seconds>` and that patch's vision tokens between `vision_start` and
    `vision_end`; the chat template's own pair of these stays around all of it.
    """

    vision_start: int
    vision_end: int

    def expanded(self, token_ids: Sequence[int], media: Media, encode: Encode) -> list[int]:
        """As `PromptFormat.expanded`."""
        items = zip(media.grids, media.prompt_times, strict=True)
        expanded: list[int] = []
        for token in token_ids:
            # One too many (a tokenizer that has them as words) is refused with the positions.
            item = next(items, None) if token in self.placeholders.values() else None
            if item is None:
                expanded.append(token)
            elif token == self.placeholders["image"]:
                expanded += [token] * self.patching.tokens(item[0])
            else:
                (steps, height, width), times = item
                vision = [token] * self.patching.tokens((1, height, width))
                for time in self.patch_times(times, steps):
                    text = encode(f"<{time:.1f} seconds>")
                    expanded += [*text, self.vision_start, *vision, self.vision_end]
        return expanded

    def patch_times(self, times: Sequence[float], steps: int) -> list[float]:
        """Seconds of each of the `steps` temporal patches: between its first and last frame."""
        frames = self.patching.frames
        # The last patch is filled with the last frame.
        times = [*times, *[times[-1]] * (steps * frames - len(times))]
        return [
            (times[first] + times[first + frames - 1]) / 2
            for first in range(0, steps * frames, frames)
        ]

    def collapsed(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> list[int]:
        """As `PromptFormat.collapsed`."""
        video, image = self.placeholders["video"], self.placeholders["image"]
        ids, collapsed, place = list(token_ids), list[int](), 0
        for steps, height, width in grids:
            start = next(n for n in range(place, len(ids)) if ids[n] in (video, image))
            if ids[start] == image:
                collapsed += [*ids[place:start], image]
                place = start + self.patching.tokens((steps, height, width))
                continue
            # The template's own vision_start is the one before the first patch's.
            before = start - 2
            while ids[before] != self.vision_start:
                before -= 1
            collapsed += [*ids[place : before + 1], video]
            place = start
            for _ in range(steps):
                place = ids.index(self.vision_end, place) + 1
        return [*collapsed, *ids[place:]]

    def positions(self, token_ids: Tensor, media: Media) -> Tensor:
        """As `PromptFormat.positions`: a video counts as one image per temporal patch."""
        # An image has one step in time anyway.
        grids = [(1, height, width) for steps, height, width in media.grids for _ in range(steps)]
        return mrope_positions(
            token_ids,
            grids,
            [0.0] * len(grids),
            image_token_id=self.placeholders["image"],
            video_token_id=self.placeholders["video"],
            merge_size=self.patching.merge,
        )
