"""Decoding by steps that are all alike, so that a CUDA graph can replay them.

Launching a step's kernels one by one takes the CPU longer than the GPU needs to run them. A graph
launches them all at once, but it can only repeat: the same shapes at the same addresses, nothing
that the CPU reads or writes in between. So completions that have ended stay in the batch and are
masked, the cache of a completion has its full length with the step's number on the GPU, and the
CPU looks only every few tokens whether all have ended. On a CPU the same steps run as they are.
"""

from collections.abc import Callable
from typing import Any

import torch

from nemo_care.rollouts.decoding import Decoding

# Tokens between two looks at what has ended: the CPU waits for the GPU at each.
LOOK_EVERY = 16


class FixedDecoding(Decoding):
    """As `Decoding`; `run` samples the same tokens, without a wait or an upload between looks.

    A graph is captured for each batch: its prompts' lengths are part of it. With pipeline stages
    each captures its own part, and hidden states and tokens travel between the graphs.
    """

    fixed = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As `Decoding`."""
        super().__init__(*arguments, **options)
        rows = len(self.prompts) * self.group_size
        config = self.model.config
        # Everything that a step reads or writes has its place from here on.
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
        """As `Decoding.run`."""
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
        """Write this token down, put it through this stage and, after the last, choose the next.

        What a graph captures: no value on the CPU may depend on one on the GPU or change.
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
        """Put the token of each row that goes on into the results; its number, long [1]."""
        number = self.cache.step
        assert number is not None
        token = self.token.masked_fill(self.ended, self.pad_id)
        log_prob = self.log_prob.masked_fill(self.ended, 0.0)
        self.tokens.index_copy_(1, number, token[:, None])
        self.log_probs.index_copy_(1, number, log_prob[:, None])
        self.ended |= (self.token[:, None] == self.eos).any(dim=-1)
        return number

    def _take(self, logits: torch.Tensor) -> None:
        """Choose the next token of each row, on the rank that samples."""
        if not self.ranks.is_loss_leader:
            return
        assert self.cache.step is not None
        uniforms = self.uniforms.index_select(1, self.cache.step)[:, 0]
        token, log_prob = self._chosen(logits, uniforms)
        self.token.copy_(token)
        self.log_prob.copy_(log_prob)

    def _share(self) -> None:
        """Give the tokens to all ranks of the replica."""
        self.ranks.broadcast_from_loss_leader(self.token)
        self.ranks.broadcast_from_loss_leader(self.log_prob)


class Replayed:
    """A function without arguments, replayed from its third call on where there is CUDA.

    The first call makes what is made once; the second is captured, and then replayed.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        """Nothing is called yet."""
        self._function = function
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call or replay."""
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
