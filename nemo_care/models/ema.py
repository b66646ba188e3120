"""The exponential moving average of the policy's weights.

The released GRPO-CARE code averages bf16 weights in place: at a learning rate of 1e-6, a step of
(1 - decay) * (theta - phi) is below half a bf16 ulp and rounds away. Here the average is kept in
float32, sharded over the ranks exactly like the weights, and cast to the compute type after each
update. Every rank updates its own shard; nothing is gathered.

Parameters that are not trained have no average: the model can share their memory with the policy.

With `offload`, the average is in (pinned) CPU memory, and the model's parameters occupy memory of
the compute device only while they are in use.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from nemo_care.megatron import host_memory
from nemo_care.megatron.experts import is_distributed_expert


class WeightAverage:
    """Keeps `model`'s parameters equal to the moving average of another model's.

    After an update phi = decay * phi + (1 - decay) * theta (algorithm step 8, arXiv 2506.16141).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        decay: float,
        *,
        offload: bool = False,
        frozen: Collection[str] = (),
    ) -> None:
        """Start with `model` as the average; its parameters no longer require gradients.

        `offload` keeps the average in CPU memory; then use the model inside `in_place`. `frozen`
        names parameters that the policy does not train: they are left as they are.
        """
        self.model = model.requires_grad_(False).eval()
        self.decay = decay
        self.offload = offload
        # In place, a float32 parameter is its own state; those of other types get a float32 copy.
        state_of = _cpu_copy if offload else torch.Tensor.float
        self.state: dict[str, torch.Tensor] = {
            name: state_of(parameter.data)
            for name, parameter in model.named_parameters()
            if name not in frozen
        }
        if offload:
            self._release()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the model's parameters hold the average, on the compute device, inside."""
        if not self.offload:
            yield
            return
        try:
            for name, parameter in self._averaged():
                state = self.state[name].to(parameter.device, non_blocking=True)
                parameter.data = state.to(parameter.dtype)
            yield
        finally:
            self._release()

    def _averaged(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the model's parameters that have an average, with their names."""
        for name, parameter in self.model.named_parameters():
            if name in self.state:
                yield name, parameter

    def _release(self) -> None:
        """Free the parameters' memory; shape, type and device remain (one element each)."""
        for _, parameter in self._averaged():
            parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)

    @torch.no_grad()
    def update(self, policy: torch.nn.Module) -> torch.Tensor:
        """Move towards `policy`, whose parameters must have the same names and shapes.

        Returns:
            The `squared_distance` that is left: each parameter is on the compute device anyway.
        """
        theta = dict(policy.named_parameters())
        squares = self._no_squares()
        for name, parameter in self.model.named_parameters():
            target = theta[name].float()
            if name not in self.state:
                squares += _squares(theta[name], target, None)
                continue
            average = self.state[name]
            # Offloaded: one parameter at a time moves to the compute device for the arithmetic.
            moved = average.to(target.device, non_blocking=True)
            average.copy_(moved.mul_(self.decay).add_(target, alpha=1.0 - self.decay))
            squares += _squares(theta[name], target, moved)
            self._show(name, parameter)
        return squares

    def _show(self, name: str, parameter: torch.Tensor) -> None:
        """Set a parameter of the model to its average, unless `in_place` does that."""
        if not self.offload and self.state[name].data_ptr() != parameter.data_ptr():
            parameter.copy_(self.state[name])

    @torch.no_grad()
    def squared_distance(self, policy: torch.nn.Module) -> torch.Tensor:
        """Return this rank's share of (|theta - phi|^2, |theta|^2), float64 [2, 2].

        The first row is to be summed over a model replica, the second, of experts that are
        distributed, over the ranks that have those of one model. A parameter that several of these
        ranks have is counted on one of them, so that the sums do not depend on the layout.
        """
        squares = self._no_squares()
        for name, theta in policy.named_parameters():
            average = self.state[name].to(theta.device) if name in self.state else None
            squares += _squares(theta, theta.float(), average)
        return squares

    def _no_squares(self) -> torch.Tensor:
        device = next(self.model.parameters()).device
        return torch.zeros(2, 2, dtype=torch.float64, device=device)

    def sharded_state_dict(self, prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the float32 average as Megatron sharded tensors, laid out like the model's own.

        Frozen parameters are among them, in their own type: a whole model.
        """
        sharded = self.model.sharded_state_dict(prefix=prefix, metadata=metadata)  # type: ignore[operator]
        for key, entry in sharded.items():
            name = key.removeprefix(prefix)
            if name in self.state:
                entry.data = self.state[name]
                if isinstance(entry, ShardedTensor):
                    entry.dtype = torch.float32
        return sharded

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], prefix: str) -> None:
        """Load a float32 average that `sharded_state_dict` described.

        Frozen parameters are not set: whoever shares them loads them.
        """
        for name, parameter in self._averaged():
            self.state[name].copy_(state[prefix + name])
            self._show(name, parameter)


def _squares(
    parameter: torch.nn.Parameter, theta: torch.Tensor, phi: torch.Tensor | None
) -> torch.Tensor:
    """Return the sums of (theta - phi)^2 and theta^2 in their row of `squared_distance`, [2, 2].

    They are 0 for a parameter that is not counted on this rank. `theta` has the values of the
    policy's `parameter` as float32. A frozen parameter has no average `phi`, and no distance.
    """
    squares = torch.zeros(2, 2, dtype=torch.float64, device=theta.device)
    if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
        row = squares[int(is_distributed_expert(parameter))]
        if phi is not None:
            row[0] = (theta - phi).square_().sum(dtype=torch.float64)
        row[1] = theta.square().sum(dtype=torch.float64)
    return squares


def _cpu_copy(weight: torch.Tensor) -> torch.Tensor:
    """Return a float32 copy in CPU memory."""
    copy = host_memory.host_empty(weight.shape, torch.float32)
    copy.copy_(weight)
    return copy
