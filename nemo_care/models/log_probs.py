"""Log-probabilities of given tokens from logits that are cut along the vocabulary."""

import torch
from megatron.core import parallel_state, tensor_parallel


def token_log_probs(logits: torch.Tensor, token_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Log-probability of each next token, without gathering the vocabulary.

    Args:
        logits: [B, S, V_padded / TP], this rank's slice of the vocabulary.
        token_ids: [B, S]; the token at t is predicted by the logits at t - 1.
        vocab_size: V; the padding columns beyond it get no probability.

    Returns:
        float32 [B, S - 1]: entry t is log p(token t + 1 | tokens 0..t). Differentiable.
    """
    predicting = logits[:, :-1].float()
    width = predicting.shape[-1]
    first = parallel_state.get_tensor_model_parallel_rank() * width
    if first + width > vocab_size:
        columns = torch.arange(first, first + width, device=logits.device)
        predicting = predicting.masked_fill(columns >= vocab_size, float("-inf"))
    # Megatron's cross entropy works on [S, B, V / TP] and overwrites its input's storage.
    negative = tensor_parallel.vocab_parallel_cross_entropy(
        predicting.transpose(0, 1).contiguous(), token_ids[:, 1:].t().contiguous()
    )
    return -negative.t()
