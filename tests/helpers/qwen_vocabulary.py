"""Qwen2.5-VL's real tokenizer, from the vocabulary in the package dashscope."""

import base64
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
SPECIAL = {
    name: 151643 + place
    for place, name in enumerate(
        [
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
            *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>"),
            *("<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
            *("<|image_pad|>", "<|video_pad|>"),
        ]
    )
}
"""As published with Qwen2.5-VL; the ids continue after those of the words."""
NOT_SPECIAL = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
]
"""Further added tokens, which Qwen does not mark as special."""
ROWS = 151936
"""The number of rows of the embedding: more than tokens, as in the published checkpoints."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def ranks() -> dict[bytes, int]:
    """Return the vocabulary: the bytes of each token, with its id, which is also its merge rank."""
    package = importlib.util.find_spec("dashscope")
    assert package is not None, "pip install -e '.[dev]'"
    assert package.origin is not None
    content = (Path(package.origin).parent / "resources" / "qwen.tiktoken").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


class _Converter(TikTokenConverter):
    """Reads the file without the package tiktoken."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url):
        return ranks()


@cache
def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of Qwen2.5-VL as loaded by Hugging Face; takes seconds once."""
    vocabulary, merges = _Converter().extract_vocab_merges_from_model("")
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in NOT_SPECIAL])
    # Last, because the constructor gives the first ids to tokens passed to it.
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer
