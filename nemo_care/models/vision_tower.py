"""Hugging Face's vision towers, with attention that computes all windows of one size in one call.

A video of 8000 tokens has some 600 windows of at most 64 patches. transformers calls torch's kernel
for each of them in each block: 20000 calls forward, whose launching takes a GPU's whole second.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

# transformers hands a function all windows and their bounds if "flash" is in its name.
WINDOW_ATTENTION = "nemo_care_flash_windows"


def vision_tower(
    kind: type[PreTrainedModel], hf: PretrainedConfig, config: "TransformerConfig"
) -> PreTrainedModel:
    """Build a tower of transformers, without meaningful weights, on the compute device.

    Its windows, or whole frames where it has none, are attended to by `attend_windows`. `config`
    says its type, and whether its activations are recomputed.
    """
    tower = kind._from_config(hf, attn_implementation="sdpa", dtype=config.params_dtype).to(
        torch.cuda.current_device()
    )
    tower.config._attn_implementation = WINDOW_ATTENTION
    if config.recompute_granularity == "full":
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    return tower


@dataclass(frozen=True)
class _Windows:
    """Windows by size: (n, L) each. `tokens` long [S] holds theirs in that order, `places` where
    each token is then; both None where all have the same size and lie in order."""

    sizes: list[tuple[int, int]]
    tokens: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @classmethod
    def of(cls, bounds: torch.Tensor) -> "_Windows":
        """From their bounds [windows + 1]; made once for all blocks, since it waits for a GPU."""
        known = getattr(bounds, "_windows", None)
        if known is None:
            known = cls._made(bounds)
            bounds._windows = known  # type: ignore[attr-defined]
        return known

    @classmethod
    def _made(cls, bounds: torch.Tensor) -> "_Windows":
        starts = bounds.long().cpu()
        lengths = starts.diff()
        # A video's last frame may leave windows without a token.
        sizes = [length for length in lengths.unique().tolist() if length]
        counts = [int((lengths == length).sum()) for length in sizes]
        both = list(zip(counts, sizes, strict=True))
        if len(sizes) == 1:
            return cls(both)
        tokens = torch.cat(
            [
                (starts[:-1][lengths == length, None] + torch.arange(length)).flatten()
                for length in sizes
            ]
        )
        return cls(both, tokens.to(bounds.device), tokens.argsort().to(bounds.device))


def attend_windows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Every token attends to all of its window.

    Args:
        module: not used; transformers' signature.
        query: [1, heads, S, head_dim]; key and value alike.
        attention_mask: not used.
        cu_seq_lens_q: the windows' bounds [windows + 1], from 0 to S.
        scaling: factor of the scores.
        unused: what other kernels want to know.

    Returns:
        [1, S, heads, head_dim], and None for the weights.
    """
    windows = _Windows.of(cu_seq_lens_q)
    parts = [x[0].transpose(0, 1) for x in (query, key, value)]
    if windows.tokens is not None:
        parts = [x.index_select(0, windows.tokens) for x in parts]
    lengths = [count * size for count, size in windows.sizes]
    outputs = []
    for (count, _), *of_size in zip(windows.sizes, *(x.split(lengths) for x in parts), strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in of_size)
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if windows.places is None:
        return outputs[0][None], None
    return torch.cat(outputs).index_select(0, windows.places)[None], None


ALL_ATTENTION_FUNCTIONS.register(WINDOW_ATTENTION, attend_windows)
