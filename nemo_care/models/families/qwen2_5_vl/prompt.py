"""How Qwen2.5-VL writes videos and images into a prompt: one token per merged patch."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_care.data.media import Media
from nemo_care.data.patches import Grid
from nemo_care.data.prompt_format import Encode
from nemo_care.models.families.positions import mrope_positions
from nemo_care.models.families.qwen_vl import QwenVLPrompt


@dataclass(frozen=True)
class Qwen25VLPrompt(QwenVLPrompt):
    """The family's `PromptFormat`: a placeholder is repeated once per vision token.

    `tokens_per_second` is how many positions a second of video takes.
    """

    tokens_per_second: int

    def expanded(self, token_ids: Sequence[int], media: Media, encode: Encode) -> list[int]:
        """As `PromptFormat.expanded`; no text is added."""
        counts = map(self.patching.tokens, media.grids)
        expanded: list[int] = []
        for token in token_ids:
            # One too many (a tokenizer that has them as words) is refused with the positions.
            expanded += [token] * (next(counts, 1) if self._stands_for_media(token) else 1)
        return expanded

    def collapsed(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> list[int]:
        """As `PromptFormat.collapsed`."""
        counts = map(self.patching.tokens, grids)
        collapsed: list[int] = []
        place = 0
        while place < len(token_ids):
            token = token_ids[place]
            collapsed.append(token)
            place += next(counts) if self._stands_for_media(token) else 1
        return collapsed

    def positions(self, token_ids: Tensor, media: Media) -> Tensor:
        """As `PromptFormat.positions`, by `mrope_positions`."""
        return mrope_positions(
            token_ids,
            media.grids,
            media.seconds_per_grid,
            image_token_id=self.placeholders["image"],
            video_token_id=self.placeholders["video"],
            merge_size=self.patching.merge,
            tokens_per_second=self.tokens_per_second,
        )

    def _stands_for_media(self, token: int) -> bool:
        return token in self.placeholders.values()
