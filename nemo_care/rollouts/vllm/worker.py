"""Code inside vLLM's workers: weights from shared memory, and digests of the parameters.

vLLM imports this module by the name of `WorkerExtension` before it creates its weight transfer
engine, and so finds the engine that is registered here.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from nemo_care.rollouts.vllm.shared_memory import BACKEND


class WorkerExtension:
    """Methods that vLLM adds to each worker, for `collective_rpc`."""

    def nemo_care_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each parameter of this worker, by vLLM's name of it.

        Parameters without bytes are omitted: on CPUs, vLLM repacks the weights of linear layers
        into other objects, and keeps an empty parameter.
        """
        empty = {
            name
            for name, parameter in self.model_runner.get_model().named_parameters()  # type: ignore[attr-defined]
            if parameter.numel() == 0
        }
        digests = self.compute_weight_checksums()  # type: ignore[attr-defined]
        return {
            name: digest for name, digest in digests.items() if name.rpartition(":")[2] not in empty
        }


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """No data: nothing has to be agreed on."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """A file with the bytes of some tensors, one after another, and their CRC-32.

    `trained_only`: the update leaves out parameters that an earlier one has set for good.
    """

    path: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    checksum: int
    trained_only: bool = False


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Receives weights from files in shared memory, for machines without a GPU."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take vLLM's arguments."""
        super().__init__(*args, **kwargs)
        self._loaded: set[str] = set()
        self._parameters: set[str] = set()
        # What an update of trained parameters only has left out.
        self._frozen: set[str] | None = None
        self._trained_only = False

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Do nothing: no preparation is necessary."""

    def start_weight_update(self) -> None:
        """Start vLLM's own reloading, layer by layer."""
        self._parameters = {name for name, _ in self.model.named_parameters()}
        self._loaded = set()
        self._trained_only = False
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Do as vLLM does, without waiting for a GPU."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load one file's tensors.

        Raises:
            ValueError: the bytes differ from those that were sent.
        """
        content = Path(update_info.path).read_bytes()
        if zlib.crc32(content) != update_info.checksum:
            raise ValueError(f"{update_info.path}: the bytes that arrived differ from those sent")
        # vLLM keeps tensors until their layer is complete, so they need their own memory.
        self._trained_only |= update_info.trained_only
        buffer = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        weights, begin = [], 0
        for name, dtype, shape in zip(
            update_info.names, update_info.dtypes, update_info.shapes, strict=True
        ):
            kind = getattr(torch, dtype)
            end = begin + torch.Size(shape).numel() * kind.itemsize
            weights.append((name, buffer[begin:end].view(kind).view(shape)))
            begin = end
        self._loaded |= set(self.model.load_weights(weights) or ())

    def finish_weight_update(self) -> None:
        """Finish vLLM's reloading.

        Raises:
            ValueError: a parameter got no weights; it would silently keep its old ones.
        """
        missing = sorted(self._parameters - self._loaded)
        if self._trained_only:
            # vLLM leaves a layer without new weights as it was; it must be the same ones each time.
            self._frozen = set(missing) if self._frozen is None else self._frozen
            missing = sorted(set(missing) - self._frozen)
        finalize_layerwise_reload(self.model, self.model_config)
        if missing:
            raise ValueError(f"{len(missing)} parameters got no weights, the first is {missing[0]}")

    def shutdown(self) -> None:
        """Do nothing: there are no resources to free."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
