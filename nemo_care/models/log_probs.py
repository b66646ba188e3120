"""Log-probabilities of given tokens from hidden states, with the vocabulary sharded over ranks.

The output layer runs only on the rows needed, some rows at a time. Backward recomputes their
logits, so that no float32 tensor of all tokens times the vocabulary exists. Nothing is gathered
along the vocabulary: ranks exchange one number per row.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

# Maximum number of float32 logits in memory at a time (128 MiB).
_CHUNK_ELEMENTS = 2**25


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    row_of: torch.Tensor,
    token_ids: torch.Tensor,
    vocab_size: int,
    *,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Compute the log-probability of each token.

    Args:
        hidden: [R, H] hidden states; one of them can predict several tokens.
        weight: [V_padded / TP, H], this rank's slice of the output layer.
        row_of: long [T], the row of `hidden` that predicts each token.
        token_ids: long [T].
        vocab_size: V; the padding columns beyond it get no probability.
        chunk_elements: maximum of rows at a time multiplied by a rank's vocabulary.

    Returns:
        float32 [T], equal on all tensor-parallel ranks. Differentiable by `hidden` and `weight`;
        the gradient by `hidden` is this rank's part, to be summed over the tensor-parallel ranks.
    """
    return _TokenLogProbs.apply(hidden, weight, row_of, token_ids, vocab_size, chunk_elements)


def float32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the float32 product of two matrices of one type; not differentiable.

    On CUDA it is not rounded to the type of the factors first: with bf16, a logit of 20 would be
    off by up to 0.06, and the log-probability with it. On the CPU, torch has no such product.
    """
    if _sums_in_float32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _sums_in_float32(factor: torch.Tensor) -> bool:
    return factor.is_cuda and factor.dtype != torch.float32


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        row_of: torch.Tensor,
        token_ids: torch.Tensor,
        vocab_size: int,
        chunk_elements: int,
    ) -> torch.Tensor:
        slices = _Slices(weight, token_ids, vocab_size, chunk_elements)
        log_sums = hidden.new_empty(len(hidden), dtype=torch.float32)
        chosen = torch.zeros(len(token_ids), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), slices.rows):
            logits = slices.logits(hidden, start)
            log_sums[start : start + slices.rows] = torch.logsumexp(logits, dim=-1)
            tokens, rows, columns = slices.owned(row_of, start)
            chosen[tokens] = logits[rows, columns]
        log_sums = _log_sum_over_ranks(log_sums)
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            dist.all_reduce(chosen, group=parallel_state.get_tensor_model_parallel_group())
        ctx.save_for_backward(hidden, weight, row_of, token_ids, log_sums)
        ctx.sizes = (vocab_size, chunk_elements)
        return chosen - log_sums[row_of]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, row_of, token_ids, log_sums = ctx.saved_tensors
        slices = _Slices(weight, token_ids, *ctx.sizes)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over chunks in float32: in bf16, late chunks would be rounded away.
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        # d log p(token) / d logits = one-hot(token) - softmax, summed over the tokens of a row.
        row_grads = torch.zeros_like(log_sums).index_add_(0, row_of, grad)
        for start in range(0, len(hidden), slices.rows):
            chunk = slice(start, start + slices.rows)
            logits = slices.logits(hidden, start)
            logits.sub_(log_sums[chunk, None]).exp_().mul_(-row_grads[chunk, None])
            tokens, rows, columns = slices.owned(row_of, start)
            logits.index_put_((rows, columns), grad[tokens], accumulate=True)
            grad_logits = logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, slices.weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight[: slices.width] += grad_logits.t() @ hidden[chunk]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _Slices:
    """This rank's part of the vocabulary, and the rows computed at a time."""

    def __init__(
        self, weight: torch.Tensor, token_ids: torch.Tensor, vocab_size: int, chunk_elements: int
    ) -> None:
        padded_width = weight.shape[0]
        first = parallel_state.get_tensor_model_parallel_rank() * padded_width
        # Columns of vocabulary padding are excluded; a rank may have only those.
        self.width = min(max(vocab_size - first, 0), padded_width)
        self.weight = weight[: self.width]
        self.rows = max(1, chunk_elements // padded_width)
        self._columns = token_ids - first
        self._mine = (self._columns >= 0) & (self._columns < self.width)

    def logits(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Return float32 [rows, V / TP] logits in newly allocated memory."""
        return float32_product(hidden[start : start + self.rows], self.weight.t())

    def owned(
        self, row_of: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return this rank's tokens predicted by the rows from `start`: index, row and column."""
        here = self._mine & (row_of >= start) & (row_of < start + self.rows)
        tokens = here.nonzero()[:, 0]
        return tokens, row_of[tokens] - start, self._columns[tokens]


def _log_sum_over_ranks(log_sums: torch.Tensor) -> torch.Tensor:
    """Return the log of the sum over tensor-parallel ranks of exp(log_sums)."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return log_sums
    group = parallel_state.get_tensor_model_parallel_group()
    largest = log_sums.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.exp(log_sums - largest)
    dist.all_reduce(sums, group=group)
    return largest + torch.log(sums)
