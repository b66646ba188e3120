"""A model of two parameters with the project's optimizer and checkpoints, to test its state."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nemo_care.checkpoints.store import sharding_metadata
from nemo_care.megatron.optimizer import build_optimizer, optimizer_parts, wrap_data_parallel
from nemo_care.megatron.optimizer_offload import OptimizerState
from nemo_care.recipe.model import OptimizerConfig


@contextmanager
def optimizer_of_megatron(fused: type | None) -> Iterator[None]:
    """Make Megatron find this fused AdamW (None: none, so it uses torch's), however imported."""
    with pytest.MonkeyPatch.context() as patch:
        for module, own in (
            (megatron_optimizer, torch.optim.AdamW),
            (distrib_optimizer, torch.optim.Adam),
        ):
            patch.setattr(module, "Adam", fused or own)
        patch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", fused is None)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", fused is not None)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", fused is not None)
        yield


class TwoParameters(MegatronModule):
    def __init__(self) -> None:
        super().__init__(
            TransformerConfig(
                num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True,
                params_dtype=torch.bfloat16,
            )
        )  # fmt: skip
        drawn = torch.randn(17, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.matrix, self.vector = map(torch.nn.Parameter, (drawn[:16].clone(), drawn[16].clone()))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


class Trained:
    """The model and its optimizer; `fused` is the AdamW that Megatron finds."""

    def __init__(self, fused: type | None, *, offload: bool = False) -> None:
        self.fused = fused
        with optimizer_of_megatron(fused):
            self.wrapped = wrap_data_parallel(TwoParameters())
            self.optimizer = build_optimizer(OptimizerConfig(lr=1e-2), self.wrapped)
            self.state = OptimizerState(self.optimizer, offload=offload)
            self.state.initialise()

    def step(self, number: int) -> None:
        """Take a step with the gradients of this number."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        drawn = torch.Generator().manual_seed(number)
        for parameter in self.wrapped.parameters():
            parameter.main_grad.copy_(0.1 * torch.randn(parameter.shape, generator=drawn))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2
        with optimizer_of_megatron(self.fused), self.state.in_place():
            assert self.optimizer.step()[0]

    def _sharded(self, *, is_loading: bool) -> dict:
        metadata = sharding_metadata()
        model = self.wrapped.module.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(
            self.wrapped.module.sharded_state_dict(), is_loading=is_loading, metadata=metadata
        )
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        with optimizer_of_megatron(self.fused):
            dist_checkpointing.save(self._sharded(is_loading=False), str(folder))

    def load(self, folder: Path) -> None:
        with optimizer_of_megatron(self.fused):
            loaded = dist_checkpointing.load(self._sharded(is_loading=True), str(folder))
            self.wrapped.module.load_state_dict(loaded["model"])
            self.optimizer.load_state_dict(loaded["optimizer"])

    def masters(self) -> list[torch.Tensor]:
        """The float32 master weights."""
        return [
            master.detach().clone()
            for part in optimizer_parts(self.optimizer)
            for group in part.optimizer.param_groups
            for master in group["params"]
        ]


def resumed(folder: Path, first: type | None, then: type | None, trained: int) -> list:
    """Return master weights after `trained` steps of one kind, a checkpoint, and two of another."""
    before = Trained(first)
    for number in range(trained):
        before.step(number)
    before.save(folder)
    after = Trained(then)
    after.load(folder)
    for number in range(trained, trained + 2):
        after.step(number)
    return after.masters()


def uninterrupted(kind: type | None, steps: int, *, offload: bool = False) -> list:
    """Return master weights after steps of one kind."""
    made = Trained(kind, offload=offload)
    for number in range(steps):
        made.step(number)
    return made.masters()
