"""The checkpoint's tokenizer, checked against its model before anything else starts."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLConfig

from nemo_care.errors import InputError
from nemo_care.objective.text import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

Content = Sequence[Mapping[str, str]]
"""The parts of a user's message, as chat templates take them."""

# A prompt has to name them, and a tokenizer may have them as tokens.
_TAGS = {THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE}
# From the private use area of Unicode: no text should hold it.
_MARK = "\ue000"


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the ids at which a completion ends."""

    base: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    pad_id: int

    def completion_text(self, token_ids: list[int]) -> str:
        """Text of a completion without its EOS; other special tokens stay visible."""
        if token_ids and token_ids[-1] in self.eos_ids:
            token_ids = token_ids[:-1]
        return self.base.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added; control tokens in it are recognised."""
        return self.base(text, add_special_tokens=False)["input_ids"]

    def encode_chat(self, content: Content) -> list[int]:
        """Token ids of the prompt in which a user says `content`, a video or image one token each.

        The chat template's control tokens become tokens. Those in the content's own texts are text
        like any other: `<|im_end|>` in a question ends no turn.

        Raises:
            InputError: a text holds a control token, and this tokenizer can't write it as text.
        """
        texts = [part["text"] for part in content if "text" in part]
        found = [token for text in texts for token in self._control_regex.findall(text)]
        if not found:
            return self.encode(self.chat(content))
        # A mark breaks the texts' control tokens in two: those that are whole in the rendered chat
        # are the template's.
        mark = _MARK
        while any(mark in text for text in texts):
            mark += _MARK
        chat = self.chat(
            _with_texts(
                content,
                lambda text: self._control_regex.sub(lambda m: m[0][:1] + mark + m[0][1:], text),
            )
        )
        pieces = _any_of(self._added).split(chat)
        ids = [token for piece in pieces for token in self._ids_of_piece(piece, mark)]
        own = self._control_regex.findall(self.chat(_with_texts(content, lambda text: "x")))
        wanted = sorted(self._control[token] for token in own)
        is_whole = chat.count(mark) >= len(found)
        if not is_whole or sorted(i for i in ids if i in self._control.values()) != wanted:
            raise InputError(
                f"the question holds {found[0]}, a control token of the chat, and this tokenizer "
                "or chat template can't write it as text; reword the question"
            )
        return ids

    def chat(self, content: Content) -> str:
        """The chat template's text of a prompt in which a user says `content`."""
        return self.base.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    @cached_property
    def _added(self) -> dict[str, int]:
        """Tokens that the tokenizer finds in any text before it looks at words, with their ids."""
        return {token.content: n for n, token in self.base.added_tokens_decoder.items()}

    @cached_property
    def _control(self) -> dict[str, int]:
        """Those that are no words, and not the tags.

        Special, or in angle brackets (Qwen's `<|fim_prefix|>` and `<tool_call>` are not special).
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
        """The tokenizer without any added token."""
        content = json.loads(self.base.backend_tokenizer.to_str())
        content |= {"added_tokens": [], "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(content))

    def _ids_of_piece(self, piece: str, mark: str) -> list[int]:
        """Of an added token, or of text between them with marks in it."""
        if piece in self._added:
            return [self._added[piece]]
        return self._words.encode(piece.replace(mark, ""), add_special_tokens=False).ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the tokens, the longest where several begin; a group, for `split`."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered)) or '(?!)'})")


def _with_texts(content: Content, change: Callable[[str], str]) -> list[dict[str, str]]:
    """The content with its texts changed."""
    return [{**part, **({"text": change(part["text"])} if "text" in part else {})} for part in content]


def _eos_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Qwen ends a turn with <|im_end|> or <|endoftext|>; generation_config.json lists both."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("eos_token_id") or []
        ids.update([listed] if isinstance(listed, int) else listed)
    return frozenset(ids)


def load_tokenizer(folder: str | Path, hf: Qwen2_5_VLConfig) -> ChatTokenizer:
    """Load and check a checkpoint's tokenizer.

    Raises:
        InputError: there is none, or it does not belong to the model.
    """
    path = Path(folder)
    try:
        base = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model.hf_path={path}: no usable tokenizer there ({reason}); copy the checkpoint's "
            "tokenizer files beside it"
        ) from error
    if base.chat_template is None and (path / "chat_template.json").is_file():
        base.chat_template = json.loads((path / "chat_template.json").read_text())["chat_template"]
    eos = _eos_ids(path, base)
    _check(base, eos, path, hf)
    pad = base.pad_token_id if base.pad_token_id is not None else min(eos)
    return ChatTokenizer(base, eos, pad)


def _check(
    base: PreTrainedTokenizerBase, eos: frozenset[int], path: Path, hf: Qwen2_5_VLConfig
) -> None:
    def refuse(what: str) -> InputError:
        return InputError(
            f"model.hf_path={path}: the tokenizer does not belong to the model ({what}); "
            "use the tokenizer files of the same checkpoint"
        )

    if len(base) > hf.text_config.vocab_size:
        raise refuse(f"{len(base)} tokens, the model has {hf.text_config.vocab_size}")
    if not eos:
        raise refuse("it has no end-of-sequence token")
    if not base.chat_template:
        raise refuse("it has no chat template")
    for kind, wanted in (("video", hf.video_token_id), ("image", hf.image_token_id)):
        text = base.apply_chat_template(
            [{"role": "user", "content": [{"type": kind, kind: ""}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = base(text, add_special_tokens=False)["input_ids"]
        if ids.count(wanted) != 1:
            raise refuse(f"its chat template yields no {kind} token {wanted}")
