"""Compare rollouts with vLLM and in the training shards: same model, same prompts, alternating.

    .venv-vllm/bin/python benchmarks/vllm_rollouts.py [--runs 5] [--threads 1]

Two models: the miniature with its own questions, and a random one of 8 layers (see made.py) whose
completions run to their full length. `equal` is the share of the prompts whose greedy completions
are equal on both sides, token by token. `sync` is one update of all weights: gathered, sent, loaded
by vLLM, caches reset. `start` lasts until the engine has answered its first request, weights
checked.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from made import Size, hf_config, video_prompt, write_checkpoint

from nemo_care.data.prompts import Prompt, PromptBuilder
from nemo_care.data.sources import read_source
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.groups.group import Group
from nemo_care.miniature.files import write_world
from nemo_care.models.weights import iterate_hf_weights
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.rollouts.build import build_generator
from nemo_care.rollouts.generator import Generator, Sampling
from nemo_care.training.build import load_model

MINIATURE = Path(__file__).parent.parent / "nemo_care" / "miniature" / "checkpoint_warm"


def recipe_of(checkpoint: Path, tokens: int) -> Recipe:
    recipe = Recipe()
    recipe.model.hf_path = str(checkpoint)
    recipe.model.precision.dtype = "fp32"
    recipe.rollout.max_completion_tokens = tokens
    recipe.rollout.vllm.kv_cache_gib = 1.0
    recipe.rollout.vllm.enforce_eager = True
    recipe.data.max_prompt_tokens = 4096
    recipe.data.prompt_template = "{question}"
    recipe.data.video.min_pixels = 784
    recipe.data.video.max_frames = 8
    return recipe


def miniature_prompts(recipe: Recipe, folder: Path, count: int) -> list[Prompt]:
    from nemo_care.models.families import read_family

    recipe.data.video.max_pixels = 784
    write_world(folder / "world", train=count, validation=1)
    form = read_family(recipe.model.hf_path).prompt
    builder = PromptBuilder(recipe.data, form, load_tokenizer(recipe.model.hf_path, form))
    samples = read_source(
        "jsonl", folder / "world", "train.jsonl", seed=1, for_training=True
    ).samples
    return [builder.build(index, sample) for index, sample in enumerate(samples)]


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def same(ours: Sequence[Group], theirs: Sequence[Group]) -> float:
    """Return the share of the completions that are equal, token by token."""
    pairs = [
        torch.equal(a.token_ids, b.token_ids)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine.completions, other.completions, strict=True)
    ]
    return sum(pairs) / len(pairs)


def compare(
    name: str, recipe: Recipe, ranks: Ranks, prompts: list[Prompt], sampling: Sampling, runs: int
) -> None:
    model = load_model(recipe, ranks)
    tokenizer = load_tokenizer(recipe.model.hf_path, model.family.prompt)
    version = 0
    with tempfile.TemporaryDirectory() as folder:

        def make(backend: str) -> Generator:
            recipe.rollout.backend = backend
            return build_generator(
                recipe,
                ranks,
                model,
                tokenizer,
                groups_per_batch=len(prompts),
                shared_prompt=True,
                folder=Path(folder),
                version=lambda: version,
                from_checkpoint=True,
            )

        megatron, vllm = make("megatron"), make("vllm")
        start = timed(lambda: vllm.generate(prompts[:1], sampling))
        greedy = dataclasses.replace(sampling, temperature=0.0, group_size=1)
        agreement = same(megatron.generate(prompts, greedy), vllm.generate(prompts, greedy))
        ours, theirs, syncs = [], [], []
        for _ in range(runs):
            ours.append(timed(lambda: megatron.generate(prompts, sampling)))
            version += 1
            # Without prompts: only the weights are sent.
            syncs.append(timed(lambda: vllm.generate([], sampling)))
            theirs.append(timed(lambda: vllm.generate(prompts, sampling)))
        vllm.close()
    size = sum(t.numel() * t.element_size() for _, t in iterate_hf_weights(model)) / 2**20
    work = f"{len(prompts)} x {sampling.group_size}"
    values = (*map(statistics.median, (ours, theirs, syncs)), start)
    cells = " | ".join(f"{value:.2f} s" for value in values)
    print(f"| {name} | {size:.0f} MiB | {work} | {cells} | {agreement:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the training shards")
    parser.add_argument("--prompts", type=int, default=16, help="of the miniature")
    arguments = parser.parse_args()
    ranks = Ranks(Layout(), cpu_threads=arguments.threads)
    print("| model | weights | prompts x G | Megatron | vLLM | sync | start | equal |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(MINIATURE, 28)
        prompts = miniature_prompts(recipe, folder, arguments.prompts)
        sampling = Sampling(8, 1.0, 1.0, 28, (1,))
        compare("miniature", recipe, ranks, prompts, sampling, arguments.runs)
        size = Size()
        write_checkpoint(folder / "random", size)
        recipe = recipe_of(folder / "random", 64)
        recipe.data.video.max_pixels = 224 * 224
        config = hf_config(size)
        prompts = [video_prompt(config, 512, index) for index in range(4)]
        sampling = Sampling(8, 1.0, 1.0, 64, (1,))
        compare("random", recipe, ranks, prompts, sampling, arguments.runs)


if __name__ == "__main__":
    main()
