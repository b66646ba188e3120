"""Keep the optimizer's state on the GPU, or in CPU memory except during the optimizer's step.

Megatron's hybrid optimizer computes the step on the CPU, overlapped by CUDA streams. Here the step
still runs on the GPU: the state is copied there before it, after backward's activations are freed,
and back after it. Code that reads or writes the state elsewhere (checkpoints) finds it in CPU
memory.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import MegatronOptimizer

from nemo_care.megatron import host_memory
from nemo_care.megatron.optimizer import initialise_adamw_state, optimizer_parts

_MASTER = "master weight"
# A shard of a parameter, the role of the tensor, and the tensor.
Entry = tuple[torch.Tensor, str, torch.Tensor]


class OptimizerState:
    """Float32 master weights and AdamW's two averages of this rank's shard.

    With `offload` they are in CPU memory except within `in_place`; without it nothing is moved. The
    weights of a float32 model are their own masters and are not moved, nor are the counts of steps.
    """

    def __init__(self, optimizer: MegatronOptimizer, *, offload: bool) -> None:
        """Move the state to CPU memory at once if `offload` is set."""
        self.optimizer = optimizer
        self.offload = offload
        # A rank without trained parameters has a part without an optimizer.
        self._parts = [
            part
            for part in optimizer_parts(optimizer)
            if getattr(part, "optimizer", None) is not None
        ]
        # The device of the gradients: before anything is moved, the shards are on it too.
        shards = (
            shard
            for part in self._parts
            for group in part.optimizer.param_groups
            for shard in group["params"]
        )
        self._device = next((shard.device for shard in shards), None)
        # By shard and name: created when such a tensor is first moved, then reused.
        self._host: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        self.put_away()

    def initialise(self) -> None:
        """Create the state that a first step would (see `initialise_adamw_state`)."""
        initialise_adamw_state(self.optimizer)
        self.put_away()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Keep the state on the device of the gradients in this block."""
        if not self.offload:
            yield
            return
        try:
            self._fetch()
            yield
        finally:
            self.put_away()

    @torch.no_grad()
    def put_away(self) -> None:
        """Move state to CPU memory that is not there, such as after a first step or loading."""
        if not self.offload:
            return
        leaving = [entry for entry in self._entries() if not self._is_away(entry)]
        self._make_room(leaving)
        wait = any(tensor.is_cuda for _, _, tensor in leaving)
        for shard, name, tensor in leaving:
            host = self._host[shard][name]
            host.copy_(tensor, non_blocking=True)
            if name == _MASTER:
                # The gradient stays on the GPU, and is assigned to the shard before each step.
                shard.grad = None
            tensor.data = host
        if wait:
            # The CPU can read it next.
            torch.cuda.current_stream().synchronize()

    @torch.no_grad()
    def _fetch(self) -> None:
        for shard, name, tensor in filter(self._is_away, self._entries()):
            host = self._host[shard][name]
            fetched = torch.empty_like(host, device=self._device)
            fetched.copy_(host, non_blocking=True)
            tensor.data = fetched

    def _entries(self) -> Iterator[Entry]:
        for part in self._parts:
            for group in part.shard_fp32_from_float16_groups:
                for shard in group:
                    yield shard, _MASTER, shard
            for shard, state in part.optimizer.state.items():
                for name, tensor in state.items():
                    # torch's AdamW counts its steps in a scalar, which is on the CPU already.
                    if isinstance(tensor, torch.Tensor) and tensor.dim():
                        yield shard, name, tensor

    def _is_away(self, entry: Entry) -> bool:
        shard, name, tensor = entry
        host = self._host[shard].get(name)
        # A tensor without memory, as in a plan, has no address to compare.
        return host is not None and tensor.untyped_storage()._cdata == host.untyped_storage()._cdata

    def _make_room(self, leaving: list[Entry]) -> None:
        """Allocate missing CPU memory: one piece for all, since pinning takes whole pages."""
        homeless = [entry for entry in leaving if entry[1] not in self._host[entry[0]]]
        for dtype in {tensor.dtype for _, _, tensor in homeless}:
            entries = [entry for entry in homeless if entry[2].dtype == dtype]
            sizes = [tensor.numel() for _, _, tensor in entries]
            pieces = host_memory.host_empty([sum(sizes)], dtype).split(sizes)
            for (shard, name, tensor), piece in zip(entries, pieces, strict=True):
                self._host[shard][name] = piece.view(tensor.shape)
