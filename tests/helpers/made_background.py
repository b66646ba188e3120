"""A generator that samples during training, without engines, with their rules and order."""

from nemo_care.errors import RunFailed
from nemo_care.training import build


class StandIn:
    """Samples in the training shards at once, and returns the completions later.

    `events` are its calls in order, with the places of the prompts and the version of the weights
    that sampled them: ("submit", [0, 1], 3), ("collect", [0, 1], 3).
    """

    def __init__(self, inner, ranks, version):
        self.inner = inner
        self.ranks = ranks
        self.version = version
        self.events = []
        self.in_flight = 0
        self.weights = None
        self.failing = set()  # places of prompts whose completions this rank's engine never returns

    def generate(self, prompts, sampling):
        return self.collect(self.submit(prompts, sampling))

    def submit(self, prompts, sampling):
        if self.weights != self.version():
            assert not self.in_flight, "weights can't change while completions are generated"
            self.weights = self.version()
        places = [prompt.index for prompt in prompts]
        self.events.append(("submit", places, self.weights))
        self.in_flight += 1
        return places, self.weights, self.inner.generate(prompts, sampling)

    def collect(self, begun):
        places, weights, groups = begun

        def answer():
            if self.failing & set(places):
                raise RunFailed(f"the engine of rank {self.ranks.rank} has died")

        self.ranks.together(answer)
        self.events.append(("collect", places, weights))
        self.in_flight -= 1
        return groups

    def take_deaths(self):
        return []

    def rest(self):
        pass

    def close(self):
        pass


def stand_in_for_vllm(monkeypatch, ranks):
    """Make recipes with rollout.backend=vllm use a `StandIn` from now on."""
    make = build.build_generator

    def made(recipe, *arguments, version, **keywords):
        recipe.rollout.backend = "megatron"
        inner = make(recipe, *arguments, version=version, **keywords)
        recipe.rollout.backend = "vllm"
        return StandIn(inner, ranks, version)

    monkeypatch.setattr(build, "build_generator", made)


def asynchronous(recipe):
    """Return the recipe with rollouts one step ahead."""
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.gpus = [1]
    recipe.rollout.asynchronous = True
    return recipe
