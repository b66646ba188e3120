"""Memory that the stages of a recipe and its variants hold and need, each part measured once.

Measuring takes most of a plan's time: a stage is built in a fake world and its phases are run. A
variant of a recipe changes few of the parts, and only these are measured again.
"""

from operator import attrgetter
from typing import Any

from nemo_care.planning.counts import in_flight, prompts_of
from nemo_care.planning.shapes import ModelShape, longest_lengths
from nemo_care.planning.stage import Stage, StageBuild, StageUse, built_stage
from nemo_care.recipe.schema import Recipe

_LENGTHS = ("data.max_prompt_tokens",)
_MICRO_BATCH = (*_LENGTHS, "algorithm.groups_per_micro_batch")
_WORLD = ("trainer.num_nodes", "trainer.devices")
_LAYOUT = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.expert_model_parallel_size",
    "model.expert_tensor_parallel_size",
)
_SCORING = (*_MICRO_BATCH, "algorithm.reference.offload")
_SAMPLER = ("rollout.backend", "rollout.vllm.placement")
# The keys, among those in which variants differ, that each part depends on besides the layout.
_DEPENDS = {
    "build": _WORLD,
    "rollout": (*_LENGTHS, *_WORLD, "rollout.groups_per_batch", "rollout.backend"),
    "scoring": _SCORING,
    "validation": (*_MICRO_BATCH, "evaluation.samples_per_batch", *_SAMPLER),
    "passes": (*_MICRO_BATCH, "model.recompute_granularity"),
    "step": (*_WORLD, "algorithm.reference.offload", "optimizer.offload"),
    "output_layer": _MICRO_BATCH,
    "kept_vision": _LENGTHS,
}
_PARTS_OF = {
    "rollout": ("rollout",),
    "validation": ("scoring", "validation"),
    "scoring": ("scoring",),
    "update": ("passes", "step"),
}
PHASES = tuple(_PARTS_OF)


class Measurements:
    """The stages of one model, for recipes that differ only in the keys above."""

    def __init__(self, shape: ModelShape) -> None:
        """Parts are measured on first use."""
        self.shape = shape
        self._found: dict[tuple, Any] = {}

    def build(self, recipe: Recipe, number: int) -> StageBuild:
        """Return what a rank of this stage holds."""
        return self._parts(recipe, number, "build")["build"]

    def builds(self, recipe: Recipe) -> list[StageBuild]:
        """Return the builds of all stages; the equal ones between first and last are built once."""
        return [self.build(recipe, n) for n in range(recipe.model.pipeline_model_parallel_size)]

    def needs(self, recipe: Recipe, number: int, phase: str) -> int:
        """Return the bytes of a phase's peak, in addition to what the stage holds."""
        found = self._parts(recipe, number, *_PARTS_OF[phase])
        if phase == "scoring":
            return found["scoring"]
        if phase == "update":
            peak, left, kept, _ = found["passes"]
            flying = peak + (in_flight(recipe, number) - 1) * kept
            return max(flying, left + found["step"])
        if phase == "validation":
            return self._validation(recipe, found)
        return found["rollout"][0]

    def use(self, recipe: Recipe, number: int) -> StageUse:
        """Return the needs of all phases of a stage, in parts."""
        found = self._parts(recipe, number, *_DEPENDS)
        update, left, kept, vision = found["passes"]
        rollout, cache = found["rollout"]
        return StageUse(
            rollout=rollout,
            validation=self._validation(recipe, found),
            scoring=found["scoring"],
            update=update,
            micro_batch=kept,
            optimizer_step=left + found["step"],
            inputs=_inputs(recipe, self.shape),
            vision=vision,
            key_value_cache=cache,
            output_layer=found["output_layer"],
            kept_vision=found["kept_vision"],
        )

    def kept_vision(self, recipe: Recipe, number: int) -> int:
        """Return the bytes of a frozen vision tower's output that a step's prompts keep."""
        if "vision" not in recipe.model.freeze or number:
            return 0
        of_prompt = self._parts(recipe, number, "kept_vision")["kept_vision"]
        return of_prompt * prompts_of(recipe)

    def _validation(self, recipe: Recipe, found: dict[str, Any]) -> int:
        if recipe.rollout.backend == "megatron" or not _engines_see_validation(recipe):
            return found["validation"]
        # Engines stay awake while a validation's completions are scored: by the check of its first
        # batch, the probe and the likelihood judge. Each is a pass without gradients, estimated by
        # one micro-batch of the step's scoring pass.
        return found["scoring"] or found["validation"]

    def _parts(self, recipe: Recipe, number: int, *names: str) -> dict[str, Any]:
        keys = {name: self._key(name, recipe, number) for name in names}
        missing = [name for name, key in keys.items() if key not in self._found]
        if missing:
            # The peak of forward and backward is the same without a reference.
            alone = missing == ["passes"]
            with built_stage(recipe, self.shape, number, reference=not alone) as stage:
                for name in missing:
                    # What a pass leaves on a later stage: its input.
                    stage.model.set_input_tensor(None)
                    self._found[keys[name]] = self._measured(name, stage)
        return {name: self._found[key] for name, key in keys.items()}

    @staticmethod
    def _key(name: str, recipe: Recipe, number: int) -> tuple:
        place: Any = (number == 0, number == recipe.model.pipeline_model_parallel_size - 1)
        if name == "build" and recipe.model.precision.fp8.enabled:
            # The copies depend on bf16 layers at the model's ends and on recomputation.
            place = (number, recipe.model.recompute_granularity)
        values = (attrgetter(key)(recipe) for key in (*_LAYOUT, *_DEPENDS[name]))
        return (name, place, *values)

    def _measured(self, name: str, stage: Stage) -> Any:
        recipe = stage.recipe
        lengths = longest_lengths(recipe, self.shape.family)
        ranks_sample = recipe.rollout.backend == "megatron"
        match name:
            case "build":
                return stage.build
            case "rollout":
                if not ranks_sample:
                    return 0, 0
                together = min(recipe.rollout.groups_per_batch, prompts_of(recipe))
                return stage.generate(lengths, together, recipe.algorithm.group_size)
            case "validation":
                if not recipe.data.validation.annotations:
                    return 0
                if ranks_sample:
                    return stage.generate(lengths, recipe.evaluation.samples_per_batch, 1)[0]
                if stage.reference is not None or not _engines_see_validation(recipe):
                    return 0
                return stage.score_by_policy(lengths)
            case "scoring":
                return stage.score(lengths)
            case "passes":
                return (*stage.passes(lengths, 1), *stage.activations(lengths))
            case "step":
                return stage.step()
            case "output_layer":
                return stage.output_layer(lengths)
            case "kept_vision":
                return stage.kept_vision(lengths)
        raise KeyError(name)


def _engines_see_validation(recipe: Recipe) -> bool:
    """Whether engines share the training GPUs while a validation is scored."""
    colocated = recipe.rollout.vllm.placement == "colocated"
    return colocated and bool(recipe.data.validation.annotations)


def _inputs(recipe: Recipe, shape: ModelShape) -> int:
    """Return the bytes of one micro-batch's patches, float32."""
    patches = longest_lengths(recipe, shape.family).patches
    numbers = patches * shape.family.prompt.patching.values
    return 4 * numbers * recipe.algorithm.groups_per_micro_batch
