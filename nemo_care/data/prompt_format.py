"""The interface of a model family for creating prompts from its data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from nemo_care.data.media import Media
from nemo_care.data.patches import Grid, Patching

Encode = Callable[[str], list[int]]
"""Returns the token ids of a text."""


class PromptFormat(Protocol):
    """How a checkpoint's family represents videos and images in a prompt.

    The chat template gives one placeholder token for each of them; `expanded` replaces it with the
    tokens that the model sees.
    """

    @property
    def patching(self) -> Patching:
        """How frames are cut into patches."""

    @property
    def vocab_size(self) -> int:
        """The number of rows of the model's embedding; the tokenizer has no more tokens."""

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """Where a completion ends by config.json; used without a generation_config.json."""

    @property
    def placeholders(self) -> Mapping[str, int]:
        """The placeholder's token id by kind of media: "video" and "image"."""

    def expanded(self, token_ids: Sequence[int], media: Media, encode: Encode) -> list[int]:
        """Return the prompt's token ids, with each placeholder replaced by its media's tokens.

        Args:
            token_ids: those of the chat, with one placeholder for each video and image.
            media: the videos and images, in the same order.
            encode: for text that the family writes between vision tokens, such as times.
        """

    def collapsed(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> list[int]:
        """Invert `expanded`: return one placeholder for each video and image."""

    def positions(self, token_ids: Tensor, media: Media) -> Tensor:
        """Return rotary positions, long [3, P], of an expanded prompt's tokens [P].

        Raises:
            InputError: the vision tokens do not match the media.
        """

    def is_vision(self, token_ids: Tensor) -> Tensor:
        """Return which tokens of an expanded prompt represent a vision feature: bool [P]."""
