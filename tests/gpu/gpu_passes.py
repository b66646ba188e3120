"""Passes of the tiny model on whatever device there is, with results on the CPU."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_runs import small_recipe

from nemo_care.data.prompts import Prompt
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.megatron.optimizer import wrap_data_parallel
from nemo_care.models.pipeline import forward_backward, forward_only
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.training.build import load_model


@dataclass(frozen=True)
class Job:
    """What the tests compute on."""

    checkpoint: Path
    world: Path
    prompts: list[Prompt]
    groups: list[Group]
    ranks: Ranks

    def recipe(self, dtype: str = "fp32", backend: str = "local") -> Recipe:
        recipe = small_recipe(self.checkpoint, self.world)
        recipe.model.precision.dtype = dtype
        recipe.model.backend = backend
        return recipe


@dataclass(frozen=True)
class Passes:
    """Log-probabilities and likelihoods of all completions, and the gradient by parameter."""

    log_probs: torch.Tensor
    likelihood: torch.Tensor
    gradients: dict[str, torch.Tensor]


def needs_transformer_engine() -> None:
    """Skip with the reason where TransformerEngine can't be imported or has no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("TransformerEngine needs a CUDA device")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"TransformerEngine can't be imported: {error}")


def passes_of(
    job: Job, recipe: Recipe, *, shared_prompt: bool = True, multiple: int | None = None, seed=None
) -> Passes:
    """One forward and backward of the recipe's model over all groups.

    `multiple` pads sequences further than the recipe requires. The loss weighs every token by
    another factor, of both signs. `seed` moves the weights a little, the same for every caller.
    """
    wrapped = wrap_data_parallel(load_model(recipe, job.ranks))
    model = wrapped.module
    if seed is not None:
        _move(model, seed)
    layout = BatchLayout.of(
        job.ranks.layout,
        2,
        pad_id=0,
        shared_prompt=shared_prompt,
        fp8=recipe.model.precision.fp8,
    )
    if multiple is not None:
        layout = BatchLayout(2, 0, shared_prompt, multiple)
    batches = layout.batches(job.groups)

    def values(hidden, batch):
        log_probs = batch.log_probs(model, hidden, batch.mask)
        return log_probs[batch.mask].cpu(), answer_likelihood(log_probs, batch.answer_mask).cpu()

    def loss(hidden, batch):
        log_probs = batch.log_probs(model, hidden, batch.mask)[batch.mask]
        factors = torch.sin(torch.arange(len(log_probs), device=log_probs.device).float())
        return (log_probs * factors).sum(), log_probs.detach().cpu()

    def inputs(batch):
        return batch.rows.inputs(model)

    likelihoods = [row for _, row in forward_only(model, batches, inputs, values)]
    wrapped.train()
    wrapped.zero_grad_buffer()
    log_probs = forward_backward(wrapped, batches, inputs, loss)
    gradients = {
        _plain(name): parameter.main_grad.float().cpu().clone()
        for name, parameter in model.named_parameters()
    }
    return Passes(torch.cat(log_probs), torch.cat(likelihoods), gradients)


@torch.no_grad()
def _move(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter) * 1e-3)


def _plain(name: str) -> str:
    """One name for a norm that is a module of its own or part of the layer after it."""
    for fused, own in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        name = name.replace(fused, own)
    return name


def relative(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """|ours - wanted| / |wanted| over the whole gradient."""
    assert set(ours) == set(wanted)
    square = sum((ours[name] - wanted[name]).double().square().sum() for name in wanted)
    size = sum(wanted[name].double().square().sum() for name in wanted)
    return float((square / size).sqrt())


def assert_same(ours: Passes, wanted: Passes, *, mean: float, largest: float, gradient: float):
    """Log-probabilities within `mean` and `largest`, the gradient within `gradient` (relative)."""
    difference = (ours.log_probs - wanted.log_probs).abs()
    assert difference.isfinite().all()
    assert difference.mean() <= mean, f"mean difference {difference.mean()}"
    assert difference.max() <= largest, f"largest difference {difference.max()}"
    torch.testing.assert_close(
        ours.likelihood, wanted.likelihood, atol=largest, rtol=0, equal_nan=True
    )
    found = relative(ours.gradients, wanted.gradients)
    assert found <= gradient, f"gradients differ by {found}"
