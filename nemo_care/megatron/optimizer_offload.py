"""Where the optimizer's state lies: on the GPU, or in CPU memory but for the optimizer's own step.

Megatron's hybrid optimizer steps on the CPU, and overlaps that with CUDA streams. Here the step is
the same as ever, on the GPU: the state comes before it, when backward's activations are gone, and
goes after it. What reads or writes the state elsewhere (checkpoints) finds it in CPU memory.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import MegatronOptimizer

from nemo_care.megatron import host_memory
from nemo_care.megatron.optimizer import initialise_adamw_state, optimizer_parts

_MASTER = "master weight"
# A shard of a parameter, what it is to it, and the tensor.
Entry = tuple[torch.Tensor, str, torch.Tensor]


class OptimizerState:
    """Float32 master weights and AdamW's two averages of this rank's shard.

    With `offload` they are in CPU memory except within `in_place`; without, nothing is moved. A
    float32 model's weights are their own masters and stay where they are, and so does a parameter's
    count of steps.
    """

    def __init__(self, optimizer: MegatronOptimizer, *, offload: bool) -> None:
        """With `offload` the state goes to CPU memory at once."""
        self.optimizer = optimizer
        self.offload = offload
        # A rank without trained parameters has a part without an optimizer.
        self._parts = [
            part
            for part in optimizer_parts(optimizer)
            if getattr(part, "optimizer", None) is not None
        ]
        # Where gradients are: before anything has gone, the shards are there too.
        shards = (
            shard
            for part in self._parts
            for group in part.optimizer.param_groups
            for shard in group["params"]
        )
        self._device = next((shard.device for shard in shards), None)
        # By shard and name: made when such a tensor first goes, and used again from then on.
        self._host: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        self.put_away()

    def initialise(self) -> None:
        """Create the state that a first step would (see `initialise_adamw_state`)."""
        initialise_adamw_state(self.optimizer)
        self.put_away()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The state is where the gradients are."""
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
        """Move to CPU memory what is not there, such as what a first step or loading has made."""
        if not self.offload:
            return
        leaving = [entry for entry in self._entries() if not self._is_away(entry)]
        self._make_room(leaving)
        wait = any(tensor.is_cuda for _, _, tensor in leaving)
        for shard, name, tensor in leaving:
            host = self._host[shard][name]
            host.copy_(tensor, non_blocking=True)
            if name == _MASTER:
                # The gradient stays on the GPU, and is handed to the shard anew before each step.
                shard.grad = None
            tensor.data = host
        if wait:
            # The CPU may read it next.
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
                    # torch's AdamW counts its steps in a scalar, which it keeps on the CPU itself.
                    if isinstance(tensor, torch.Tensor) and tensor.dim():
                        yield shard, name, tensor

    def _is_away(self, entry: Entry) -> bool:
        shard, name, tensor = entry
        host = self._host[shard].get(name)
        # A tensor without memory, as in a plan, has no address to compare.
        return host is not None and tensor.untyped_storage()._cdata == host.untyped_storage()._cdata

    def _make_room(self, leaving: list[Entry]) -> None:
        """CPU memory for what has none: one piece for all, since pinning takes whole pages."""
        homeless = [entry for entry in leaving if entry[1] not in self._host[entry[0]]]
        for dtype in {tensor.dtype for _, _, tensor in homeless}:
            entries = [entry for entry in homeless if entry[2].dtype == dtype]
            sizes = [tensor.numel() for _, _, tensor in entries]
            pieces = host_memory.host_empty([sum(sizes)], dtype).split(sizes)
            for (shard, name, tensor), piece in zip(entries, pieces, strict=True):
                self._host[shard][name] = piece.view(tensor.shape)
