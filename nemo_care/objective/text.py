"""Find the reasoning and the answer in a completion's text: the only definition of both.

Rewards, the token span of the answer and judges all read completions with this module, so that they
refer to the same characters.
"""

from dataclasses import dataclass

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

CharacterSpan = tuple[int, int]
"""Half-open range of characters (Unicode code points, as Python counts them)."""


@dataclass(frozen=True)
class ParsedCompletion:
    """The parts of one completion.

    `reasoning` and `answer` are the raw text between the tags, white space included; None if the
    completion has no such part. `answer_span` is the position of `answer` in the completion.
    """

    reasoning: str | None
    answer: str | None
    answer_span: CharacterSpan | None


def find_answer(completion: str) -> CharacterSpan | None:
    """Find the characters inside the last well-formed `<answer>...</answer>` (algorithm step 3).

    Well-formed means that there is no further `<answer>` or `</answer>` between the tags. Returns a
    half-open range, which is empty for `<answer></answer>`, or None if there is no such pair.
    """
    last_close = completion.rfind(ANSWER_CLOSE)
    if last_close < 0:
        return None
    # The last opening tag that still has a closing one after it: any opening tag between the two
    # would itself be that last one, so the pair found is the innermost.
    opening = completion.rfind(ANSWER_OPEN, 0, last_close)
    if opening < 0:
        return None
    start = opening + len(ANSWER_OPEN)
    return start, completion.index(ANSWER_CLOSE, start)


def find_reasoning(completion: str) -> CharacterSpan | None:
    """Find the characters between the first `<think>` and the first `</think>` after it.

    Returns a half-open range, or None if either tag is missing.
    """
    opening = completion.find(THINK_OPEN)
    if opening < 0:
        return None
    start = opening + len(THINK_OPEN)
    end = completion.find(THINK_CLOSE, start)
    return None if end < 0 else (start, end)


def parse_completion(completion: str) -> ParsedCompletion:
    """Split one completion into its reasoning tau_i and its answer a_i."""
    reasoning_span = find_reasoning(completion)
    answer_span = find_answer(completion)
    return ParsedCompletion(
        reasoning=None if reasoning_span is None else completion[slice(*reasoning_span)],
        answer=None if answer_span is None else completion[slice(*answer_span)],
        answer_span=answer_span,
    )


def extract_answer(text: str) -> str | None:
    """Return the answer of `text` without surrounding white space, None if there is no answer."""
    span = find_answer(text)
    return None if span is None else text[slice(*span)].strip()
