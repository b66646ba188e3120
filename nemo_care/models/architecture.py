"""The sizes of a model of any family, with which planning computes."""

from dataclasses import dataclass

UNRECORDED = -1
"""In place of the experts of a token that has none recorded: the router chooses them."""


@dataclass(frozen=True)
class VisionArchitecture:
    """Sizes of the vision tower: its blocks' heads and the width of their feed-forward layers."""

    heads: int
    ffn_size: int


@dataclass(frozen=True)
class Experts:
    """Each layer's feed-forward networks: of `count`, a token passes through `active`."""

    count: int
    active: int


@dataclass(frozen=True)
class Architecture:
    """Sizes of a language model with a vision tower.

    `ffn_size` is the width of a layer's feed-forward network, or of each of its `experts`.
    `heads` query heads share `kv_heads` key-value heads, each `head_dim` wide. `tied`: the output
    layer is the embedding. `max_positions` is the longest sequence the model supports.
    `deep_levels` of the vision tower's features are added after as many first layers (see
    `deep_features.py`).
    """

    layers: int
    hidden_size: int
    head_dim: int
    heads: int
    kv_heads: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    tied: bool
    vision: VisionArchitecture
    deep_levels: int = 0
    experts: Experts | None = None

    @property
    def query_size(self) -> int:
        """The width of all queries together, and of the input to attention's output layer."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """The width of all keys together, and of all values."""
        return self.kv_heads * self.head_dim
