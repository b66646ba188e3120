"""The matrices of a layer's experts: one tensor on disk, distributed over ranks in Megatron.

On disk such a tensor is [experts, output, input], or [experts, input, output] in files that
transformers 4 has written (`HFTensors.input_first`). Each rank has whole experts, or its
expert-tensor-parallel part of each.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_care.errors import InputError
from nemo_care.models.architecture import Architecture
from nemo_care.models.family import Family
from nemo_care.models.hf_tensors import HFTensors
from nemo_care.models.weight_table import Source

# Experts that are computed one after another (local), or together (transformer_engine).
_EXPERT = (
    re.compile(r"(.*\.mlp\.experts\.)local_experts\.\d+\.(linear_fc[12]\.weight)"),
    re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12]\.weight)\d+"),
)


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, list[torch.nn.Parameter]]]:
    """Yield this rank's parameters; those of its experts together, under one name for each matrix.

    They are in order of the experts.
    """
    together: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found = next((match for form in _EXPERT if (match := form.fullmatch(name))), None)
        together.setdefault("".join(found.groups()) if found else name, []).append(parameter)
    yield from together.items()


def are_experts(name: str) -> bool:
    """Whether a name of `named_weights` is that of experts."""
    return ".mlp.experts." in name


def shape_on_disk(source: Source, model: Architecture) -> tuple[int, int, int]:
    """Return the shape [experts, output, input] of a tensor of experts."""
    assert model.experts is not None
    if source.cut == "gate_up":
        return model.experts.count, 2 * model.ffn_size, model.hidden_size
    return model.experts.count, model.hidden_size, model.ffn_size


def stores_output_first(folder: str | Path, family: Family) -> bool:
    """Whether a checkpoint folder of this family has experts, as [experts, output, input].

    Raises InputError as `HFTensors.input_first` does.
    """
    table = family.weights
    source = next((source for source in table.layer.values() if source.each), None)
    if source is None:
        return False
    reader = HFTensors(Path(folder), table, "model.hf_path")
    name = table.layer_prefix.format(0) + source.names[0]
    return not reader.input_first(name, shape_on_disk(source, family.architecture))


def read_experts(
    reader: HFTensors, source: Source, model: Architecture, parameters: list[torch.nn.Parameter]
) -> bool:
    """Fill this rank's experts, one after another; return whether input comes first on disk.

    Raises:
        InputError: the tensor has another shape.
    """
    (name,) = source.names
    input_first = reader.input_first(name, shape_on_disk(source, model))
    tensor = reader(name)
    first = parallel_state.get_expert_model_parallel_rank() * len(parameters)
    rank = parallel_state.get_expert_tensor_parallel_rank()
    size = parallel_state.get_expert_tensor_parallel_world_size()
    for number, parameter in enumerate(parameters, first):
        matrix = tensor[number]
        if input_first:
            matrix = matrix.T
        if source.cut == "gate_up":
            matrix = torch.cat([part.chunk(size)[rank] for part in matrix.chunk(2)])
        else:
            matrix = matrix.chunk(size, dim=1)[rank]
        if matrix.shape != parameter.shape:
            raise InputError(
                f"{reader.where}: {name} does not fit {size} expert-tensor-parallel ranks: "
                f"{tuple(matrix.shape)}, needed {tuple(parameter.shape)}"
            )
        parameter.copy_(matrix)
    return input_first


def join_experts(
    source: Source, parameters: list[torch.nn.Parameter], *, input_first: bool
) -> torch.Tensor:
    """Gather one tensor of all experts of a layer, as on disk; inverts `read_experts`.

    Collective over the ranks that have these experts.
    """
    matrices = dict(_whole_experts(source, parameters))
    ordered = [matrices[number] for number in sorted(matrices)]
    return torch.stack([matrix.T if input_first else matrix for matrix in ordered])


def each_expert(
    source: Source, parameters: list[torch.nn.Parameter]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices [output, input] of all experts of a layer, each under its own name.

    Collective over the ranks that have these experts; each rank holds one expert of every other
    rank at a time.
    """
    for number, matrix in _whole_experts(source, parameters):
        names = [name.format(number) for name in source.each]
        yield from zip(names, matrix.chunk(len(names)), strict=True)


def _whole_experts(
    source: Source, parameters: list[torch.nn.Parameter]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each expert's number and its matrix [output, input]; collective."""
    for place, parameter in enumerate(parameters):
        shards = _gathered(parameter.data, parallel_state.get_expert_tensor_parallel_group())
        if source.cut == "gate_up":
            halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
            mine = torch.cat([torch.cat(half) for half in halves])
        else:
            mine = torch.cat(shards, dim=1)
        of_ranks = _gathered(mine, parallel_state.get_expert_model_parallel_group())
        for rank, matrix in enumerate(of_ranks):
            yield rank * len(parameters) + place, matrix


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
