"""Tokenizers of several kinds, with and without tokens that join a tag and the answer."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

EOS = "<|im_end|>"
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
CORPUS = [
    "<think>why</think>\n<answer> B</answer>\n",
    "<think>because it is so</think><answer>A</answer>",
    "<think>since the door is open</think>\n<answer>\nC\n</answer>",
    "><.><.><.>\n.>\n B. B",
] * 20


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def byte_level(merges: bool) -> PreTrainedTokenizerFast:
    """Return bytes, or merges learnt across white space and tags (by `use_regex=False`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330 if merges else 257,
        initial_alphabet=sorted(BYTE_OF),
        special_tokens=[EOS],
        max_token_length=4,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def with_tokens(*pieces: str) -> PreTrainedTokenizerFast:
    """Return single bytes and the given pieces, each of them one token wherever it occurs."""
    tokenizer = byte_level(merges=False)
    tokenizer.add_tokens(list(pieces))
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """Return Llama's decoder: blanks as `▁`, unknown characters as bytes, first blank stripped."""
    vocabulary = [EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"<>/thinkanswerABCopdxy"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([EOS])
    return wrap(tokenizer)


TOKENIZERS = {
    "bytes": byte_level(merges=False),
    "merges": byte_level(merges=True),
    "tags": with_tokens("<answer>", "</answer>", "<think>", "</think>"),
    "joined tags": with_tokens("><", ">\n", " B", "answer> ", "\n</"),
    "metaspace": metaspace(),
}
