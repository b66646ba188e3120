"""The answer's tokens, prompts and option letters in Qwen's real vocabulary."""

import itertools
import random
import string

import pytest
import regex
import torch
from made_verdicts import SimplePrompt, completion_of, verdicts_of
from qwen_vocabulary import NOT_SPECIAL, ROWS, SPECIAL, qwen_tokenizer, ranks
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from nemo_care.data.chat import ChatEncoder
from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.errors import InputError
from nemo_care.evaluation.likelihood_judge import LikelihoodJudge
from nemo_care.groups.answer_span import answer_token_span, find_answer_tokens, token_texts
from nemo_care.groups.group import Group
from nemo_care.rollouts.completions import completion_of as sampled_completion

END = SPECIAL["<|im_end|>"]
INNER = [
    *string.ascii_uppercase,
    *(
        "a",
        "yes",
        "No",
        "Add milk",
        "open the blue door",
        "Yes.",
        "Add milk.",
        "(B)",
        "B.",
        "3 < 4",
    ),
    *("7", "42", "3.14", "-1", "1,000", "50%", "12 cm", '"quoted"', "<b>bold</b>", "x\\frac{1}{2}"),
    *("你好,世界", "是", "そうです", "naïve", "🙂", "👩‍🚀 goes", "e\u0301", "ﬁ", "مرحبا"),
]
FRAMES = [
    "{}",
    " {}",
    "{} ",
    " {} ",
    "\n{}\n",
    "\n\n {}\n\n",
    "\t{}",
    "\u3000{}\u3000",
    "\r\n{}\r\n",
]
BEFORE = [
    "",
    "<think>why</think>",
    "<think>why.</think>\n",
    "<answer>C</answer> no, ",
    "你",
    "🙂\n\n",
]
EMPTY = ["", " ", "\n", "\n\n", " \n\t", "\u3000"]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(qwen_tokenizer(), frozenset([END, SPECIAL["<|endoftext|>"]]), 151643)


def pieces(ids):
    return [bytes_of(token).decode(errors="replace") for token in ids]


def bytes_of(token: int) -> bytes:
    return WORDS.get(token) or qwen_tokenizer().convert_ids_to_tokens(token).encode()


WORDS = {rank: token for token, rank in ranks().items()}


# ---------------------------------------------------------------------- the fixture itself


def merged(word: bytes) -> list[int]:
    """Byte pair encoding as tiktoken does it: join the pair of lowest rank, until none is left."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        pairs = [ranks().get(a + b) for a, b in itertools.pairwise(parts)]
        known = [rank for rank in pairs if rank is not None]
        if not known:
            break
        at = pairs.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks()[part] for part in parts]


def test_the_fixture_encodes_as_tiktoken_s_algorithm_does(tokenizer):
    texts = [frame.format(inner) for frame in FRAMES for inner in INNER]
    for text in [*texts, *BEFORE]:
        normal = qwen_tokenizer().backend_tokenizer.normalizer.normalize_str(text)
        words = regex.findall(PRETOKENIZE_REGEX, normal)
        assert "".join(words) == normal
        assert tokenizer.encode(text) == [id for word in words for id in merged(word.encode())]


def test_the_fixture_has_the_published_ids(tokenizer):
    assert len(ranks()) == 151643
    assert {name: tokenizer.encode(name) for name in SPECIAL} == {
        n: [i] for n, i in SPECIAL.items()
    }
    assert [tokenizer.encode(name) for name in NOT_SPECIAL] == [[i] for i in range(151657, 151665)]
    assert len(tokenizer.base) == 151665 < ROWS
    # Published examples of the vocabulary's ids.
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert pieces(tokenizer.encode("<answer>B</answer>")) == [
        "<",
        "answer",
        ">B",
        "</",
        "answer",
        ">",
    ]


# ---------------------------------------------------------------------- the answer's tokens


def overlapping(text: str, start: int, end: int) -> list[int]:
    """Indices of the tokens that hold a character of text[start:end], by the library's offsets."""
    encoded = qwen_tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return [i for i, (first, last) in enumerate(offsets) if first < end and last > start]


@pytest.mark.parametrize("frame", FRAMES)
def test_the_span_is_every_token_that_holds_a_character_of_the_answer(tokenizer, frame):
    # Offsets are those of the normalised text, which is what the model writes.
    normalize = qwen_tokenizer().backend_tokenizer.normalizer.normalize_str
    around = [*zip(BEFORE, itertools.cycle(("<|im_end|>", "", ".", "\n\n")), strict=False)]
    for inner, (before, after) in itertools.product(INNER, around):
        head = f"{before}<answer>"
        text = normalize(f"{head}{frame.format(inner)}</answer>{after}")
        answer = normalize(inner)
        start = text.index(answer, len(head))
        expected = overlapping(text, start, start + len(answer))
        ids = tokenizer.encode(text)
        found = find_answer_tokens(tokenizer.base, ids)
        assert list(range(*found.span)) == expected, (text, pieces(ids))
        assert found.text == answer
        whole = tokenizer.base.decode(ids[slice(*found.span)])
        if "\ufffd" not in whole:
            assert whole == found.before + answer + found.after


@pytest.mark.parametrize("inner", EMPTY)
def test_an_empty_answer_has_no_tokens(tokenizer, inner):
    for before in BEFORE[:3]:
        ids = tokenizer.encode(f"{before}<answer>{inner}</answer><|im_end|>")
        assert answer_token_span(tokenizer.base, ids) is None


@pytest.mark.parametrize("letter", "ABCDEFGHIJKLMNOP")
def test_option_letters_are_one_token_with_the_end_of_the_tag(tokenizer, letter):
    ids = tokenizer.encode(f"<think>so</think>\n<answer>{letter}</answer><|im_end|>")
    span = answer_token_span(tokenizer.base, ids)
    assert pieces(ids[slice(*span)]) == [f">{letter}"]
    ids = tokenizer.encode(f"<think>so</think>\n<answer> {letter}</answer><|im_end|>")
    span = answer_token_span(tokenizer.base, ids)
    assert pieces(ids[slice(*span)]) == [f" {letter}"]


@pytest.mark.parametrize(
    ("inner", "tokens"),
    [
        ("No", [">No"]),
        ("Add milk", [">Add", " milk"]),
        ("Yes.", ["Yes", ".</"]),
        ("42", ["4", "2"]),
        ("yes", ["yes"]),
        ("\nB\n", ["B"]),
        ("(B)", [">(", "B", ")</"]),
        ("你好", ["你好"]),
    ],
)
def test_tokens_of_an_answer_by_hand(tokenizer, inner, tokens):
    ids = tokenizer.encode(f"<think>so</think>\n<answer>{inner}</answer><|im_end|>")
    assert pieces(ids[slice(*answer_token_span(tokenizer.base, ids))]) == tokens


def test_any_sampled_split_into_tokens_has_the_same_characters(tokenizer):
    draw = random.Random(0)
    for inner in INNER:
        text = f"<think>so</think>\n<answer>{inner}</answer>"
        content, ids, starts = text.encode(), [], []
        at = 0
        while at < len(content):
            ends = [
                n for n in range(at + 1, min(at + 12, len(content)) + 1) if content[at:n] in ranks()
            ]
            end = draw.choice(ends)
            ids.append(ranks()[content[at:end]])
            starts.append(at)
            at = end
        first = text.encode().index(b"<answer>") + len("<answer>")
        last = first + len(inner.encode())
        stops = [*starts[1:], len(content)]
        # Whole characters: a token that holds some of a character's bytes holds the character.
        expected = [
            i for i, (a, b) in enumerate(zip(starts, stops, strict=True)) if a < last and b > first
        ]
        assert list(range(*answer_token_span(tokenizer.base, ids))) == expected


def test_the_texts_of_tokens_join_to_the_completion(tokenizer):
    plain = tokenizer.encode("<think>so</think>\n<answer>B</answer><|im_end|>")
    assert token_texts(tokenizer.base, plain) == pieces(plain)
    # One token for each byte: a character is the first one's.
    cut = [*tokenizer.encode("a"), *(ranks()[bytes([byte])] for byte in "🙂你".encode())]
    assert token_texts(tokenizer.base, torch.tensor(cut)) == ["a", "🙂", "", "", "", "你", "", ""]
    # Half of a character at the end, as of a completion that was cut off.
    assert "".join(token_texts(tokenizer.base, cut[:3])) == "a\ufffd"


def test_sampled_completions_know_answer_and_cuts(tokenizer):
    ids = tokenizer.encode("<think>so</think>\n<answer>B</answer><|im_end|>")
    made = sampled_completion(torch.tensor([*ids, 0, 0]), torch.zeros(len(ids) + 2), tokenizer)
    assert made.text == "<think>so</think>\n<answer>B</answer>"
    assert pieces(made.token_ids[slice(*made.answer_span)].tolist()) == [">B"]
    begins = {cut: pieces([ids[index]])[0] for cut, index in made.cuts.items()}
    assert begins == {0: "<", 1: "answer", 7: ">B"}
    assert made.has_answer
    assert not made.is_unscored


# ---------------------------------------------------------------------- prompts


def test_a_prompt_without_control_tokens_has_the_ids_of_the_rendered_chat(tokenizer):
    for text in (
        "Which way?\nA. left\nB. right",
        "a < b | c > d",
        "<think> </think> <answer>",
        "<|x|>",
    ):
        content = [{"type": "video", "video": ""}, {"type": "text", "text": text}]
        chat = tokenizer.base.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.encode_chat(content) == tokenizer.encode(chat)


@pytest.mark.parametrize("token", [*SPECIAL, *NOT_SPECIAL])
def test_control_tokens_of_a_question_are_text(tokenizer, token):
    text = f"What is {token}{token}?\n<|im_start|>assistant\n<think>{token}"
    content = [
        {"type": "video", "video": ""},
        {"type": "image", "image": ""},
        {"type": "text", "text": text},
    ]
    ids = tokenizer.encode_chat(content)
    # The template's own, and no others.
    vision = [SPECIAL[f"<|vision_{place}|>"] for place in ("start", "end")]
    pads = [SPECIAL[f"<|{kind}_pad|>"] for kind in ("video", "image")]
    start, control = SPECIAL["<|im_start|>"], [i for i in ids if i >= len(ranks())]
    framed = [i for pad in pads for i in (vision[0], pad, vision[1])]
    assert control == [start, END, start, *framed, END, start]
    assert tokenizer.base.decode(ids) == ChatEncoder(tokenizer.base).render(content)
    # As the same text is written where nothing knows control tokens.
    plain = [id for word in regex.findall(PRETOKENIZE_REGEX, text) for id in merged(word.encode())]
    at = ids.index(vision[1], ids.index(pads[1])) + 1
    assert ids[at : at + len(plain)] == plain


def test_a_template_that_can_not_write_a_control_token_as_text_is_named(tokenizer, monkeypatch):
    template = tokenizer.base.chat_template.replace(
        "content['text']", "content['text'] | urlencode"
    )
    monkeypatch.setattr(tokenizer.base, "chat_template", template)
    with pytest.raises(InputError, match=r"holds <\|im_end\|>, a control token"):
        tokenizer.encode_chat([{"type": "text", "text": "a <|im_end|> b"}])


# ---------------------------------------------------------------------- the likelihood judge


def judged(tokenizer, text, options):
    given = completion_of(tokenizer, tokenizer.encode(text))
    group = Group(SimplePrompt(Sample("1", "?", "A", options=dict.fromkeys(options, "?"))), [given])
    judge = LikelihoodJudge(lambda groups: [], tokenizer)
    return judge.with_options(group)


@pytest.mark.parametrize("frame", ["{}", " {}", "\n{}\n", "{} ", "\n\n{}"])
def test_options_take_the_answer_s_place_as_the_tokenizer_writes_them(tokenizer, frame):
    text = "<think>so.</think>\n<answer>" + frame + "</answer><|im_end|>"
    options = string.ascii_uppercase
    for given in "BQ":
        for letter, made in judged(tokenizer, text.format(given), options).items():
            whole = tokenizer.encode(text.format(letter))
            end = answer_token_span(tokenizer.base, whole)[1]
            assert made.token_ids.tolist() == whole[:end], (letter, pieces(made.token_ids.tolist()))
            assert made.answer_span[1] == end


def test_letters_of_unequal_numbers_of_tokens_are_compared_by_their_whole_probability(tokenizer):
    ids = tokenizer.encode("<think>so</think>\n<answer>B</answer><|im_end|>")
    sample = Sample("1", "?", "A", options={"B": "left", "Q": "right"})
    group = Group(SimplePrompt(sample), [completion_of(tokenizer, ids)])

    def likelihoods(groups):
        (made,) = groups
        spans = [c.token_ids[slice(*c.answer_span)].tolist() for c in made.completions]
        assert [pieces(span) for span in spans] == [[">B"], [">", "Q"]]
        # exp of the mean: of 0.5, and of 0.4 and 0.9.
        return [torch.tensor([0.5, 0.36**0.5])]

    (verdict,) = verdicts_of(LikelihoodJudge(likelihoods, tokenizer), [group])
    assert verdict.details["option_likelihoods"] == pytest.approx({"B": 0.5, "Q": 0.36})
    assert verdict.consistent is True
