"""Write a checkpoint during training: a thread of each rank writes a copy of the state.

Megatron plans which rank writes what. Its own writers are processes: forked ones, which hang if the
forked process has threads, and a started one that imports the program again. A thread needs
neither. The layout on the disk is Megatron's, with a file for each rank and part of the state.
"""

import io
import secrets
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat, WriteResult, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from nemo_care import __version__
from nemo_care.checkpoints.manifest import (
    FileRecord,
    HashedFile,
    read_record,
    write_file,
    write_manifest,
)
from nemo_care.checkpoints.store import (
    CONTENT_METADATA,
    checkpoint_path,
    discard,
    list_checkpoints,
    remove_old,
)
from nemo_care.errors import CheckpointError
from nemo_care.files.json_lines import sync_folder
from nemo_care.ranks.process_groups import Ranks

# Megatron gathers the optimizer's state in separate memory for each checkpoint
# (DistributedOptimizer.get_parameter_state_dp_zero). It does not change, so it needs no copy.
_GATHERED = "optimizer.state."
_REMEDY = "make room or repair the folder, then repeat the command: it resumes from the newest"

Data = torch.Tensor | io.BytesIO


class _StateWriter(FileSystemWriterAsync):
    """Megatron's storage writer, which keeps a copy of the state for the thread."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.parts: dict[str, list[tuple[WriteItem, Data]]] = {}
        self.prefix = ""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copy this rank's share of the state to the CPU, by part."""
        parts = defaultdict(list)
        for item in plan.items:
            name = item.index.fqn
            data = planner.resolve_data(item)
            if isinstance(data, torch.Tensor):
                data = _copied(data.detach(), is_own=name.startswith(_GATHERED))
            parts[name.partition(".")[0]].append((item, data))
        self.parts = dict(sorted(parts.items()))
        self.prefix = plan.storage_data.prefix

    def write(self) -> tuple[list[WriteResult], dict[str, FileRecord]]:
        """Write the copy, and free each part as soon as it is written."""
        results, records = [], {}
        for number, part in enumerate(list(self.parts)):
            name = f"{self.prefix}{number}.distcp"
            with HashedFile(self.folder / name, part) as file:
                for item, data in self.parts.pop(part):
                    results.append(
                        _write_item(
                            self.transforms,
                            file,
                            _whole_storage(data),
                            item,
                            name,
                            SerializationFormat.TORCH_SAVE,
                        )
                    )
            records[name] = file.record()
        return results, records


def _copied(tensor: torch.Tensor, *, is_own: bool) -> torch.Tensor:
    if tensor.device.type != "cpu":
        # Not asynchronously, which needs pinned memory: torch's allocator rounds each tensor up to
        # a power of two and never returns it, and the copy of the state has every size.
        return tensor.cpu()
    return tensor if is_own else tensor.clone()


def _whole_storage(data: Data) -> Data:
    """Copy a slice, since torch.save writes the whole storage of a tensor."""
    if not isinstance(data, torch.Tensor) or data.untyped_storage().nbytes() == data.nbytes:
        return data
    return data.clone()


class PendingCheckpoint:
    """A checkpoint being written: the state at the time of its creation."""

    def __init__(self, folder: Path, step: int, state: dict[str, Any], *, recipe: str) -> None:
        """Copy the sharded `state` and start writing it; collective over all ranks.

        Args:
            folder: the run's folder of checkpoints.
            step: number of optimizer steps of the state.
            state: can be changed after the call.
            recipe: the resolved recipe as YAML.

        Raises:
            CheckpointError: the folder can't be written to.
        """
        self.step = step
        self.folder = folder
        self._writer = _StateWriter(Ranks.from_rank_zero(self._make_partial))
        self._metadata, common = _plan(state, self._writer)
        self._small: dict[str, bytes] = {}
        if dist.get_rank() == 0:
            serialised = io.BytesIO()
            torch.save(common, serialised)
            self._small = {"common.pt": serialised.getvalue(), "recipe.yaml": recipe.encode()}
        self._results: list[WriteResult] = []
        self._records: dict[str, FileRecord] = {}
        self._error: Exception | None = None
        # A dying rank does not wait for its disk; an incomplete checkpoint is never used.
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def _partial(self) -> Path:
        return self._writer.folder

    def _make_partial(self) -> Path:
        # A unique name: a writer of a killed run can still be at work.
        target = checkpoint_path(self.folder, self.step)
        partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise self._failed(str(error)) from error
        return partial

    def _write(self) -> None:
        try:
            self._results, self._records = self._writer.write()
            for name, content in self._small.items():
                self._records[name] = write_file(self._partial / name, content)
        except Exception as error:
            self._error = error
            self._writer.parts.clear()

    def is_written(self) -> bool:
        """Whether all ranks have written their files; collective over all ranks."""
        written = torch.tensor(int(not self._thread.is_alive()))
        dist.all_reduce(written, op=dist.ReduceOp.MIN)
        return bool(written)

    def finish(self, *, keep_last: int, keep_every: int) -> Path:
        """Wait for all ranks, complete the checkpoint, and remove older ones; collective.

        Returns:
            Path of the checkpoint.

        Raises:
            CheckpointError: a rank could not write; nothing of this checkpoint remains.
        """
        self._thread.join()
        error = None if self._error is None else f"{self._error} (rank {dist.get_rank()})"
        everyone = Ranks.gather_on_rank_zero((error, self._results, self._records))
        try:
            return Ranks.from_rank_zero(lambda: self._complete(everyone, keep_last, keep_every))
        except CheckpointError as failure:
            raise failure from self._error

    def _complete(self, everyone: list[Any], keep_last: int, keep_every: int) -> Path:
        """Write index and manifest on rank 0, rename the checkpoint, and remove older ones."""
        target = checkpoint_path(self.folder, self.step)
        try:
            errors = [error for error, _, _ in everyone if error is not None]
            if errors:
                raise OSError(errors[0])
            records = {name: r for _, _, files in everyone for name, r in files.items()}
            assert self._metadata is not None  # rank 0 made the plan of all
            self._writer.finish(self._metadata, [results for _, results, _ in everyone])
            save_config(CheckpointingConfig("torch_dist"), str(self._partial))
            for name in (".metadata", "metadata.json"):
                records[name] = read_record(self._partial / name)
            write_manifest(self._partial, records, _about(self.step))
            # A run that resumed from an older checkpoint can write this step again.
            if target.exists():
                discard(target)
            self._partial.rename(target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise self._failed(str(error)) from error
        try:
            remove_old(self.folder, keep_last=keep_last, keep_every=keep_every)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {self.step} is complete, but an older one could not be "
                f"removed: {error}; repair the folder and repeat the command"
            ) from error
        return target

    def _failed(self, reason: str) -> CheckpointError:
        intact = ", ".join(path.name for path in list_checkpoints(self.folder)) or "none"
        return CheckpointError(
            f"the checkpoint of step {self.step} could not be written to {self.folder}: {reason}; "
            f"complete older ones there: {intact}; {_REMEDY}"
        )


def _plan(state: dict[str, Any], writer: _StateWriter) -> tuple[Metadata | None, dict[str, Any]]:
    """Let Megatron plan the writing; return the index (rank 0) and rank 0's unsharded state."""
    state = {**state, "content_metadata": dict(CONTENT_METADATA)}
    sharded, common = save_preprocess(state)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    (_, metadata, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key),
        writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    if metadata is not None:
        # Half of the index: all ranks' plans, which only a later save could use.
        del metadata.all_local_plans
    return metadata, common


def _about(step: int) -> dict[str, Any]:
    return {
        "format": 1,
        "nemo_care": __version__,
        "step": step,
        "ranks": dist.get_world_size(),
        "layout": {
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "data": parallel_state.get_data_parallel_world_size(),
            "expert": parallel_state.get_expert_model_parallel_world_size(),
        },
        "recipe": "recipe.yaml",
    }
