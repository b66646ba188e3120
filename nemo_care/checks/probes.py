"""All probes that can prevent a recipe from running, in one list; each caller selects its own.

Callers ("faces") are a command before it starts ranks (`recipe.py`), a batch job on each of its
nodes (`node.py`), and a person (`fit.py`, after `machine.py` without a recipe).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemo_care.checks.machine import Machine
from nemo_care.errors import InputError
from nemo_care.recipe.schema import Recipe

if TYPE_CHECKING:
    from nemo_care.data.annotations import Annotations
    from nemo_care.data.mixing import TrainingData

TRAIN, EVALUATE, NODE = "train", "evaluate", "node"
PERSON, WARNING = "person", "warning"
"""The callers. A person also sees warnings, which do not prevent a run."""


@dataclass
class Situation:
    """The input of the probes.

    `machine` describes this machine, for a person. With `writes`, missing files of the miniature
    are written; otherwise they are left to the run, and not read. `training` and `levels` are the
    samples that the probes have read, for the run that follows.
    """

    recipe: Recipe
    machine: Machine | None = None
    writes: bool = False
    training: "TrainingData | None" = None
    levels: "dict[str, Annotations]" = field(default_factory=dict)

    @property
    def examined(self) -> Machine:
        """The machine, for a caller that has one."""
        assert self.machine is not None, "only a person's face asks, and examines it first"
        return self.machine


@dataclass(frozen=True)
class Probe:
    """A check whose `find` gives a line with a remedy per problem, or raises InputError.

    `faces` are the callers that use it.
    """

    faces: tuple[str, ...]
    find: Callable[[Situation], Iterable[str] | None]


def all_probes() -> tuple[Probe, ...]:
    """Return the probes in the order in which they run; imports what they need."""
    from nemo_care.checks import hardware, inputs, local
    from nemo_care.data.frame_cache import check_cache
    from nemo_care.models.precision import check_transformer_engine
    from nemo_care.process.environment import CPU
    from nemo_care.recipe.schema import check_training, check_world
    from nemo_care.rollouts.build import check_rollouts
    from nemo_care.scoring.reward_functions import load_rewards

    def of_recipe(check: Callable[[Recipe], object]) -> Callable[[Situation], None]:
        def find(situation: Situation) -> None:
            check(situation.recipe)

        return find

    def read_training(situation: Situation) -> None:
        situation.training = inputs.training_data(situation.recipe, situation.writes)

    def read_levels(situation: Situation) -> None:
        situation.levels = inputs.validation_data(situation.recipe, situation.writes)

    commands, training = (TRAIN, EVALUATE, PERSON), (TRAIN, PERSON)
    return (
        Probe((NODE,), lambda s: [] if CPU.is_on else hardware.gpu_problems(s.recipe)),
        Probe((NODE,), lambda s: hardware.host_memory_problems()),
        Probe((NODE,), of_recipe(inputs.checkpoint)),
        Probe((NODE,), lambda s: inputs.data_roots(s.recipe)),
        Probe((NODE,), lambda s: hardware.decoding_problems()),
        Probe((PERSON,), lambda s: local.devices(s.recipe, s.examined)),
        Probe((PERSON,), lambda s: local.kernels(s.recipe, s.examined)),
        Probe((PERSON,), lambda s: local.loggers(s.recipe, s.examined)),
        Probe((EVALUATE,), of_recipe(inputs.levels)),
        Probe(commands, of_recipe(inputs.layout)),
        Probe(commands, of_recipe(check_world)),
        Probe(commands, of_recipe(inputs.eight_bits)),
        Probe(commands, lambda s: check_transformer_engine(s.recipe.model)),
        Probe(commands, of_recipe(check_rollouts)),
        Probe((TRAIN, EVALUATE, NODE), lambda s: check_cache(s.recipe.data)),
        Probe(commands, of_recipe(inputs.prompts)),
        Probe(training, of_recipe(check_training)),
        Probe(training, lambda s: inputs.check_weights(s.recipe.model.hf_path)),
        Probe(training, lambda s: load_rewards(s.recipe.algorithm) and None),
        Probe(training, read_training),
        Probe((EVALUATE,), of_recipe(inputs.evaluated)),
        Probe(commands, read_levels),
        Probe((WARNING,), lambda s: local.warnings(s.recipe, s.examined)),
    )


def found_by(face: str, situation: Situation) -> Iterator[str]:
    """Yield the problems that a caller's probes find, probe by probe."""
    for probe in all_probes():
        if face not in probe.faces:
            continue
        try:
            yield from probe.find(situation) or ()
        except InputError as error:
            yield str(error)
