"""The tensors of a Hugging Face checkpoint folder: which file has which, and whether they fit."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_care.data.checkpoint_files import read_checkpoint_json
from nemo_care.errors import InputError
from nemo_care.models.families import read_family
from nemo_care.models.family import Family
from nemo_care.models.weight_table import WeightTable
from nemo_care.process.screen import say

INDEX = "model.safetensors.index.json"
# Types of weights; other types are quantised, or not weights.
_FLOATS = {"F64", "F32", "F16", "BF16"}
_ROWS_AT_ONCE = 8192


class HFTensors:
    """Opens the safetensors files of a folder and finds each tensor's file.

    The index decides which files are read and which tensors are taken from them; without an index,
    all files are read, and no two may have the same tensor.
    """

    def __init__(self, folder: Path, table: WeightTable, key: str) -> None:
        """`table` is the family's, `key` the recipe key that names the folder.

        Raises InputError as in `check_weights`.
        """
        self.where = f"{key}={folder}"
        # What the folder contains but the index excludes, in words.
        self.ignored: list[str] = []
        self._folder = folder
        self._disk_name = table.disk_name
        self._handle: dict[str, Any] = {}
        self._key: dict[str, str] = {}
        files = sorted(folder.glob("*.safetensors"))
        if (folder / INDEX).is_file():
            self._open_indexed(files)
        elif files:
            for file in files:
                handle = _opened(file)
                for key_ in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    self._add(key_, handle, file.name)
        else:
            raise InputError(f"{self.where}: no *.safetensors file there")

    def _open_indexed(self, files: list[Path]) -> None:
        index = self._folder / INDEX
        weight_map = read_checkpoint_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: has no weight_map; copy it from the checkpoint again")
        handles: dict[str, Any] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise InputError(f"{index}: {name} is listed in {shard!r}, not a file name")
            if shard not in handles:
                if not (self._folder / shard).is_file():
                    raise InputError(
                        f"{self.where}: {shard} is missing, which {INDEX} names; copy it from the "
                        "checkpoint"
                    )
                handles[shard] = _opened(self._folder / shard)
        held = {shard: set(handle.keys()) for shard, handle in handles.items()}
        for name, shard in weight_map.items():
            if name not in held[shard]:
                raise InputError(
                    f"{self.where}: {INDEX} lists {name} in {shard}, which does not have "
                    "it; copy both from the checkpoint again"
                )
            self._add(name, handles[shard], shard)
        self.ignored += [file.name for file in files if file.name not in handles]
        for shard, names in held.items():
            unnamed = sorted(name for name in names if weight_map.get(name) != shard)
            if unnamed:
                more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
                self.ignored.append(f"{unnamed[0]}{more} in {shard}")

    def _add(self, key: str, handle: Any, file: str) -> None:
        name = self._disk_name(key)
        if name in self._handle:
            raise InputError(
                f"{self.where}: {file} has tensor {name}, which another file or name has too; "
                "remove files that do not belong to the checkpoint"
            )
        self._handle[name], self._key[name] = handle, key

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor with that name."""
        return name in self._handle

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._handle)

    def __call__(self, name: str) -> Any:
        """Return a tensor as a slice, of which parts can be read.

        Raises:
            InputError: there is none with that name, or it is quantised.
        """
        if name not in self._handle:
            raise InputError(f"{self.where}: tensor {name} is missing")
        tensor = self._handle[name].get_slice(self._key[name])
        if tensor.get_dtype() not in _FLOATS:
            raise InputError(
                f"{self.where}: tensor {name} holds {tensor.get_dtype()}; quantised weights can't "
                "be trained: use the checkpoint that they were made from"
            )
        return tensor

    def input_first(self, name: str, wanted: tuple[int, ...]) -> bool:
        """Whether a tensor of experts, [experts, output, input] in transformers, is stored as
        [experts, input, output], as transformers 4 did.

        The shape decides; if both fit, the version of transformers in config.json does, which is
        reported once.

        Raises:
            InputError: there is none with that name, or neither shape is that of `wanted`.
        """
        found, swapped = tuple(self(name).get_shape()), (wanted[0], *wanted[:0:-1])
        if found not in (wanted, swapped):
            raise InputError(
                f"{self.where}: tensor {name} is {_shape(found)}, but config.json requires "
                f"{_shape(wanted)} or {_shape(swapped)}; use files of the same checkpoint"
            )
        if wanted != swapped:
            return found == swapped
        version = read_checkpoint_json(self._folder / "config.json").get("transformers_version")
        old = isinstance(version, str) and version.startswith("4.")
        order = "input, output" if old else "output, input"
        _say_once(
            f"{self.where}: the experts' matrices are square: read as [experts, {order}], as "
            f"transformers {version or 5} stores them (transformers_version in config.json)"
        )
        return old


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: not a readable safetensors file ({error}); download it again"
        ) from error


def check_weights(folder: str | Path, *, key: str = "model.hf_path") -> None:
    """Refuse tensors that don't fit the model; print once on stderr what is not read.

    `key` is the recipe key that names the folder.

    Raises:
        InputError: a file is missing, unreadable or contradicts the index; a tensor is missing,
            duplicated, shaped differently than in config.json, not of floating point, or not part
            of the model; config.json can't be used (see `read_family`).
    """
    family = read_family(folder, key=key)
    tensors = HFTensors(Path(folder), family.weights, key)
    if tensors.ignored:
        _say_once(
            f"{tensors.where}: not read, because {INDEX} does not name it: "
            f"{'; '.join(tensors.ignored)}"
        )
    shapes, tied = family.tensor_shapes(), family.architecture.tied
    embedding, output = family.weights.embedding, family.weights.output
    for name in tensors:
        if name.endswith(family.weights.recomputed):
            continue
        if name not in shapes:
            raise InputError(
                f"{tensors.where}: tensor {name} is not part of a {family.name} (scales of "
                "quantised weights, an adapter, or another architecture); use a checkpoint with "
                "the model's own weights only"
            )
        found, wanted = tuple(tensors(name).get_shape()), shapes[name]
        if family.weights.experts and name.endswith(family.weights.experts):
            tensors.input_first(name, wanted)
        elif found != wanted:
            rows = (
                f" (vocab_size is {wanted[0]}, the tensor has {found[0]} rows)"
                if name in (embedding, output) and found[:1] != wanted[:1]
                else ""
            )
            raise InputError(
                f"{tensors.where}: tensor {name} is {_shape(found)}, but config.json requires "
                f"{_shape(wanted)}{rows}; use files of the same checkpoint"
            )
    for name in shapes:
        if name not in tensors and not (name == output and tied):
            raise InputError(f"{tensors.where}: tensor {name} is missing")
    if tied and output in tensors:
        _check_tied(tensors, family, shapes[output][0])


def _check_tied(tensors: HFTensors, family: Family, rows: int) -> None:
    """Refuse a separate output layer if config.json ties it to the embedding."""
    names = family.weights.embedding, family.weights.output
    embedding, output = map(tensors, names)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        if not torch.equal(embedding[part], output[part]):
            raise InputError(
                f"{tensors.where}: config.json says tie_word_embeddings, but {names[1]} "
                f"differs from {names[0]}; set tie_word_embeddings to false, or remove {names[1]}"
            )


@cache
def _say_once(line: str) -> None:
    say(line, file=sys.stderr)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
