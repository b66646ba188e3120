"""What the data pipeline asks of a model family to make prompts for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from nemo_care.data.media import Media
from nemo_care.data.patches import Grid, Patching

Encode = Callable[[str], list[int]]
"""Token ids of a text."""


class PromptFormat(Protocol):
    """How one checkpoint's family writes videos and images into a prompt.

    The chat template gives one placeholder token for each of them; `expanded` makes the tokens of
    it that the model sees.
    """

    @property
    def patching(self) -> Patching:
        """How frames become patches."""

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding: the tokenizer has no more tokens."""

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """Where a completion ends by config.json; counts without generation_config.json."""

    @property
    def placeholders(self) -> Mapping[str, int]:
        """The placeholder's token id by kind: "video" and "image"."""

    def expanded(self, token_ids: Sequence[int], media: Media, encode: Encode) -> list[int]:
        """The prompt's token ids with each placeholder replaced by what its media need.

        Args:
            token_ids: of the chat, with one placeholder for each video and image.
            media: what they hold, in the same order.
            encode: for text that the family writes between vision tokens, such as times.
        """

    def collapsed(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> list[int]:
        """The inverse of `expanded`: one placeholder for each video and image."""

    def positions(self, token_ids: Tensor, media: Media) -> Tensor:
        """Rotary positions long [3, P] of an expanded prompt's tokens [P].

        Raises:
            InputError: the vision tokens do not match the media.
        """

    def is_vision(self, token_ids: Tensor) -> Tensor:
        """Which tokens of an expanded prompt stand for a vision feature: bool [P]."""
