"""The checkpoint's tokenizer, checked against its model before anything else starts."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLConfig

from nemo_care.data.chat import ChatEncoder, Content
from nemo_care.errors import InputError


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
        """Token ids of a prompt in which a user says `content` (see `ChatEncoder`)."""
        return self._chat.encode(content)

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self.base)


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
