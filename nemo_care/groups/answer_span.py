"""Find the tokens of a completion that are its answer (arXiv 2506.16141, step 3)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_care.objective.text import ANSWER_OPEN, CharacterSpan, find_answer

if TYPE_CHECKING:
    from torch import Tensor

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""The character that decoders write for bytes that are not UTF-8, or not yet."""


@dataclass(frozen=True)
class AnswerTokens:
    """The tokens of a completion's answer, and how they connect to the text around it.

    `start` and `end` are a half-open range of token indices. These tokens decode to `before`, the
    answer without surrounding white space (`text`), and `after`: `>B` has ">" before the answer.
    `space` is the white space between the opening tag and the answer. `cuts` maps each place inside
    or right after the opening tag where a token begins, as the number of the tag's characters
    before it, to the index of the token.

    Example:
        `<`, `answer`, `>B`, `</`, `answer`, `>` has start 2, end 3, before ">", text "B", after "",
        space "" and cuts {0: 0, 1: 1, 7: 2}.
    """

    start: int
    end: int
    before: str
    text: str
    after: str
    space: str
    cuts: dict[int, int]

    @property
    def span(self) -> tuple[int, int]:
        """The half-open range of token indices."""
        return self.start, self.end


def answer_token_span(tokenizer: Any, token_ids: Sequence[int] | Tensor) -> tuple[int, int] | None:
    """Return the half-open range of the answer's tokens in `token_ids` [C], or None without any.

    See `find_answer_tokens`.
    """
    found = find_answer_tokens(tokenizer, token_ids)
    return None if found is None else found.span


def find_answer_tokens(tokenizer: Any, token_ids: Sequence[int] | Tensor) -> AnswerTokens | None:
    """Find the answer's tokens in `token_ids` [C]; None if the completion has no answer.

    The answer is the text inside the last well-formed `<answer>...</answer>` without surrounding
    white space. A token belongs to it if it contains at least one of the answer's characters,
    whatever else it contains: real vocabularies write `<answer>B</answer>` with the token `>B`.
    Tokens of only tags or white space don't count. An answer of white space alone has no tokens.

    `tokenizer` needs the Hugging Face `decode`; `token_ids` are the generated tokens of one
    completion, including EOS, as a list or a 1-D tensor. They can differ from the tokenizer's
    encoding of the text, because offsets come from decoding prefixes of these very tokens.
    """
    ids = _as_list(token_ids)
    offsets = _TokenOffsets(tokenizer, ids)
    inner = find_answer(offsets.text)
    if inner is None:
        return None
    inside = offsets.text[slice(*inner)]
    answer = inside.strip()
    start = inner[0] + len(inside) - len(inside.lstrip())
    end = start + len(answer)
    if not answer:
        return None

    # Both ends of a token's range increase with its index, so two bisections find the overlap.
    def reaches_answer(index: int) -> bool:
        return offsets[index][1] > start

    def passes_answer(index: int) -> bool:
        return offsets[index][0] >= end

    begin = bisect_left(range(len(ids)), True, key=reaches_answer)
    stop = bisect_left(range(len(ids)), True, key=passes_answer)
    if begin >= stop:
        return None
    return AnswerTokens(
        begin,
        stop,
        before=offsets.text[offsets[begin][0] : start],
        text=answer,
        after=offsets.text[end : offsets[stop - 1][1]],
        space=offsets.text[inner[0] : start],
        cuts=_cuts(offsets, inner[0], begin),
    )


def token_texts(tokenizer: Any, token_ids: Sequence[int] | Tensor) -> list[str]:
    """What each of `token_ids` [C] adds to the decoded text; joined, they are that text.

    A character that several tokens share is the first one's.
    """
    ids = _as_list(token_ids)
    offsets = _TokenOffsets(tokenizer, ids)
    single = tokenizer.batch_decode(
        [[token] for token in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    # One by one is much faster, and right unless a character is cut or a decoder adds spaces.
    if "".join(single) == offsets.text:
        return single
    texts, done = [], 0
    for index in range(len(ids)):
        end = max(done, offsets[index][1])
        texts.append(offsets.text[done:end])
        done = end
    return texts


def _cuts(offsets: _TokenOffsets, tag_end: int, begin: int) -> dict[int, int]:
    """Return where tokens begin in the tag; it ends at `tag_end`, the answer is at `begin`."""
    tag_start = tag_end - len(ANSWER_OPEN)
    cuts = {}
    for index in range(begin, -1, -1):
        first, last = offsets[index]
        if first < tag_start:
            break
        # Tokens that are bytes of one character share its range: keep the first, skip empty ones.
        if first <= tag_end and first < last:
            cuts[first - tag_start] = index
    return cuts


def _as_list(token_ids: Sequence[int] | Tensor) -> list[int]:
    as_list = getattr(token_ids, "tolist", None)
    return list(token_ids) if as_list is None else as_list()


class _TokenOffsets:
    """The character range of each token in the decoded text, computed on access.

    Indexing gives the half-open range of one token. Tokens that are parts of one character (such
    as the bytes of an emoji) share that character's range.
    """

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = ids
        self._compared: dict[int, tuple[int, bool]] = {}
        self.text = self._decode(len(ids))

    def __getitem__(self, index: int) -> CharacterSpan:
        start, _ = self._prefix(index)
        end, in_character = self._prefix(index + 1)
        if in_character:
            # The token ends inside the character that follows the complete ones.
            end = min(end + 1, len(self.text))
        elif start == end > 0 and self.text[start - 1] == REPLACEMENT:
            # The text shows broken bytes as one character, which the first of them completed.
            start -= 1
        return start, end

    def _prefix(self, count: int) -> tuple[int, bool]:
        """Return how many characters `count` tokens complete, and whether the next one has begun.

        A prefix that ends inside a character decodes to replacement characters there. Comparison
        with the whole text distinguishes them from those that the completion really contains.
        """
        settled, in_character = self._compare(count)
        # Decoders with byte fallback discard a whole run of bytes while its last character is
        # incomplete, so what an earlier prefix has completed remains complete.
        earlier = count
        unsettled = in_character
        while unsettled:
            earlier -= 1
            settled_earlier, unsettled = self._compare(earlier)
            settled = max(settled, settled_earlier)
        return settled, in_character

    def _compare(self, count: int) -> tuple[int, bool]:
        """Return how many characters `count` tokens share with the text, and if others follow."""
        if count not in self._compared:
            prefix = self._decode(count)
            common = _common_length(prefix, self.text)
            self._compared[count] = common, len(prefix) > common
        return self._compared[count]

    def _decode(self, count: int) -> str:
        return self._tokenizer.decode(
            self._ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _common_length(prefix: str, text: str) -> int:
    """Return the number of leading characters that both have in common."""
    if text.startswith(prefix):
        return len(prefix)
    pairs = enumerate(zip(prefix, text, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prefix), len(text)))
