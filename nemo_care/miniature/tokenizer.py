"""A Hugging Face tokenizer of the miniature's words, with the family's kind of chat template."""

from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from nemo_care.miniature.vocabulary import SPECIAL_TOKENS, TAGS, TOKEN_ID, UNKNOWN

# As in the family's own template, a video is one <|video_pad|> (an image one <|image_pad|>) here;
# the family's prompt format repeats it once per vision token.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|> "
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)


def build_tokenizer(token_ids: Mapping[str, int] = TOKEN_ID) -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per word, split at white space, tags and special tokens.

    The think and answer tags are ordinary tokens, so that decoding with `skip_special_tokens` keeps
    them for the rewards. `token_ids` are the words' ids, including special tokens and tags.
    """
    words = Tokenizer(WordLevel(dict(token_ids), unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    words.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
