"""Convert a user's message to token ids, with control tokens only from the chat template.

A tokenizer recognises `<|im_end|>` in any text. In a question it is ordinary text: it must neither
end the user's turn nor represent a video.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from nemo_care.errors import InputError
from nemo_care.objective.text import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

Content = Sequence[Mapping[str, str]]
"""The parts of a user's message, in the form of chat templates."""

# Prompts have to contain these tags, and a tokenizer may have them as tokens.
_TAGS = {THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE}
# From Unicode's private use area, so no text should contain it.
_MARK = "\ue000"


class ChatEncoder:
    """Renders and tokenizes prompts with one tokenizer and its chat template."""

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        """`base` must have a chat template."""
        self.base = base

    def encode(self, content: Content) -> list[int]:
        """Return a prompt's token ids for a user message `content`, one token per video or image.

        The template's control tokens become tokens; those in the content's texts do not.

        Raises:
            InputError: a text contains a control token that this tokenizer can't write as text.
        """
        texts = [part["text"] for part in content if "text" in part]
        found = [token for text in texts for token in self._control_regex.findall(text)]
        if not found:
            return self.base(self.render(content), add_special_tokens=False)["input_ids"]
        # A mark splits the texts' control tokens in two. Those still whole in the rendered chat are
        # the template's.
        mark = _MARK
        while any(mark in text for text in texts):
            mark += _MARK

        def broken(text: str) -> str:
            return self._control_regex.sub(lambda match: match[0][:1] + mark + match[0][1:], text)

        chat = self.render(_with_texts(content, broken))
        pieces = _any_of(self._added).split(chat)
        ids = [token for piece in pieces for token in self._ids_of_piece(piece, mark)]
        own = self._control_regex.findall(self.render(_with_texts(content, lambda text: "x")))
        wanted = sorted(self._control[token] for token in own)
        control = set(self._control.values())
        is_whole = chat.count(mark) >= len(found)
        if not is_whole or sorted(token for token in ids if token in control) != wanted:
            raise InputError(
                f"the question holds {found[0]}, a control token of the chat, and this tokenizer "
                "or chat template can't write it as text; reword the question"
            )
        return ids

    def render(self, content: Content) -> str:
        """Return the chat template's text of a prompt for a user message `content`."""
        return self.base.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    @cached_property
    def _added(self) -> dict[str, int]:
        """Tokens that the tokenizer finds in any text before it splits words, with their ids."""
        return {token.content: n for n, token in self.base.added_tokens_decoder.items()}

    @cached_property
    def _control(self) -> dict[str, int]:
        """The added tokens that are neither words nor the tags.

        They are special or in angle brackets: some are not special, such as `<|fim_prefix|>`.
        """
        return {
            token.content: number
            for number, token in self.base.added_tokens_decoder.items()
            if token.content not in _TAGS
            and (token.special or re.fullmatch(r"<.+>", token.content, re.DOTALL))
        }

    @cached_property
    def _control_regex(self) -> re.Pattern[str]:
        return _any_of(self._control)

    @cached_property
    def _words(self) -> Tokenizer:
        """The tokenizer without any added token, which takes a second to create."""
        content = json.loads(self.base.backend_tokenizer.to_str())
        content |= {"added_tokens": [], "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(content))

    def _ids_of_piece(self, piece: str, mark: str) -> list[int]:
        """Return the ids of an added token, or of text between added tokens, with marks in it."""
        if piece in self._added:
            return [self._added[piece]]
        return self._words.encode(piece.replace(mark, ""), add_special_tokens=False).ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern for any of the tokens, longest match first, with a group for `split`."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered)) or '(?!)'})")


def _with_texts(content: Content, change: Callable[[str], str]) -> list[Mapping[str, str]]:
    """Return the content with its texts changed."""
    return [{**part, "text": change(part["text"])} if "text" in part else part for part in content]
