"""Keys and values while completions are sampled: each prompt's once, each completion's its own.

A cache row per completion would hold G copies of a prompt of thousands of tokens, and every new
token would read its own copy. Here the G new tokens of a group read one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_care.models import flash_decoding
from nemo_care.models.segments import PackedSegments, Segment

# What a cache of fixed shape is rounded up to: attention kernels load masks in such pieces.
_ALIGNED = 16


class Rotation:
    """The rotary embedding of one forward pass, whose cosines and sines all layers share.

    Results equal those of Megatron's `apply_rotary_pos_emb` to the last bit.
    """

    def __init__(self, angles: torch.Tensor, dtype: torch.dtype) -> None:
        """`angles` are what the model's rotary module gives: [S, 1, 1, head_dim]."""
        angles = angles[:, 0]
        self._cos = angles.cos().to(dtype)
        sin = angles.sin().to(dtype)
        first, second = sin.chunk(2, dim=-1)
        # Halves change places with a change of sign, which is put into the sine.
        self._sin = torch.cat((-first, second), dim=-1)

    def __call__(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate [S, heads, head_dim] and [S, key heads, head_dim] together."""
        x = torch.cat((query, key), dim=1)
        turned = x * self._cos[: len(x)] + x.roll(x.shape[-1] // 2, -1) * self._sin[: len(x)]
        rotated = turned.split((query.shape[1], key.shape[1]), dim=1)
        return rotated[0], rotated[1]


@dataclass
class PromptPass(PackedSegments):
    """Prompts that are forwarded as one packed sequence into a cache, from its `first` prompt on.

    `rotation` is set by each forward pass before its first layer.
    """

    cache: "DecodingCache | None" = None
    first: int = 0
    rotation: Rotation | None = None

    def rotate_and_store(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep key and value [S, 1, key heads, head_dim]; query and key, rotated."""
        assert self.cache is not None
        if self.rotation is not None:
            q, k = self.rotation(query[:, 0], key[:, 0])
            query, key = q[:, None], k[:, None]
        self.cache.store_prompts(layer, self, key, value)
        return query, key


class DecodingCache(PackedSeqParams):
    """Cache of N completions of B prompts, for all layers of this pipeline stage.

    First the `passes` are forwarded; then one token of each completion at a time, as a sequence of
    N tokens. `keep` drops completions that ended, unless shapes are fixed.
    Letters: R rows (completions still going on), T their tokens so far, Q queries per key head.
    """

    def __init__(
        self,
        lengths: list[int],
        group_size: int,
        max_tokens: int,
        *,
        device: torch.device | None = None,
        multiple: int = 1,
        apart: bool = False,
        fixed: bool = False,
    ) -> None:
        """Create the cache of B prompts with `group_size` completions each.

        Args:
            lengths: tokens of the prompts.
            group_size: completions of each.
            max_tokens: the most that a completion has.
            device: where the cache is; None: the CPU.
            multiple: what a pass is padded to a multiple of.
            apart: whether each prompt is a pass by itself; otherwise all of them are one.
            fixed: all rows stay, and the step's number is on the device: no shape, address or
                value that the CPU gives changes from one step to the next.
        """
        super().__init__(qkv_format="sbhd")
        self.rotation: Rotation | None = None
        self.max_tokens = -(-max_tokens // _ALIGNED) * _ALIGNED if fixed else max_tokens
        self.tokens = 0
        self.device = device or torch.device("cpu")
        self.step = torch.zeros(1, dtype=torch.long, device=self.device) if fixed else None
        self._later: torch.Tensor | None = None
        self._lengths = lengths
        self._width = max(lengths)
        self._multiple = multiple
        self._apart = apart
        hidden = torch.arange(self._width) >= torch.tensor(lengths)[:, None]
        self._any_hidden = bool(hidden.any())
        self._hidden = hidden.to(self.device)
        self._group_size = group_size
        # Place of each row among the B * G completions of the prompts in the cache.
        self._places = torch.arange(len(lengths) * group_size, device=self.device)
        self._count()
        # By layer: prompts [B, key heads, P_max, head_dim], completions [N, key heads, C_max, ..].
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def passes(self) -> list[PromptPass]:
        """Return the passes that forward the prompts, and fill the cache as they do."""
        sizes = [1] * len(self._lengths) if self._apart else [len(self._lengths)]
        made = []
        for first in range(0, len(self._lengths), sizes[0]):
            segments, end = [], 0
            for length in self._lengths[first : first + sizes[0]]:
                segments.append(Segment(end, end + length))
                end += length
            padded = -(-end // self._multiple) * self._multiple
            made.append(
                PromptPass(
                    segments=tuple(segments),
                    length=padded,
                    device=self.device,
                    cache=self,
                    first=first,
                )
            )
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        pairs = (*self._prompt.values(), *self._own.values())
        return sum(memory.nbytes for pair in pairs for memory in pair)

    def store_prompts(
        self, layer: int, packed: PromptPass, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Keep keys and values [S, 1, key heads, head_dim] of a pass."""
        if layer not in self._prompt:
            shape = (len(self._lengths), key.shape[2], self._width, key.shape[3])
            # Kernels multiply the padding's values by 0, so they must be finite.
            self._prompt[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        for memory, x in zip(self._prompt[layer], (key, value), strict=True):
            for place, segment in enumerate(packed.segments, packed.first):
                own = x[segment.start : segment.stop, 0].transpose(0, 1)
                memory[place, :, : segment.length] = own

    def begin_step(self, dtype: torch.dtype) -> None:
        """Before each forward pass of a fixed shape: hide tokens that are not sampled yet."""
        assert self.step is not None
        later = torch.arange(self.max_tokens, device=self.device) > self.step
        self._later = torch.zeros_like(later, dtype=dtype).masked_fill(later, float("-inf"))

    def advance(self) -> None:
        """One more token of each completion has gone through all layers."""
        if self.step is None:
            self.tokens += 1
        else:
            self.step += 1

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
        may follow the R rows. Returns [R, 1, heads * head_dim], zero at the padding.
        """
        rows, _, heads, width = query.shape
        padding, rows = rows - self._rows, self._rows
        query, key, value = (x[:rows, 0] for x in (query, key, value))
        if self.rotation is not None:
            query, key = self.rotation(query, key)
        own_k, own_v = self._store(layer, key, value)
        q = query.reshape(rows, key.shape[1], -1, width)
        scale = width**-0.5 if scale is None else scale
        attend = self._in_parts if flash_decoding.usable(q) else self._in_one
        out = attend(layer, q, own_k, own_v, scale).reshape(rows, 1, heads * width)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these rows only (ascending); prompts without rows are dropped too."""
        self._places = self._places[rows]
        for memories in self._own.values():
            for memory in memories:
                memory[: len(rows), :, : self.tokens] = memory[rows, :, : self.tokens]
        group = self._places // self._group_size
        groups, renumbered = group.unique(return_inverse=True)
        if len(groups) < len(self._hidden):
            self._places = renumbered * self._group_size + self._places % self._group_size
            self._hidden = self._hidden[groups]
            self._lengths = [self._lengths[number] for number in groups.tolist()]
            # One layer at a time: all at once would hold the cache twice.
            for layer, (k, v) in self._prompt.items():
                self._prompt[layer] = (k[groups], v[groups])
        self._count()

    def _count(self) -> None:
        """Count the rows, and the places, of which those of ended completions are free."""
        self._rows = len(self._places)
        self._all_rows = len(self._hidden) * self._group_size

    def _store(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the tokens' keys and values [R, key heads, head_dim]; return all so far.

        They are [R, key heads, T, head_dim], with T = C_max for fixed shapes.
        """
        if layer not in self._own:
            rows, key_heads, width = key.shape
            shape = (rows, key_heads, self.max_tokens, width)
            make = key.new_empty if self.step is None else key.new_zeros
            self._own[layer] = (make(shape), make(shape))
        own = self._own[layer]
        if self.step is not None:
            for memory, x in zip(own, (key, value), strict=True):
                memory.index_copy_(2, self.step, x[:, :, None])
            return own
        for memory, x in zip(own, (key, value), strict=True):
            memory[: self._rows, :, self.tokens] = x
        seen = [memory[: self._rows, :, : self.tokens + 1] for memory in own]
        return seen[0], seen[1]

    def _in_one(
        self, layer: int, q: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One softmax over the prompt's and the completion's scores, which are float32.

        `q` is [R, key heads, Q, head_dim], and so is the result.
        """
        prompt_k, prompt_v = self._prompt[layer]
        # The queries of a group side by side: one product with the prompt's keys for all of them.
        scores = _product(self._to_groups(q), prompt_k.transpose(2, 3))
        if self._any_hidden:
            scores = scores.masked_fill(self._hidden[:, None, None], float("-inf"))
        own_scores = _product(q, own_k.transpose(2, 3))
        if self._later is not None:
            own_scores = own_scores + self._later
        weights = torch.cat([self._from_groups(scores), own_scores], dim=-1)
        weights = torch.softmax(weights * scale, dim=-1).to(q.dtype)
        on_prompt, on_own = weights.split([self._width, own_k.shape[2]], dim=-1)
        out = self._from_groups(self._to_groups(on_prompt) @ prompt_v)
        return out + on_own @ own_v

    def _in_parts(
        self, layer: int, q: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As `_in_one`, with a kernel call per prompt and one for all completions' own tokens."""
        grouped = self._to_groups(q)
        # A call per prompt, of its own length, needs no mask, and long prompts are split over the
        # GPU's multiprocessors, which the kernels for rows of unequal length don't.
        prompt_k, prompt_v = self._prompt[layer]
        parts = []
        for place, length in enumerate(self._lengths):
            one = slice(place, place + 1)
            k, v = (x[one, :, :length] for x in (prompt_k, prompt_v))
            parts.append(flash_decoding.attention(grouped[one], k, v, scale))
        outs, sums = (_joined(part) for part in zip(*parts, strict=True))
        own, own_sums = flash_decoding.attention(q, own_k, own_v, scale, self._later)
        sums = self._from_groups(sums[..., None])[..., 0]
        return flash_decoding.merged(self._from_groups(outs), sums, own, own_sums)

    def _to_groups(self, x: torch.Tensor) -> torch.Tensor:
        """[R, key heads, Q, ...] to [B, key heads, G * Q, ...], 0 where a completion has ended."""
        places = x
        if self._rows < self._all_rows:
            places = x.new_zeros(self._all_rows, *x.shape[1:])
            places[self._places] = x
        grouped = places.unflatten(0, (-1, self._group_size))
        return grouped.transpose(1, 2).flatten(2, 3)

    def _from_groups(self, x: torch.Tensor) -> torch.Tensor:
        """[B, key heads, G * Q, ...] to [R, key heads, Q, ...]."""
        x = x.unflatten(2, (self._group_size, -1)).transpose(1, 2).flatten(0, 1)
        return x if self._rows == self._all_rows else x[self._places]


def _joined(parts: Any) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched a @ b in float32: scores of large keys, rounded to 16 bits, would move a token's
    probability away from what training's kernels compute."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type != "cpu":
        flat = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return flat.unflatten(0, a.shape[:2])
    return a.float() @ b.float()
