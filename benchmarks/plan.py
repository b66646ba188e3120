"""Compare the plan's memory with the peak of a real update on this machine.

    python benchmarks/plan.py

A random Qwen2.5-VL in float32 on the CPU; the optimizer's step, which differs between CPU and GPU,
is not included. *Resident* is the whole process, with memory that malloc has not returned.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": False,
    "image_token_id": 1000,
    "video_token_id": 1001,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "vision_config": {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_heads": 8,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [1, 3],
    },
}
PROMPT, COMPLETION, GROUP = 2048, 128, 8
GRANULARITIES = ("none", "selective", "full")


def recipe_of(folder: str, granularity: str):
    from nemo_care.recipe.schema import Recipe

    recipe = Recipe()
    recipe.trainer.max_steps = 4
    recipe.model.hf_path = folder
    recipe.model.precision.dtype = "fp32"
    recipe.model.recompute_granularity = granularity
    recipe.algorithm.group_size = GROUP
    recipe.algorithm.prompts_per_step = 1
    recipe.rollout.max_completion_tokens = COMPLETION
    recipe.data.max_prompt_tokens = PROMPT
    recipe.data.train.root = recipe.data.validation.root = "nowhere"
    return recipe


def planned(folder: str) -> dict[str, int]:
    """Return the peak bytes of forward and backward, by recomputation, patches included."""
    from nemo_care.planning.shapes import longest_lengths, read_model_shape
    from nemo_care.planning.stage import built_stage

    found = {}
    shape = read_model_shape(folder)
    for granularity in GRANULARITIES:
        recipe = recipe_of(folder, granularity)
        with built_stage(recipe, shape, 0, reference=False) as stage:
            lengths = longest_lengths(recipe, shape.family)
            found[granularity] = stage.update(lengths, 1)[0]
    return found


def measured(folder: str, granularity: str) -> tuple[int, int]:
    """Return the peak of a real update: bytes allocated by torch, and resident bytes."""
    import torch
    from made import with_noise
    from measure import allocated_peak, peak_memory

    from nemo_care.groups.batching import BatchLayout
    from nemo_care.planning.shapes import longest_lengths, made_group, read_model_shape
    from nemo_care.ranks.process_groups import Layout, Ranks
    from nemo_care.training.build import build_model
    from nemo_care.training.policy import Policy
    from nemo_care.training.step import Step

    recipe, ranks = recipe_of(folder, granularity), Ranks(Layout())
    family = read_model_shape(folder).family
    model = build_model(recipe, ranks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    policy = Policy(model, recipe, ranks, BatchLayout(1, 0, multiple=16))
    group = made_group(longest_lengths(recipe, family), family, 0, GROUP)
    group.prompt = with_noise(group.prompt)
    policy.optimizer.step = lambda: (True, 0.0, None)
    # Megatron's buffers remain after the first update.
    policy.update(Step(0, trained=[group]))
    resident = peak_memory(lambda: policy.update(Step(0, trained=[group])))[0]
    return allocated_peak(lambda: policy.update(Step(0, trained=[group]))), resident


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    part = parser.parse_args().part
    if part:
        folder, name = part
        print(json.dumps(planned(folder) if name == "plan" else measured(folder, name)))
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))

        def run(name: str):
            command = [sys.executable, "-W", "ignore", __file__, "--part", folder, name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        plan = run("plan")
        print("| recomputation | planned | allocated | ratio | resident |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name in GRANULARITIES:
            allocated, resident = run(name)
            sizes = [f"{size / 2**20:.0f} MiB" for size in (plan[name], allocated, resident)]
            ratio = plan[name] / allocated
            print(f"| {name} | {sizes[0]} | {sizes[1]} | {ratio:.2f} | {sizes[2]} |")


if __name__ == "__main__":
    main()
