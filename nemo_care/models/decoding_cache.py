"""Keys and values while completions are sampled: each prompt's once, each completion's its own.

A cache row per completion would hold G copies of a prompt of thousands of tokens, and every new
token would read its own copy. Here the G new tokens of a group read one.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_care.models.segments import PackedSegments


class DecodingCache(PackedSeqParams):
    """Cache of N completions of B prompts, for all layers of this pipeline stage.

    First `prompts` are forwarded as one packed sequence; then, after `begin_decoding`, one token
    of each completion at a time, as a sequence of N tokens. `keep` drops completions that ended.
    Letters: R rows (completions still going on), T their tokens so far, Q queries per key head.
    """

    def __init__(self, prompts: PackedSegments, group_size: int, max_tokens: int) -> None:
        """`prompts` are B segments without context; each gets `group_size` completions."""
        super().__init__(qkv_format="sbhd")
        self.prompts = prompts
        self.decoding = False
        self.max_tokens = max_tokens
        self.tokens = 0
        lengths = torch.tensor([segment.length for segment in prompts.segments])
        self._width = int(lengths.max())
        self._hidden = (torch.arange(self._width) >= lengths[:, None]).to(prompts.device)
        self._any_hidden = bool(self._hidden.any())
        self._group_size = group_size
        # Place of each row among the B * G completions of the prompts in the cache.
        self._places = torch.arange(len(lengths) * group_size, device=prompts.device)
        self._count()
        # By layer: prompts [B, key heads, P_max, head_dim], completions [N, key heads, C_max, ..].
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        pairs = (*self._prompt.values(), *self._own.values())
        return sum(memory.nbytes for pair in pairs for memory in pair)

    def store_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep keys and values [S, 1, key heads, head_dim] of the packed prompts."""
        self._prompt[layer] = tuple(  # type: ignore[assignment]
            torch.nn.utils.rnn.pad_sequence(
                [x[s.start : s.stop, 0] for s in self.prompts.segments], batch_first=True
            )
            .transpose(1, 2)
            .contiguous()
            for x in (key, value)
        )

    def begin_decoding(self) -> None:
        """All prompts are stored; from now on new tokens come."""
        self.decoding = True

    def advance(self) -> None:
        """One more token of each completion has gone through all layers."""
        self.tokens += 1

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
    ) -> torch.Tensor:
        """Store the new tokens' keys and values and attend to prompt and own completion.

        `query` is [R, 1, heads, head_dim], `key` and `value` [R, 1, key heads, head_dim]; padding
        may lie behind the R rows. Returns [R, 1, heads * head_dim], zero at the padding.
        """
        rows, _, heads, width = query.shape
        padding, rows = rows - self._rows, self._rows
        query, key, value = (x[:rows] for x in (query, key, value))
        own_k, own_v = self._own_memory(layer, key)
        own_k[:rows, :, self.tokens] = key[:, 0]
        own_v[:rows, :, self.tokens] = value[:, 0]
        own_k, own_v = (x[:rows, :, : self.tokens + 1] for x in (own_k, own_v))
        prompt_k, prompt_v = self._prompt[layer]
        prompts, key_heads = prompt_k.shape[:2]
        q = query[:, 0].view(rows, key_heads, heads // key_heads, width)
        scale = width**-0.5 if scale is None else scale

        # The queries of a group side by side: one product with the prompt's keys for all of them.
        grouped = self._to_places(q).view(prompts, self._group_size, key_heads, -1, width)
        grouped = grouped.transpose(1, 2).flatten(2, 3)
        scores = _product(grouped, prompt_k.transpose(2, 3))
        if self._any_hidden:
            scores = scores.masked_fill(self._hidden[:, None, None], float("-inf"))
        own_scores = _product(q, own_k.transpose(2, 3))
        weights = torch.cat([self._from_groups(scores), own_scores], dim=-1)
        weights = torch.softmax(weights * scale, dim=-1).to(q.dtype)
        on_prompt, on_own = weights.split([self._width, self.tokens + 1], dim=-1)
        grouped = self._to_places(on_prompt).view(
            prompts, self._group_size, key_heads, -1, self._width
        )
        out = self._from_groups(grouped.transpose(1, 2).flatten(2, 3) @ prompt_v)
        out = (out + on_own @ own_v).reshape(rows, 1, heads * width)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only (ascending); prompts without rows are let go too."""
        self._places = self._places[rows]
        for memories in self._own.values():
            for memory in memories:
                memory[: len(rows), :, : self.tokens] = memory[rows, :, : self.tokens]
        group = self._places // self._group_size
        groups, renumbered = group.unique(return_inverse=True)
        if len(groups) < len(self._hidden):
            self._places = renumbered * self._group_size + self._places % self._group_size
            self._hidden = self._hidden[groups]
            # One layer at a time: all at once would hold the cache twice.
            for layer, (k, v) in self._prompt.items():
                self._prompt[layer] = (k[groups], v[groups])
        self._count()

    def _count(self) -> None:
        """How many rows there are, and how many places: those of ended completions are free."""
        self._rows = len(self._places)
        self._all_rows = len(self._hidden) * self._group_size

    def _own_memory(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._own:
            rows, _, key_heads, width = like.shape
            shape = (rows, key_heads, self.max_tokens, width)
            self._own[layer] = (like.new_empty(shape), like.new_empty(shape))
        return self._own[layer]

    def _to_places(self, x: torch.Tensor) -> torch.Tensor:
        """[R, ...] to [B * G, ...], zero where a completion has ended."""
        if self._rows == self._all_rows:
            return x.contiguous()
        out = x.new_zeros(self._all_rows, *x.shape[1:])
        out[self._places] = x
        return out

    def _from_groups(self, x: torch.Tensor) -> torch.Tensor:
        """[B, key heads, G * Q, ...] to [R, key heads, Q, ...]."""
        x = x.unflatten(2, (self._group_size, -1)).transpose(1, 2).flatten(0, 1)
        return x if self._rows == self._all_rows else x[self._places]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched a @ b in float32: scores of large keys, rounded to 16 bits, would move a token's
    probability away from what training's kernels compute."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type != "cpu":
        flat = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return flat.unflatten(0, a.shape[:2])
    return a.float() @ b.float()
