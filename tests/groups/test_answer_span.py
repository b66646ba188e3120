import random

import pytest
import torch
from made_tokenizers import BYTE_OF, EOS, TOKENIZERS, with_tokens, wrap
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_care.groups.answer_span import find_answer_tokens
from nemo_care.rollouts import answer_token_span

TEXTS = [
    "<think>why</think><answer>B</answer>",
    "<think>why</think>\n<answer> B\n</answer>",
    "<think>why</think>\n<answer>\n B </answer>" + EOS,
    "<think>two words</think>\n<answer>open the blue door</answer>" + EOS,
    "<answer>A</answer> no, wait <answer>B</answer>" + EOS,
    "<answer>A <answer>B</answer>C</answer>" + EOS,
    "<answer>A</answer> then <answer>B" + EOS,
    "<answer>你好,世界</answer>" + EOS,
    "<answer> 🙂👩‍🚀 </answer>" + EOS,
    "<think>你🙂</think>\n<answer>🙂</answer>你",
    "<answer>\u3000a\u00a0b\u3000</answer>",
    "<answer>3 < 4 > 2</answer>" + EOS,
    "<answer>naïve\n</answer>",
]
WITH_REPLACEMENT_CHARACTERS = ["<answer>x\ufffdy\ufffd</answer>\ufffd", "<answer>\ufffd</answer>"]
WITHOUT_ANSWER = [
    "",
    EOS,
    "B" + EOS,
    "<answer></answer>" + EOS,
    "<answer> \n </answer>" + EOS,
    "<answer>A</answer> no, <answer> </answer>" + EOS,
    "<answer>B" + EOS,
    "B</answer>",
    "</answer>B<answer>",
    "<think>B</think>",
]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def piece_bytes(tokenizer: PreTrainedTokenizerFast, token_id: int) -> bytes:
    """The bytes that one token of a byte-level or of the metaspace tokenizer stands for."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    if token_id in tokenizer.get_added_vocab().values() or "▁" in piece:
        return piece.replace("▁", " ").encode()
    return bytes(BYTE_OF[character] for character in piece)


def last_answer(text: str) -> tuple[int, int] | None:
    """Every pair of tags that has no tag between, the last one: by trying all of them."""
    found = None
    for start in range(len(text)):
        for end in range(start, len(text)):
            inner = text[start:end]
            framed = text[:start].endswith("<answer>") and text[end:].startswith("</answer>")
            if framed and "<answer>" not in inner and "</answer>" not in inner:
                found = start, end
    return found


def answer_tokens(
    tokenizer: PreTrainedTokenizerFast, ids: list[int]
) -> tuple[list[int], dict[int, int]]:
    """Indices of the answer's tokens, and where tokens begin in the opening tag.

    From the bytes of each token and of each character.
    """
    pieces = [piece_bytes(tokenizer, token_id) for token_id in ids]
    stream = b"".join(pieces)
    # The metaspace decoder takes the first blank away: start counting after it.
    skipped = 1 if "▁" in tokenizer.get_vocab() and stream.startswith(b" ") else 0
    text = stream[skipped:].decode()
    assert tokenizer.decode(ids) == text
    inner = last_answer(text)
    if inner is None:
        return [], {}
    inside = set(range(*inner))
    core = {i for i in inside if text[inner[0] : i + 1].strip() and text[i : inner[1]].strip()}
    owner = [-1] * skipped + [i for i, c in enumerate(text) for _ in c.encode()]
    chosen, cuts, position = [], {}, 0
    first = skipped + len(text[: inner[0] - len("<answer>")].encode())
    for index, piece in enumerate(pieces):
        if 0 <= position - first <= len("<answer>") and not chosen:
            cuts[position - first] = index
        characters = set(owner[position : position + len(piece)])
        position += len(piece)
        if characters & core:
            chosen.append(index)
    return chosen, cuts


def check(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> tuple[int, int] | None:
    expected, cuts = answer_tokens(tokenizer, ids)
    span = answer_token_span(tokenizer, ids)
    found = find_answer_tokens(tokenizer, ids)
    if not expected:
        assert span is None
        assert found is None
        return None
    assert expected == list(range(expected[0], expected[-1] + 1))
    assert span == found.span == (expected[0], expected[-1] + 1)
    assert found.cuts == cuts
    text = tokenizer.decode(ids)
    assert found.text == text[slice(*last_answer(text))].strip()
    assert f"{found.before}{found.text}{found.after}" in text
    return span


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_span_agrees_with_the_bytes_of_every_token(name, text):
    check(TOKENIZERS[name], encode(TOKENIZERS[name], text))


@pytest.mark.parametrize("name", ["bytes", "merges", "tags", "joined tags"])
@pytest.mark.parametrize("text", WITH_REPLACEMENT_CHARACTERS)
def test_a_replacement_character_of_the_text_is_one_like_any_other(name, text):
    check(TOKENIZERS[name], encode(TOKENIZERS[name], text))


@pytest.mark.parametrize("name", ["bytes", "tags", "metaspace"])
@pytest.mark.parametrize("text", TEXTS)
def test_where_no_token_joins_a_tag_and_the_answer_the_span_decodes_to_the_answer(name, text):
    tokenizer = TOKENIZERS[name]
    ids = encode(tokenizer, text)
    start, end = check(tokenizer, ids)
    inner = last_answer(text)
    assert tokenizer.decode(ids[start:end]).strip() == text[slice(*inner)].strip()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", WITHOUT_ANSWER)
def test_without_an_answer_there_is_no_span(name, text):
    tokenizer = TOKENIZERS[name]
    assert answer_token_span(tokenizer, encode(tokenizer, text)) is None


@pytest.mark.parametrize("name", ["bytes", "merges", "joined tags", "metaspace"])
def test_any_split_into_tokens_will_do(name):
    """Sampled tokens need not be the ones that the tokenizer would choose for the text."""
    tokenizer = TOKENIZERS[name]
    draw = random.Random(name)
    tokens: dict[bytes, list[int]] = {}
    for token_id in range(len(tokenizer)):
        tokens.setdefault(piece_bytes(tokenizer, token_id), []).append(token_id)
    texts = TEXTS if name == "metaspace" else TEXTS + WITH_REPLACEMENT_CHARACTERS
    for text in texts:
        for _ in range(5):
            rest, ids = text.encode(), []
            while rest:
                ends = [n for n in range(1, len(rest) + 1) if rest[:n] in tokens]
                end = draw.choice(ends)
                ids.append(draw.choice(tokens[rest[:end]]))
                rest = rest[end:]
            check(tokenizer, ids)


def test_the_merges_of_these_tests_do_cross_tags():
    pieces = {piece_bytes(TOKENIZERS["merges"], i) for i in range(len(TOKENIZERS["merges"]))}
    assert any(b">\n" in piece for piece in pieces)
    assert any(b"><" in piece for piece in pieces)
    ids = encode(TOKENIZERS["joined tags"], "</think>\n<answer>B</answer>")
    assert b">\n" in [piece_bytes(TOKENIZERS["joined tags"], i) for i in ids]


@pytest.mark.parametrize(
    ("text", "before", "answer", "after"),
    [
        ("<answer>B</answer>", ">", "B", ""),
        ("<answer>C</answer>", "", "C", "<"),
        ("<answer>B and C</answer>", ">", "B and C", "<"),
        ("<answer> \nB\n </answer>", "", "B", ""),
        ("<answer>D</answer>", "r>", "D", "</a"),
    ],
)
def test_a_token_that_joins_a_tag_and_the_answer_counts(text, before, answer, after):
    tokenizer = with_tokens(">B", "C<", "r>D</a")
    ids = encode(tokenizer, text)
    start, end = check(tokenizer, ids)
    found = find_answer_tokens(tokenizer, ids)
    assert (found.before, found.text, found.after) == (before, answer, after)
    assert tokenizer.decode(ids[start:end]) == before + answer + after


@pytest.mark.parametrize("inner", ["", " ", "\n", " \n "])
def test_tokens_that_hold_a_tag_and_white_space_are_no_answer(inner):
    tokenizer = with_tokens(">\n", "> ", "></", " </", "\n</")
    for around in ("", " A "):
        ids = encode(tokenizer, f"<think>{around}</think><answer>{inner}</answer>{around}")
        assert check(tokenizer, ids) is None


def test_white_space_counts_only_where_it_shares_a_token_with_the_answer():
    tokenizer = with_tokens(" B", "\n\n")
    ids = encode(tokenizer, "<answer>\n\n B\n\n</answer>")
    start, end = check(tokenizer, ids)
    assert tokenizer.decode(ids[start:end]) == " B"
    ids = encode(tokenizer, "<answer>  a b  </answer>")
    start, end = check(tokenizer, ids)
    assert tokenizer.decode(ids[start:end]) == "a b"


def test_a_tokenizer_that_joins_words_with_blanks():
    words = ["<think>", "</think>", "<answer>", "</answer>", "why", "blue", "door", EOS, "[UNK]"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = wrap(tokenizer)

    def span(text: str) -> tuple[int, int] | None:
        return answer_token_span(tokenizer, encode(tokenizer, text))

    assert span("<think> why </think> <answer> blue door </answer> <|im_end|>") == (4, 6)
    assert span("<answer> blue </answer> why <answer> door </answer>") == (5, 6)
    assert span("<answer> blue <answer> door </answer>") == (3, 4)
    assert span("<answer> blue </answer> <answer> door") == (1, 2)
    assert span("<answer> </answer> <|im_end|>") is None
    assert span("why <answer> blue") is None


def test_all_bytes_of_a_split_character_count():
    tokenizer = TOKENIZERS["bytes"]
    ids = encode(tokenizer, "<answer>🙂</answer>")
    assert len(ids) == 8 + 4 + 9
    assert check(tokenizer, ids) == (8, 12)


def test_bytes_that_are_no_text_count_as_far_as_they_lie_in_the_answer():
    tokenizer = TOKENIZERS["bytes"]
    byte = {piece_bytes(tokenizer, i): i for i in range(len(tokenizer))}
    opening, closing = encode(tokenizer, "<answer>"), encode(tokenizer, "</answer>")
    cut_short = [byte[b"\xf0"], byte[b"\x9f"], byte[b"\x99"]]
    never_valid = [byte[b"\xff"], byte[b"\xfe"]]
    letter = encode(tokenizer, "B")
    for inner in (cut_short, never_valid, cut_short + letter, letter + cut_short, never_valid * 2):
        span = answer_token_span(tokenizer, opening + inner + closing)
        assert span == (len(opening), len(opening) + len(inner))
    # Broken bytes in the reasoning or at the very end move nothing.
    ids = cut_short + letter + opening + letter + closing + cut_short
    assert answer_token_span(tokenizer, ids) == (12, 13)


def test_lists_and_tensors_give_the_same_span():
    tokenizer = TOKENIZERS["merges"]
    ids = encode(tokenizer, "<think>why</think>\n<answer>open door</answer>" + EOS)
    span = check(tokenizer, ids)
    assert span is not None
    assert answer_token_span(tokenizer, torch.tensor(ids)) == span
    assert answer_token_span(tokenizer, tuple(ids)) == span
    assert answer_token_span(tokenizer, torch.tensor([], dtype=torch.int64)) is None


def test_a_long_completion_takes_few_decodings():
    tokenizer = TOKENIZERS["bytes"]
    ids = encode(tokenizer, "<think>" + "why " * 500 + "</think><answer>B</answer>")
    lengths = []

    class Counting:
        def decode(self, ids, **options):
            lengths.append(len(ids))
            return tokenizer.decode(ids, **options)

    assert answer_token_span(Counting(), ids) == check(tokenizer, ids)
    assert len(lengths) < 60
