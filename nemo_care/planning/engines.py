"""vLLM's engines in a plan: their GPU memory, the size of their cache, their share of prompts.

vLLM is neither run nor imported. Weights and cache are calculated from the model's configuration;
activations and CUDA graphs, which vLLM measures when it starts, are not included.
"""

from dataclasses import asdict, dataclass
from typing import Any

from nemo_care.models.architecture import Architecture
from nemo_care.planning.counts import prompts_of
from nemo_care.planning.gpus import GIB, Gpu, gib
from nemo_care.recipe.schema import Recipe, replicas_of
from nemo_care.rollouts.vllm.placement import Share, share

# Phases in which engines on training GPUs are awake.
_AWAKE = ("rollout", "validation")
# Assumption: what CUDA keeps for a process whose engine has released its memory.
_CONTEXT = GIB
_KEY = "rollout.vllm"


@dataclass(frozen=True)
class EnginePlan:
    """Memory of an engine on each of its GPUs, in bytes.

    `share` is all memory of an awake engine, which includes `weights` and `cache`; `asleep` is what
    remains during training. `host` is the CPU memory of a sleeping engine per GPU, `buffer` the
    memory through which the training process sends the weights. A cached token takes
    `bytes_per_token`; the longest prompt with the longest completion has `sequence_tokens`.
    """

    placement: str
    engines: int
    tensor_parallel_size: int
    gpu_memory: int
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    share: int
    weights: int
    cache: int
    bytes_per_token: int
    sequence_tokens: int
    asleep: int
    host: int
    buffer: int

    @property
    def cache_tokens(self) -> int:
        """Number of tokens that the cache holds."""
        return self.cache // self.bytes_per_token

    @property
    def cache_sequences(self) -> int:
        """Number of full-length prompts with one completion in the cache; sharing allows more."""
        return self.cache_tokens // self.sequence_tokens

    @property
    def sequence(self) -> int:
        """Bytes of one full-length sequence."""
        return self.sequence_tokens * self.bytes_per_token

    @property
    def need(self) -> int:
        """Minimum for an engine: its weights and one full-length sequence."""
        return self.weights + self.sequence

    @property
    def fits(self) -> bool:
        """Whether the share holds the minimum."""
        return not self.problem

    @property
    def problem(self) -> str:
        """Why an engine can't work, with the keys to change; empty if it can."""
        sequence = f"one sequence of {self.sequence_tokens} tokens"
        if self.kv_cache_gib is not None and self.sequence > self.cache:
            return (
                f"{sequence} needs {gib(self.sequence)} GiB of an engine's cache on each GPU, and "
                f"{_KEY}.kv_cache_gib={self.kv_cache_gib:g}: raise or omit it, or raise "
                f"{_KEY}.tensor_parallel_size"
            )
        if self.share > self.gpu_memory:
            return (
                f"an engine's weights ({gib(self.weights)} GiB) and {_KEY}.kv_cache_gib="
                f"{self.kv_cache_gib:g} do not fit a GPU of {gib(self.gpu_memory)} GiB: lower it "
                f"or raise {_KEY}.tensor_parallel_size"
            )
        if self.need > self.share:
            return (
                f"an engine needs {gib(self.need)} GiB of each of its GPUs (weights "
                f"{gib(self.weights)}, {sequence} {gib(self.sequence)}), and "
                f"{_KEY}.gpu_memory_utilization="
                f"{self.gpu_memory_utilization:g} gives it {gib(self.share)} GiB: raise that or "
                f"{_KEY}.tensor_parallel_size"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values; the keys are part of the command's contract."""
        counted = ("cache_tokens", "cache_sequences", "need", "fits")
        return asdict(self) | {name: getattr(self, name) for name in counted}


def engine_plan(
    recipe: Recipe, model: Architecture, parameters: int, gpu: Gpu
) -> EnginePlan | None:
    """Return the memory of the recipe's engines; None if the training ranks sample.

    `parameters` are those of the whole model. Engines elsewhere are assumed to have the same GPU.
    """
    if recipe.rollout.backend != "vllm":
        return None
    vllm = recipe.rollout.vllm
    size, width = vllm.tensor_parallel_size, bytes_of_number(recipe)
    # vLLM cuts every large weight, including vision tower and vocabulary.
    weights = parameters * width // size
    # With more ranks than key-value heads, several ranks have the same head.
    heads = max(model.kv_heads / size, 1)
    taken = int(gpu.memory * vllm.gpu_memory_utilization)
    cache = max(taken - weights, 0)
    if vllm.kv_cache_gib is not None:
        # vLLM makes the cache as large as requested, but starts only if the share is free.
        cache = int(vllm.kv_cache_gib * GIB)
        taken = max(taken, weights + cache)
    colocated = vllm.placement == "colocated"
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_completion_tokens
    return EnginePlan(
        placement=vllm.placement,
        engines=len(_all_engines(recipe)),
        tensor_parallel_size=size,
        gpu_memory=gpu.memory,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        kv_cache_gib=vllm.kv_cache_gib,
        share=taken,
        weights=weights,
        cache=cache,
        bytes_per_token=int(2 * model.layers * heads * model.head_dim * width),
        # As in `engine_settings`.
        sequence_tokens=min(longest, model.max_positions),
        asleep=(_CONTEXT if vllm.sleep_level else taken) if colocated else 0,
        host=weights if colocated and vllm.sleep_level == 1 else 0,
        # As in `ipc_buffer_bytes`: the embedding is the largest tensor.
        buffer=max(vllm.bucket_mib * 2**20, model.vocab_size * model.hidden_size * width)
        if colocated
        else 0,
    )


def beside(engine: EnginePlan | None, phase: str) -> int:
    """Return the bytes that an engine and weight transfer take of a training GPU in a phase."""
    if engine is None or engine.placement != "colocated":
        return 0
    return engine.share + engine.buffer if phase in _AWAKE else engine.asleep


def bytes_of_number(recipe: Recipe) -> int:
    """Return the bytes of a weight, and of a number in an engine's cache."""
    return 2 if recipe.model.precision.dtype == "bf16" else 4


def workers_of_a_machine(recipe: Recipe) -> int:
    """Return the number of a training machine's GPUs that run engines, each with one process."""
    vllm = recipe.rollout.vllm
    if recipe.rollout.backend != "vllm":
        return 0
    return recipe.trainer.devices if vllm.placement == "colocated" else len(vllm.gpus or ())


def most_prompts(recipe: Recipe) -> int:
    """Return the number of prompts per step of the engine with most of them."""
    prompts = prompts_of(recipe)
    return max(-(-prompts // len(part.engines)) * len(part.sharers) for _, part in _shares(recipe))


def replica_in_a_machine(recipe: Recipe) -> bool:
    """Whether the ranks of each model replica are on one machine."""
    model, trainer = recipe.model, recipe.trainer
    # Megatron's stages are the slowest-varying dimension, so several stages span all machines.
    apart = trainer.num_nodes > 1 and model.pipeline_model_parallel_size > 1
    return not apart and model.tensor_model_parallel_size <= trainer.devices


def _all_engines(recipe: Recipe) -> set[tuple[int, int]]:
    return {(place, number) for place, part in _shares(recipe) for number in part.engines}


def _shares(recipe: Recipe) -> list[tuple[int, Share]]:
    """Return for each replica where its engines are counted (such as a machine) and its share.

    The shares are those of `rollouts/vllm/fleet.py`.
    """
    vllm, model, devices = recipe.rollout.vllm, recipe.model, recipe.trainer.devices
    tensor, count = model.tensor_model_parallel_size, replicas_of(recipe)
    if vllm.placement == "colocated":
        own = tensor * model.pipeline_model_parallel_size // vllm.tensor_parallel_size
        return [(replica, Share(tuple(range(own)), (replica,))) for replica in range(count)]
    if vllm.engines is not None:
        everyone = range(count)
        return [
            (0, share(vllm.engines, everyone, replica, f"{_KEY}.engines")) for replica in everyone
        ]
    engines = len(vllm.gpus or ()) // vllm.tensor_parallel_size
    where = [replica * tensor // devices for replica in range(count)]
    found = []
    for replica, machine in enumerate(where):
        here = [other for other, place in enumerate(where) if place == machine]
        found.append((machine, share(engines, here, replica, f"{_KEY}.gpus")))
    return found
