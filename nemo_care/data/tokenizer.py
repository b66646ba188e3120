"""The checkpoint's tokenizer, checked against its model before anything else starts."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_care.data.chat import ChatEncoder, Content
from nemo_care.data.checkpoint_files import read_checkpoint_json
from nemo_care.data.prompt_format import PromptFormat
from nemo_care.errors import InputError, first_line
from nemo_care.files.json_lines import read_text

_JSON_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_TEMPLATE = "chat_template.jinja"
# The released checkpoints have the template here; it is used if the tokenizer has none.
_TEMPLATE_JSON = "chat_template.json"


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the ids at which a completion ends."""

    base: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    pad_id: int

    def completion_text(self, token_ids: list[int]) -> str:
        """Decode a completion without its EOS; other special tokens remain visible."""
        if token_ids and token_ids[-1] in self.eos_ids:
            token_ids = token_ids[:-1]
        return self.base.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, nothing added; control tokens in it are recognised."""
        return self.base(text, add_special_tokens=False)["input_ids"]

    def encode_chat(self, content: Content) -> list[int]:
        """Return the token ids of a prompt for a user message `content` (see `ChatEncoder`)."""
        return self._chat.encode(content)

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self.base)


def load_tokenizer(
    folder: str | Path, prompt_format: PromptFormat, *, key: str = "model.hf_path"
) -> ChatTokenizer:
    """Load and check a checkpoint's tokenizer.

    `prompt_format` is the model family's, `key` the recipe key that names the folder.

    Raises:
        InputError: there is none, its files are unusable, or it does not belong to the model.
    """
    path = Path(folder)
    # transformers would create an empty tokenizer if there is none.
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise _unusable(key, path, "tokenizer.json is missing")
    for name in _JSON_FILES:
        if (path / name).is_file():
            read_checkpoint_json(path / name)
    if (path / _TEMPLATE).is_file():
        read_text(path / _TEMPLATE, remedy="copy it from the checkpoint again")
    try:
        base = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # The library tokenizers raises plain Exceptions.
    except Exception as error:
        _check_tokenizer_json(path / "tokenizer.json")
        raise _unusable(key, path, first_line(error)) from error
    if base.chat_template is None and (path / _TEMPLATE_JSON).is_file():
        base.chat_template = _template(path / _TEMPLATE_JSON)
    eos = _eos_ids(path, base, prompt_format)
    _check(base, eos, path, prompt_format, key)
    pad = base.pad_token_id if base.pad_token_id is not None else min(eos)
    return ChatTokenizer(base, eos, pad)


def _unusable(key: str, path: Path, reason: str) -> InputError:
    return InputError(
        f"{key}={path}: no usable tokenizer there ({reason}); copy the checkpoint's tokenizer "
        "files beside it"
    )


def _check_tokenizer_json(file: Path) -> None:
    """Raise an error that names this file if it is the unusable one."""
    if not file.is_file():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(
            f"{file}: not a tokenizer ({first_line(error)}); copy it from the checkpoint again"
        ) from error


def _template(file: Path) -> str:
    template = read_checkpoint_json(file).get("chat_template")
    if not isinstance(template, str):
        raise InputError(f"{file}: has no text chat_template; copy it from the checkpoint again")
    return template


def _eos_ids(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> frozenset[int]:
    """Return where a completion ends: the tokenizer's EOS and those in generation_config.json.

    A turn can end with <|im_end|> or <|endoftext|>. Without that file, config.json is used, as in
    transformers. Nothing else in generation_config.json is used: the recipe defines the sampling.
    """
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    file = folder / "generation_config.json"
    if file.is_file():
        where, listed = file, read_checkpoint_json(file).get("eos_token_id")
    else:
        where, listed = folder / "config.json", prompt_format.eos_token_id
    for token in listed if isinstance(listed, list) else [] if listed is None else [listed]:
        if type(token) is not int or not 0 <= token < len(tokenizer):
            raise InputError(
                f"{where}: eos_token_id is {listed!r}, but the tokenizer has tokens 0 to "
                f"{len(tokenizer) - 1}; copy the checkpoint's own files"
            )
        ids.add(token)
    return frozenset(ids)


def _check(
    base: PreTrainedTokenizerBase,
    eos: frozenset[int],
    path: Path,
    prompt_format: PromptFormat,
    key: str,
) -> None:
    def refuse(what: str) -> InputError:
        return InputError(
            f"{key}={path}: the tokenizer does not belong to the model ({what}); "
            "use the tokenizer files of the same checkpoint"
        )

    if len(base) > prompt_format.vocab_size:
        raise refuse(f"{len(base)} tokens, the model has {prompt_format.vocab_size}")
    if not eos:
        raise refuse("it has no end-of-sequence token")
    if not base.chat_template:
        raise refuse("it has no chat template")
    for kind, wanted in prompt_format.placeholders.items():
        try:
            text = base.apply_chat_template(
                [{"role": "user", "content": [{"type": kind, kind: ""}]}],
                tokenize=False,
                add_generation_prompt=True,
            )
        # A template is a program, and can raise any exception.
        except Exception as error:
            raise InputError(
                f"{_template_file(path)}: the chat template can't be used ({first_line(error)}); "
                "copy it from the checkpoint again"
            ) from error
        ids = base(text, add_special_tokens=False)["input_ids"]
        if ids.count(wanted) != 1:
            raise refuse(f"its chat template yields no {kind} token {wanted}")


def _template_file(folder: Path) -> Path:
    """Return the file that the chat template was read from."""
    if (folder / _TEMPLATE).is_file():
        return folder / _TEMPLATE
    own = folder / "tokenizer_config.json"
    if own.is_file() and "chat_template" in read_checkpoint_json(own):
        return own
    return folder / _TEMPLATE_JSON
