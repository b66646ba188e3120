"""The miniature's 51 words, and 5 more for families whose prompts state times: each is one token.

The order is part of the format: a token's id is its index in `WORDS` followed by `TIME_WORDS`, so a
change makes older checkpoints unreadable.
"""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LETTERS = ("A", "B", "C", "D")
DIRECTIONS = ("left", "right", "up", "down")
SHAPES = ("square", "disc", "cross", "bar")
UNKNOWN = "<unk>"
_SENTENCE_WORDS = (
    "which way does did the move come from ? "
    "it starts at ends and so moves . goes i see frames first in came"
)
WORDS = (
    *SPECIAL_TOKENS,
    *TAGS,
    *LETTERS,
    *DIRECTIONS,
    *SHAPES,
    *_SENTENCE_WORDS.split(),
    "user",
    "assistant",
    UNKNOWN,
)
# "<0.2 seconds>" and so on: the times of a video's four pairs of frames.
TIME_WORDS = ("<0.2", "<1.2", "<2.2", "<3.2", "seconds>")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

TOKEN_ID = {word: index for index, word in enumerate(WORDS)}
TOKEN_ID_WITH_TIMES = {word: index for index, word in enumerate((*WORDS, *TIME_WORDS))}
PAD = TOKEN_ID["<|endoftext|>"]
END = TOKEN_ID["<|im_end|>"]
IMAGE_PAD = TOKEN_ID["<|image_pad|>"]
VIDEO_PAD = TOKEN_ID["<|video_pad|>"]
LETTER_IDS = tuple(TOKEN_ID[letter] for letter in LETTERS)
DIRECTION_IDS = tuple(TOKEN_ID[direction] for direction in DIRECTIONS)


def encode(text: str) -> list[int]:
    """Return the token ids of words separated by spaces; raises KeyError on an unknown word."""
    return [TOKEN_ID_WITH_TIMES[word] for word in text.split()]
