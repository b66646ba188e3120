"""Megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule."""

import math
import types
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from nemo_care.megatron.partial_gradients import finalize_gradients
from nemo_care.recipe.model import OptimizerConfig


def wrap_data_parallel(
    model: MegatronModule, *, overlap_grad_reduce: bool = False
) -> DistributedDataParallel:
    """Wrap a model in Megatron's DDP, with gradients in float32 and sharded for the optimizer.

    With `overlap_grad_reduce` the replicas' gradients are summed while the last micro-batch's
    backward still runs.
    """
    model.config.finalize_model_grads_func = finalize_gradients
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap_grad_reduce,
            grad_reduce_in_fp32=True,
            # See GradientWatch: all ranks decide together how to handle a NaN.
            check_for_nan_in_grad=False,
        ),
        model,
    )
    if overlap_grad_reduce:
        # The pipeline schedules use it to sum gradients only in the last micro-batch.
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(config: OptimizerConfig, model: DistributedDataParallel) -> MegatronOptimizer:
    """Build AdamW with state and master weights sharded over the data-parallel ranks.

    Its `step` changes nothing and returns False if the gradient's norm is not finite: squares can
    overflow where the gradient itself does not. The norm is the same on all ranks.
    """
    dtype = model.config.params_dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            # The groups' rates take precedence over the schedule's.
            min_lr=min(config.min_lr, config.lr),
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    for part in optimizer_parts(optimizer):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW):
            _repair_torch_adamw(part)
        if getattr(part, "optimizer", None) is not None:
            _keep_settings_when_loading(part)
            _load_steps_of_either_kind(part)
    _step_with_finite_norm_only(optimizer)
    return optimizer


def _step_with_finite_norm_only(optimizer: MegatronOptimizer) -> None:
    """Skip a step whose norm is not finite: clipping by it would make the gradient 0 or NaN, which
    AdamW would then apply."""
    get_grad_norm, step = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norm = 0.0

    def noted_grad_norm() -> float:
        nonlocal norm
        norm = get_grad_norm()
        return norm

    def step_if_finite() -> bool:
        return math.isfinite(norm) and step()

    optimizer.get_grad_norm = noted_grad_norm
    optimizer.step_with_ready_grads = step_if_finite


def build_scheduler(
    config: OptimizerConfig, optimizer: MegatronOptimizer, max_steps: int
) -> OptimizerParamScheduler:
    """Build the schedule: linear warm-up, then cosine to `min_lr` or constant.

    Call `step(1)` before the optimizer's step, so that step k (from 1) uses the rate of k.
    """
    decay_steps = max(config.decay_steps or max_steps, config.warmup_steps + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=min(config.min_lr, config.lr),
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        # After a resume the recipe's values apply; only the number of steps is restored.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _repair_torch_adamw(optimizer: DistributedOptimizer) -> None:
    """Make megatron-core 0.16.1 restore torch's AdamW correctly (used without TE and apex).

    Four faults: saving expects state even on a rank that trains nothing (as a later stage does with
    a frozen language model); loading expects state that only a first step creates; it does not
    handle `step` in a parameter's state; and it gives all parameters one shared `step` tensor,
    which then advances once per parameter and step, so that a resumed run silently trains with a
    wrong bias correction.
    """
    set_states = optimizer._set_main_param_and_optimizer_states
    state_dict, load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    def state_dict_of_any(self: Any) -> dict:
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict()
        # A checkpoint has the groups of rank 0, which counts the steps.
        bare = [
            {name: value for name, value in group.items() if name != "params"} | {"step": 0.0}
            for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": bare}}

    def set_states_with_step(self: Any, model_param: torch.Tensor, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        parameter = self.optimizer.param_groups[group]["params"][order]
        tensors.setdefault("step", self.optimizer.state[parameter]["step"])
        set_states(model_param, tensors)

    def load_with_own_steps(self: Any, state_dict: dict) -> None:
        load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    optimizer._set_main_param_and_optimizer_states = types.MethodType(
        set_states_with_step, optimizer
    )
    optimizer.state_dict = types.MethodType(state_dict_of_any, optimizer)
    optimizer.load_state_dict = types.MethodType(load_with_own_steps, optimizer)


def _keep_settings_when_loading(optimizer: MegatronOptimizer) -> None:
    """Load the state and its count of steps, but keep the recipe's settings.

    The groups of a checkpoint also hold learning rates, betas, eps and weight decay, which Megatron
    would adopt, whatever the schedule's arguments are.
    """
    load_state_dict = optimizer.load_state_dict

    def load_without_settings(self: Any, state_dict: dict) -> None:
        kept = [
            {name: value for name, value in group.items() if name not in ("params", "step")}
            for group in self.param_groups
        ]
        load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, kept, strict=True):
            group.update(settings)

    optimizer.load_state_dict = types.MethodType(load_without_settings, optimizer)


def _load_steps_of_either_kind(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW resume from a checkpoint of a fused AdamW, and vice versa.

    Their groups count steps differently: torch's as a float, where fused optimizers need an
    integer; fused ones not at all before their first step, where torch's loading expects 0.
    """
    load_state_dict = optimizer.load_state_dict

    def load_with_whole_steps(self: Any, state_dict: dict) -> None:
        for group in state_dict["optimizer"]["param_groups"]:
            group["step"] = int(group.get("step") or 0)
        load_state_dict(state_dict)

    optimizer.load_state_dict = types.MethodType(load_with_whole_steps, optimizer)


def sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any], **kind: Any
) -> dict[str, Any]:
    """Return the optimizer's state as sharded tensors; `kind` says whether it is for loading.

    Experts that are distributed over ranks have an optimizer of their own. The state does not
    depend on this: a checkpoint can be loaded with another distribution of the experts.
    """
    parts = optimizer_parts(optimizer)
    states = [part.sharded_state_dict(model_state, metadata=metadata, **kind) for part in parts]
    if len(parts) == 1:
        return states[0]
    tensors = {number: state["param_state"] for number, state in enumerate(states)}
    return {**states[0], "param_state": tensors}


def load_sharded_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what `sharded_state` has described."""
    parts = optimizer_parts(optimizer)
    # A rank that trains nothing has none.
    tensors = state.get("param_state", {})
    states = {0: tensors} if len(parts) == 1 else tensors
    others = {name: value for name, value in state.items() if name != "param_state"}
    # All groups have counted the same steps, and their settings are the recipe's.
    step = max(int(group.get("step") or 0) for group in state["optimizer"]["param_groups"])
    for number, part in enumerate(parts):
        groups = [
            {**{name: value for name, value in group.items() if name != "params"}, "step": step}
            for group in part.param_groups
        ]
        own = {"param_state": states[number]} if states.get(number) else {}
        part.load_state_dict({**others, "optimizer": {"param_groups": groups}, **own})


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that Megatron has chained, or the single optimizer."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def initialise_adamw_state(optimizer: MegatronOptimizer) -> None:
    """Create AdamW's state as its first step would, if it has none yet.

    Saving requires it for any AdamW, and loading for torch's (see `_repair_torch_adamw`).
    """
    for part in optimizer_parts(optimizer):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        if not isinstance(inner, torch.optim.AdamW):
            # The fused ones, of TransformerEngine or apex, count steps for all parameters together.
            part.init_state_fn(inner, part.config)
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter].update(
                        step=torch.tensor(0.0),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )
