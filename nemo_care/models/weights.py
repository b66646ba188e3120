"""Transfer weights between a Hugging Face directory and Megatron's shards, by the family's table.

Reading needs no communication: each rank opens the safetensors files and reads its own slices.
Writing streams one parameter at a time: its tensor-parallel shards are gathered, converted back to
Hugging Face tensors and written by the first rank of the pipeline stage.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_care.data.checkpoint_files import read_checkpoint_json
from nemo_care.errors import InputError
from nemo_care.files.tensors import save_tensors
from nemo_care.models.expert_weights import (
    are_experts,
    each_expert,
    join_experts,
    named_weights,
    read_experts,
    shape_on_disk,
)
from nemo_care.models.hf_tensors import INDEX, HFTensors
from nemo_care.models.video_language_model import VideoLanguageModel, padded_vocabulary
from nemo_care.models.weight_table import OUTPUT, Source
from nemo_care.process.os_errors import naming

_PART_BYTES = 5 * 10**9
# Files copied with the weights: configuration, tokenizer, processors; no other files are.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
)


def _source(model: VideoLanguageModel, name: str) -> Source:
    """Return the tensors on disk that make up this parameter, and how it is cut."""
    table = model.family.weights
    if name.startswith("visual."):
        return Source((table.vision_prefix + name.removeprefix("visual."),), "whole")
    inner = name.removeprefix("language_model.")
    if inner in table.outer:
        source = table.outer[inner]
        if inner == OUTPUT and model.share_embeddings_and_output_weights:
            source = replace(source, names=(table.embedding,))
        return source
    # decoder.layers.<index within this stage>.<rest>
    _, _, index, rest = inner.split(".", 3)
    layer = int(index) + get_transformer_layer_offset(model.config)
    source = table.layer[rest]
    prefix = table.layer_prefix.format(layer)
    return replace(
        source,
        names=tuple(prefix + name for name in source.names),
        each=tuple(prefix + name for name in source.each),
    )


# ------------------------------------------------------------------ reading


def _part(tensor: Any, dim: int, rank: int, size: int) -> torch.Tensor:
    """Read this rank's equal part of a safetensors slice along `dim`, without the rest."""
    length = tensor.get_shape()[dim] // size
    span = slice(rank * length, (rank + 1) * length)
    return tensor[span] if dim == 0 else tensor[:, span]


def _read_shard(
    reader: HFTensors, source: Source, model: VideoLanguageModel, rank: int, size: int
) -> torch.Tensor:
    tensors = [reader(name) for name in source.names]
    if source.cut == "whole":
        return tensors[0][:]
    if source.cut == "columns":
        return _part(tensors[0], 1, rank, size)
    if source.cut == "gate_up":
        return torch.cat([_part(tensor, 0, rank, size) for tensor in tensors])
    if source.cut == "qkv":
        # Megatron stores, per key-value group, its queries, then its key, then its value.
        groups = model.config.num_query_groups // size
        parts = [_part(tensor, 0, rank, size) for tensor in tensors]
        grouped = [part.view(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    found = tensors[0].get_shape()[0]
    if found != model.vocab_size:
        raise InputError(
            f"{reader.where}: {source.names[0]} has {found} rows, but config.json has "
            f"vocab_size {model.vocab_size}"
        )
    rows = padded_vocabulary(model.vocab_size) // size
    start, stop = rank * rows, min((rank + 1) * rows, model.vocab_size)
    shard = torch.zeros(rows, tensors[0].get_shape()[1])
    if start < stop:
        shard[: stop - start] = tensors[0][start:stop]
    return shard


@torch.no_grad()
def load_hf_weights(
    model: VideoLanguageModel, folder: str | Path, *, key: str = "model.hf_path"
) -> None:
    """Fill this rank's parameters from a Hugging Face directory; no communication.

    `key` is the recipe key that names it.

    Raises:
        InputError: a file or a tensor is missing, unreadable or has a different shape.
    """
    reader = HFTensors(Path(folder), model.family.weights, key)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameters in named_weights(model):
        source = _source(model, name)
        if are_experts(name):
            if read_experts(reader, source, model.family.architecture, parameters):
                model.stored_input_first.add(source.names[0])
            continue
        (parameter,) = parameters
        shard = _read_shard(reader, source, model, rank, size)
        if shard.shape != parameter.shape:
            raise InputError(
                f"{reader.where}: {source.names[0]} has a different shape than in "
                f"config.json (needed {tuple(parameter.shape)}, got {tuple(shard.shape)})"
            )
        parameter.copy_(shard)


# ------------------------------------------------------------------ writing


def _join(
    source: Source, shards: list[torch.Tensor], model: VideoLanguageModel
) -> list[torch.Tensor]:
    """Invert `_read_shard` over all tensor-parallel ranks."""
    if source.cut == "whole":
        return [shards[0]]
    if source.cut == "columns":
        return [torch.cat(shards, dim=1)]
    if source.cut == "gate_up":
        return [torch.cat(parts) for parts in zip(*(s.chunk(2) for s in shards), strict=True)]
    whole = torch.cat(shards)
    if source.cut == "qkv":
        head_dim = model.config.kv_channels
        whole = whole.view(model.config.num_query_groups, -1, *whole.shape[1:])
        queries = whole.shape[1] - 2 * head_dim
        return [t.flatten(0, 1) for t in whole.split([queries, head_dim, head_dim], dim=1)]
    return [whole[: model.vocab_size]]


@torch.no_grad()
def iterate_hf_weights(
    model: VideoLanguageModel, *, trained_only: bool = False, fused_experts: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this pipeline stage's weights under Hugging Face's names, one parameter at a time.

    All tensor-parallel ranks must iterate together, and those that share experts. Tied output
    weights are not repeated. `trained_only` leaves out the frozen parts. Without `fused_experts`,
    each expert has its own matrices, as in `Source.each`.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameters in named_weights(model):
        if trained_only and model.is_frozen(name):
            continue
        if name.endswith("output_layer.weight") and model.share_embeddings_and_output_weights:
            continue
        source = _source(model, name)
        if are_experts(name):
            if fused_experts:
                input_first = source.names[0] in model.stored_input_first
                yield source.names[0], join_experts(source, parameters, input_first=input_first)
            else:
                yield from each_expert(source, parameters)
            continue
        (parameter,) = parameters
        shards = [parameter.data]
        if source.cut != "whole" and group.size() > 1:
            shards = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(shards, parameter.data.contiguous(), group=group)
        yield from zip(source.names, _join(source, shards, model), strict=True)


def _store_as_in(folder: Path, model: VideoLanguageModel) -> None:
    """From now on the experts' matrices are yielded with input and output in this folder's order,
    if it has weights."""
    if not model.family.weights.experts or not any(folder.glob("*.safetensors")):
        return
    reader = HFTensors(folder, model.family.weights, "model.hf_path")
    sources = [_source(model, name) for name, _ in named_weights(model) if are_experts(name)]
    model.stored_input_first = {
        source.names[0]
        for source in sources
        if reader.input_first(source.names[0], shape_on_disk(source, model.family.architecture))
    }


def _write_parts(
    model: VideoLanguageModel, out: Path, stage: int, writes: bool
) -> list[dict[str, Any]]:
    """Write this stage's tensors in files of limited size; return the contents of each file."""
    parts: list[dict[str, Any]] = []
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        if pending:
            file = f"stage-{stage:03d}-part-{len(parts):03d}.safetensors"
            with naming(out / file):
                save_tensors(out / file, pending, metadata={"format": "pt"})
            parts.append({"file": file, "names": list(pending), "bytes": size})
            pending.clear()
            size = 0

    for name, tensor in iterate_hf_weights(model):
        if not writes:
            continue
        pending[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.numel() * tensor.element_size()
        if size >= _PART_BYTES:
            flush()
    flush()
    return parts


def _name_parts(out: Path, parts: list[dict[str, Any]]) -> None:
    """Rename the files to Hugging Face's names and write the index."""
    if len(parts) == 1:
        (out / parts[0]["file"]).rename(out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (out / part["file"]).rename(out / file)
        weight_map.update(dict.fromkeys(part["names"], file))
    index = {
        "metadata": {"total_size": sum(part["bytes"] for part in parts)},
        "weight_map": weight_map,
    }
    (out / INDEX).write_text(json.dumps(index, indent=2))


def _copy_companions(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy tokenizer, processor and configuration files, with the written dtype in the latter."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)
    config = read_checkpoint_json(out / "config.json")
    name = str(dtype).removeprefix("torch.")
    for block in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(block, dict) and key in block:
                block[key] = name
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export_hf(
    model: VideoLanguageModel, source: str | Path, out: str | Path, *, replace: bool = False
) -> None:
    """Write the model as a Hugging Face directory that `from_pretrained` and vLLM load.

    All ranks call it. `source` is the checkpoint directory that the run started from, whose
    tokenizer and configuration files are copied. The directory gets its name only when it is
    complete; with `replace`, an existing one is removed then, and not before.

    Raises:
        InputError: `out` already exists, without `replace`, or `source` no longer exists.
    """
    target = Path(out)
    if target.exists() and not replace:
        raise InputError(f"{target} exists already: remove it or choose another directory")
    if not (Path(source) / "config.json").is_file():
        raise InputError(
            f"{source}: no config.json left to export with the weights; they are in the "
            "run's checkpoints: nemo-care export RUN OUT --base DIR, with the folder's new place"
        )
    _store_as_in(Path(source), model)
    partial = target.with_name(target.name + ".partial")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    writes = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parts = _write_parts(model, partial, stage, writes)
    everyone: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, parts)
    if rank == 0:
        with naming(target):
            _name_parts(partial, [part for rank_parts in everyone for part in rank_parts])
            _copy_companions(Path(source), partial, next(model.parameters()).dtype)
            _take_place(partial, target)
    dist.barrier()


def _take_place(partial: Path, target: Path) -> None:
    """Rename a complete directory to its final name, and then remove an existing one, if any."""
    if target.exists():
        target.rename(target.with_name(f"{target.name}.removed-{secrets.token_hex(4)}"))
    partial.rename(target)
    for old in target.parent.glob(f"{target.name}.removed-*"):
        shutil.rmtree(old, ignore_errors=True)
