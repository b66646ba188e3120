"""Make numbers that are not finite in one phase of a trainer's step on this rank."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def _norm_weight(model) -> torch.Tensor:
    """Return a weight that every layout has on each of its ranks."""
    return model.language_model.decoder.layers[0].input_layernorm.weight.data


@contextmanager
def broken(model) -> Iterator[None]:
    """Put a NaN into the model's weights inside."""
    weight = _norm_weight(model)
    kept = weight.clone()
    weight[0] = math.nan
    try:
        yield
    finally:
        weight.copy_(kept)


def _while_broken(function: Callable, model) -> Callable:
    def wrapped(*arguments, **keywords):
        with broken(model):
            return function(*arguments, **keywords)

    return wrapped


def _with_gradient(policy, value: float) -> Callable:
    finalize = policy.wrapped.config.finalize_model_grads_func

    def wrapped(*arguments, **keywords):
        policy.model.language_model.decoder.layers[0].mlp.linear_fc2.weight.main_grad[0, 0] = value
        return finalize(*arguments, **keywords)

    return wrapped


def inject(trainer, kind: str, value: float = math.nan) -> Callable[[], None]:
    """Make the trainer's next steps bad in this way; call the result to undo it."""
    policy, reference = trainer.policy, trainer.reference
    if kind == "gradient":
        owner, name = policy.wrapped.config, "finalize_model_grads_func"
        replacement = _with_gradient(policy, value)
    elif kind == "rollout":
        owner, name = trainer.generator, "generate"
        replacement = _while_broken(trainer.generator.generate, policy.model)
    elif kind == "reference":
        owner, name = reference.scorer, "score"
        replacement = _while_broken(reference.scorer.score, reference.average.model)
    else:
        owner, name = policy, "forward_backward"
        replacement = _while_broken(policy.forward_backward, policy.model)
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    return lambda: setattr(owner, name, original)


def inject_at(trainer, steps: dict[int, str]) -> None:
    """Make these steps of a run bad."""
    run = trainer.run_training_step

    def injected(step):
        undo = inject(trainer, steps[step.number]) if step.number in steps else lambda: None
        try:
            run(step)
        finally:
            undo()

    trainer.run_training_step = injected


def everything(trainer) -> list[torch.Tensor]:
    """Return copies of everything that an optimizer step changes on this rank."""
    policy = trainer.policy
    tensors = [parameter.detach() for parameter in policy.model.parameters()]
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors += [parameter.detach() for parameter in group["params"]]
            tensors.append(torch.tensor([group["lr"], group["weight_decay"]]))
        for state in part.optimizer.state.values():
            tensors += [state[key] for key in sorted(state)]
    if trainer.reference is not None:
        tensors += [trainer.reference.average.state[key] for key in trainer.reference.average.state]
    tensors.append(torch.tensor(policy.scheduler.num_steps))
    return [tensor.clone() for tensor in tensors]


def unchanged(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    """Whether nothing changed, bit for bit."""
    return len(before) == len(after) and all(map(torch.equal, before, after))
