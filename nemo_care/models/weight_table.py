"""Which Hugging Face tensors a Megatron parameter is made of: a family's part of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Source:
    """The Hugging Face tensors of one Megatron parameter, and how tensor parallelism cuts it.

    `cut`: whole, columns, gate_up, qkv or vocabulary (see `weights.py`).
    """

    names: tuple[str, ...]
    cut: str


@dataclass(frozen=True)
class WeightTable:
    """Megatron's names of a family's parameters -> names on disk in its published checkpoints.

    Attributes:
        layer: by the name within a layer; its names on disk are those in a layer, too.
        layer_prefix: what comes before them on disk, with `{}` for the layer's number.
        outer: by the name outside of the layers; `EMBEDDING` and `OUTPUT` are among them.
        vision_prefix: what the vision tower's parameters have before their names on disk.
        disk_name: a tensor's name in the published checkpoints, from what transformers' modules or
            the files of some of its releases call it.
        recomputed: endings of tensors that old files hold and every model computes anew.
    """

    layer: Mapping[str, Source]
    layer_prefix: str
    outer: Mapping[str, Source]
    vision_prefix: str
    disk_name: Callable[[str], str]
    recomputed: tuple[str, ...] = ()

    @property
    def embedding(self) -> str:
        """The embedding's name on disk."""
        return self.outer[EMBEDDING].names[0]

    @property
    def output(self) -> str:
        """The output layer's name on disk, where it is not tied to the embedding."""
        return self.outer[OUTPUT].names[0]
