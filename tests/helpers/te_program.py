"""TransformerEngine's layers (made_transformer_engine.py) and Megatron's own do the same things.

    python tests/helpers/te_program.py WORK_FOLDER NAME

Run in a process of its own, because Megatron looks for TransformerEngine when it is imported, or as
ranks. WORK_FOLDER/job.pt says what to do; rank 0 writes WORK_FOLDER/NAME.pt.
"""

# ruff: noqa: E402 - the stand-in goes before everything else

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import made_transformer_engine

made_transformer_engine.install()

import torch
from layout_program import gather_weights, generate, main, record_gradients, share_of
from made_transformer_engine import PRODUCTS
from small_runs import small_recipe, small_trainer, updated

from nemo_care.checkpoints.store import sharding_metadata
from nemo_care.models.weights import _source, export_hf
from nemo_care.ranks.process_groups import Layout, Ranks

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tensor=2),
    "tp2_sequence_parallel": Layout(tensor=2, sequence_parallel=True),
}
BACKENDS = ("local", "transformer_engine")


def made_recipe(job, backend: str):
    # In fp32, which recipes refuse with this backend: kernels on a GPU take bf16 only.
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.model.backend = backend
    return recipe


def marks(model) -> dict[str, tuple]:
    """How Megatron is told that a parameter is cut."""
    names = ("tensor_model_parallel", "partition_dim", "sequence_parallel", "allreduce")
    defaults = (False, -1, False, True)
    return {
        " ".join(_source(model, name).names): tuple(
            getattr(parameter, mark, default) for mark, default in zip(names, defaults, strict=True)
        )
        for name, parameter in model.named_parameters()
    }


def step(trainer, job, ranks: Ranks) -> dict:
    """Sampling, scoring, an update and the moving average."""
    result = {"marks": marks(trainer.policy.model)}
    result["sampled"] = generate(trainer, job["prompts"], 1.0, ranks)
    groups = share_of(job["groups"], ranks)
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    gradients = record_gradients(trainer.policy)
    result["metrics"] = updated(trainer.policy, groups)
    trainer.reference.track(trainer.policy.model, 1)
    return result | {
        "likelihoods": [group.answer_likelihood for group in groups],
        "gradients": gradients,
        "weights": gather_weights(trainer.policy.model),
        "average": gather_weights(trainer.reference.average.model),
        "distance": trainer.reference.distance(trainer.policy.model),
    }


def products_of(passes) -> dict[str, list]:
    """What each pass multiplied."""
    found = {}
    for name, run in passes.items():
        PRODUCTS.clear()
        run()
        found[name] = list(PRODUCTS)
    return found


def in_eight_bits(job, ranks: Ranks, folder: Path, **keys) -> dict[str, list]:
    recipe = made_recipe(job, "transformer_engine")
    recipe.model.recompute_granularity = keys.pop("recompute_granularity", "none")
    recipe.model.precision.fp8.enabled = True
    for key, value in keys.items():
        setattr(recipe.model.precision.fp8, key, value)
    trainer = small_trainer(recipe, ranks, folder)
    groups = share_of(job["groups"], ranks)

    def score() -> None:
        trainer.reference.score_answers(groups)
        trainer.credit(groups)

    found = products_of(
        {
            "rollout": lambda: generate(trainer, job["prompts"], 1.0, ranks),
            "scoring": score,
            "update": lambda: updated(trainer.policy, groups),
        }
    )
    state = trainer.policy.model.sharded_state_dict("", metadata=sharding_metadata())
    found["states"] = [key for key in state if key.endswith("_extra_state")]
    return found


def resumed(job, ranks: Ranks, folder: Path, first: str, then: str) -> dict:
    """Two steps with one backend, two more with another: weights and average."""
    run = folder / f"{first}-{then}"
    for backend, steps in ((first, 2), (then, 4)):
        recipe = made_recipe(job, backend)
        recipe.trainer.max_steps = steps
        trainer = small_trainer(recipe, ranks, run)
        trainer.fit()
    return gather_weights(trainer.policy.model) | {
        f"average.{name}": tensor
        for name, tensor in gather_weights(trainer.reference.average.model).items()
    }


def run(folder: Path, name: str, ranks: Ranks) -> dict:
    job = torch.load(folder / "job.pt", weights_only=False)
    result: dict = {}
    for backend in BACKENDS:
        trainer = small_trainer(made_recipe(job, backend), ranks, folder / f"{name}-{backend}")
        export_hf(trainer.policy.model, job["checkpoint"], folder / f"{name}-{backend}-export")
        result[backend] = step(trainer, job, ranks)
    result["fp8"] = in_eight_bits(job, ranks, folder / f"{name}-fp8")
    if name != "one":
        return result
    variants = {
        "ends": {"bf16_first_layers": 1, "bf16_last_layers": 2},
        "everywhere": {"scoring": True, "rollout": True},
        "delayed": {"recipe": "delayed"},
        "recomputed": {"recompute_granularity": "full"},
        "mxfp8": {"recipe": "mxfp8"},
    }
    for variant, keys in variants.items():
        result[f"fp8_{variant}"] = in_eight_bits(job, ranks, folder / f"fp8-{variant}", **keys)
    result["resumed"] = {
        (first, then): resumed(job, ranks, folder, first, then)
        for first in BACKENDS
        for then in BACKENDS
    }
    return result


if __name__ == "__main__":
    main(run, LAYOUTS)
