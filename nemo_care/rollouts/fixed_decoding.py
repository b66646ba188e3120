"""Decode in steps that are all alike, so that a CUDA graph can replay them.

Launching a step's kernels one by one takes the CPU longer than the GPU needs to run them. A graph
launches them all at once, but it only repeats: the same shapes at the same addresses, and nothing
that the CPU reads or writes in between. So completions that have ended stay in the batch and are
masked, each completion's cache has its full length, the step's number is on the GPU, and the CPU
checks only every few tokens whether all have ended. Without CUDA the same steps run one by one.
"""

from collections.abc import Callable
from typing import Any

import torch

from nemo_care.rollouts.decoding import Decoding

# Tokens between two checks of whether all have ended; at each, the CPU waits for the GPU.
LOOK_EVERY = 16


class FixedDecoding(Decoding):
    """A `Decoding` that samples the same tokens, without a wait or an upload between checks.

    A graph is captured for each batch, since its prompts' lengths are part of it. Each pipeline
    stage captures its own part, and hidden states and tokens are sent between the graphs.
    """

    fixed = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Allocate everything that a step reads or writes; arguments as for `Decoding`."""
        super().__init__(*arguments, **options)
        rows = len(self.prompts) * self.group_size
        config = self.model.config
        self.token = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.log_prob = torch.zeros(rows, device=self.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.received = torch.zeros(
            self._padded(rows),
            1,
            config.hidden_size,
            dtype=config.pipeline_dtype or config.params_dtype,
            device=self.device,
        )
        self.sent = self.received

    def run(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and log-probabilities (see `Decoding.run`)."""
        self.uniforms = uniforms.to(self.device)
        self.tokens, self.log_probs = self._results()
        self.positions = self._first_positions()
        logits = self.prefill().repeat_interleave(self.group_size, dim=0)
        self._take(logits)
        self._share()
        step = Replayed(self.step)
        for number in range(1, self.sampling.max_tokens):
            if number % LOOK_EVERY == 0 and bool(self.ended.all()):
                break
            if not self.ranks.is_first_stage:
                self.ranks.receive_from_previous_stage(self.received)
            step()
            if not self.ranks.is_last_stage:
                self.ranks.send_to_next_stage(self.sent)
            self._share()
        self._write()
        return self.tokens.cpu(), self.log_probs.cpu()

    def step(self) -> None:
        """Record this token, compute it in this stage and, in the last one, choose the next.

        A graph captures this: no value on the CPU may change, or depend on one on the GPU.
        """
        number = self._write()
        self.cache.begin_step(self.model.config.params_dtype)
        self.model.set_input_tensor(None if self.ranks.is_first_stage else self.received)
        hidden = self.model(self._token_inputs(self.token, self.positions + number))
        self.cache.advance()
        if self.ranks.is_last_stage:
            self._take(self._row_logits(hidden, len(self.token)))
        else:
            self.sent = hidden

    def _write(self) -> torch.Tensor:
        """Write the token of each row that has not ended; return its number, long [1]."""
        number = self.cache.step
        assert number is not None
        token = self.token.masked_fill(self.ended, self.pad_id)
        log_prob = self.log_prob.masked_fill(self.ended, 0.0)
        self.tokens.index_copy_(1, number, token[:, None])
        self.log_probs.index_copy_(1, number, log_prob[:, None])
        self.ended |= (self.token[:, None] == self.eos).any(dim=-1)
        return number

    def _take(self, logits: torch.Tensor) -> None:
        """On the rank that samples: choose the next token of each row."""
        if not self.ranks.is_loss_leader:
            return
        assert self.cache.step is not None
        uniforms = self.uniforms.index_select(1, self.cache.step)[:, 0]
        token, log_prob = self._chosen(logits, uniforms)
        self.token.copy_(token)
        self.log_prob.copy_(log_prob)

    def _share(self) -> None:
        """Send the tokens to all ranks of the replica."""
        self.ranks.broadcast_from_loss_leader(self.token)
        self.ranks.broadcast_from_loss_leader(self.log_prob)


class Replayed:
    """A function without arguments that, with CUDA, is replayed from its third call on.

    The first call allocates what is needed once; the second is captured, and then replayed.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        """Call nothing yet."""
        self._function = function
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call, capture or replay it."""
        if self._graph is not None:
            self._graph.replay()
        elif not self._called or not torch.cuda.is_available():
            self._called = True
            self._function()
        else:
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog thread queries events during the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._function()
            graph.replay()
            self._graph = graph
