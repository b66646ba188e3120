"""Values and gradients of some groups, the vision tower dealt to ranks and not; run as ranks.

    python tests/helpers/vision_program.py WORK_FOLDER NAME

WORK_FOLDER/job.pt says what to do; rank 0 writes WORK_FOLDER/NAME.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from layout_program import LAYOUTS, gather_gradients, main, reduce_whole_gradients
from small_runs import small_recipe

from nemo_care.groups.batching import BatchLayout
from nemo_care.training.build import load_model
from nemo_care.training.policy import Policy


def patches_seen(model) -> list[int]:
    """Fill the returned list with the patches that this rank's tower gets from now on."""
    seen: list[int] = []
    if model.pre_process:
        model.visual.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    return seen


def run(folder: Path, name: str, ranks) -> dict:
    job = torch.load(folder / "job.pt", weights_only=False)
    result: dict = {}
    for shard in (False, True):
        for recompute in ("none", "full"):
            recipe = small_recipe(job["checkpoint"], job["world"])
            recipe.model.vision.shard = shard
            recipe.model.recompute_granularity = recompute
            # Every parameter has to get a gradient then, on every rank.
            recipe.optimizer.overlap_grad_reduce = ranks.data_size > 1
            model = load_model(recipe, ranks)
            layout = BatchLayout.of_recipe(recipe, ranks.layout, pad_id=0)
            policy = Policy(model, recipe, ranks, layout)
            reduce_whole_gradients(policy.wrapped.config)
            seen = patches_seen(model)
            for case, groups in job["cases"].items():
                if case == "text" and ranks.data_size > 1:
                    continue
                seen.clear()
                batches = layout.batches(groups)
                losses = policy.forward_backward(batches, policy.loss_count(batches))
                everyone = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, list(seen))
                result[shard, recompute, case] = {
                    "log_probs": [found.log_probs.detach() for found in losses],
                    "patches": everyone,
                    "gradients": gather_gradients(model),
                    "norm": policy.gradient_norm(),
                }
    return result


if __name__ == "__main__":
    main(run, {**LAYOUTS, "tp2_dp2": LAYOUTS["tp2"]})
