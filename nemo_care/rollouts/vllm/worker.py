"""Code inside vLLM's workers: loading and receiving weights, and digests of the parameters.

vLLM imports this module by the name of `WorkerExtension` before it loads the model and creates its
weight transfer engine, and so finds the loader and the engine that are registered here.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config.load import LoadConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from nemo_care.rollouts.vllm.messages import OUTPUT_FIRST
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


@register_model_loader(OUTPUT_FIRST)
class OutputFirstLoader(DefaultModelLoader):
    """Loads a checkpoint whose experts are [experts, output, input], as transformers 5 writes them.

    vLLM 0.32 reads all such tensors as [experts, input, output]: it fails, or computes with
    transposed matrices if they are square.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        """Load as vLLM's own loader does."""
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors as vLLM expects them."""
        for name, tensor in super().get_all_weights(*args, **kwargs):
            fused = ".experts." in name and tensor.dim() == 3
            yield name, tensor.transpose(1, 2) if fused else tensor


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
        self._kernels: list[tuple[Any, Any]] = []

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Do nothing: no preparation is necessary."""

    def start_weight_update(self) -> None:
        """Start vLLM's own reloading, layer by layer."""
        self._parameters = {name for name, _ in self.model.named_parameters()}
        self._loaded = set()
        self._trained_only = False
        self._kernels = _without_expert_kernels(self.model)
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
        for method, kernel in self._kernels:
            method.moe_kernel = method.moe_kernel or kernel
        if missing:
            raise ValueError(f"{len(missing)} parameters got no weights, the first is {missing[0]}")

    def shutdown(self) -> None:
        """Do nothing: there are no resources to free."""


def _without_expert_kernels(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Take the kernels from the layers with experts, and return the layers' methods and kernels.

    On CPUs the experts' matrices are padded and repacked when vLLM 0.32 makes the kernel, and only
    then: a layer that has one would keep the new matrices as they were sent.
    """
    found: list[tuple[Any, Any]] = []
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None:
            method.moe_kernel = None
            found.append((method, kernel))
    return found


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
