"""Turn sampled tokens into a completion, the same way for every generator."""

import torch

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.groups.answer_span import find_answer_tokens
from nemo_care.groups.group import Completion


def completion_of(
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    tokenizer: ChatTokenizer,
    routing: torch.Tensor | None = None,
) -> Completion:
    """Cut a row of tokens [C_max] and its log-probabilities float32 [C_max] after its EOS.

    `routing` int16 [C_max, layers, top_k] is cut alike (see `Completion`).
    """
    ids = tokens.tolist()
    end = next((at for at, token in enumerate(ids) if token in tokenizer.eos_ids), None)
    length = len(ids) if end is None else end + 1
    answer = find_answer_tokens(tokenizer.base, ids[:length])
    return Completion(
        token_ids=tokens[:length].clone(),
        log_probs=log_probs[:length].clone(),
        text=tokenizer.completion_text(ids[:length]),
        ended=end is not None,
        answer_span=None if answer is None else answer.span,
        answer_cuts=None if answer is None else answer.cuts,
        routing=None if routing is None else routing[:length].clone(),
    )
