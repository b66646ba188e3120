"""The Hugging Face tensors that make up each Megatron parameter: a family's weight mapping."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Source:
    """The Hugging Face tensors of one Megatron parameter, and how tensor parallelism cuts it.

    `cut`: whole, columns, gate_up, qkv or vocabulary (see `weights.py`). Of a tensor of experts,
    `each` are the names of one expert's matrices with `{}` for its number, as engines take them.
    """

    names: tuple[str, ...]
    cut: str
    each: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightTable:
    """Maps Megatron's parameter names of a family to names on disk in its published checkpoints.

    Attributes:
        layer: by the name within a layer; names on disk are also relative to a layer.
        layer_prefix: the prefix of those names on disk, with `{}` for the layer's number.
        outer: by the name outside of the layers, including `EMBEDDING` and `OUTPUT`.
        vision_prefix: the prefix of the vision tower's parameters before their names on disk.
        disk_name: converts a tensor's name in transformers' modules, or in the files of some
            releases, to its name in the published checkpoints.
        mergers: beginnings, within the vision tower, of the names of the modules that turn its
            states into features.
        recomputed: endings of tensors in old files that every model computes itself.
        experts: endings of tensors that hold a matrix of all experts of a layer (see
            `expert_weights.py`).
    """

    layer: Mapping[str, Source]
    layer_prefix: str
    outer: Mapping[str, Source]
    vision_prefix: str
    disk_name: Callable[[str], str]
    mergers: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    @property
    def embedding(self) -> str:
        """The embedding's name on disk."""
        return self.outer[EMBEDDING].names[0]

    @property
    def output(self) -> str:
        """The output layer's name on disk, if it is not tied to the embedding."""
        return self.outer[OUTPUT].names[0]
