"""Plan the needs of a recipe, in a separate process.

    python -m nemo_care.checks.planned CAPABILITY FREE_GIB TOTAL_GIB --config-name RECIPE [...]

The plan's fake world needs a process that sees no GPU. Prints one JSON object: `peak` (largest
bytes of a rank), `phase`, `allowance` (the part of it that a CPU does not need), `host` (bytes of
this machine's CPU memory), `checkpoint` (bytes), `flops` of a step, `engine` (why a vLLM engine
can't work, if so), `remedies`; or `error`.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from nemo_care.errors import InputError
from nemo_care.process.screen import say


def planned(
    capability: str, free_gib: float, total_gib: float, arguments: Sequence[str]
) -> dict[str, Any]:
    """Return the object that is printed; remedies only if the memory is too small.

    Args:
        capability: the GPU's compute capability, such as 9.0; empty without a GPU.
        free_gib: free memory of the GPU, or of a rank's part of the CPU's memory.
        total_gib: its total memory, of which an engine takes a share.
        arguments: the recipe's command line.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from nemo_care.planning.advice import remedies
    from nemo_care.planning.gpus import DEFAULT_GPU, gpu_names, read_gpu
    from nemo_care.planning.plan import Question, make_plan
    from nemo_care.recipe.compose import compose_recipe

    like = [
        name for name in gpu_names() if ".".join(map(str, read_gpu(name).capability)) == capability
    ]
    try:
        recipe = compose_recipe(arguments)
        assert recipe is not None, "the command has composed it before"
        if not capability:
            # Without GPUs an engine has no memory to release.
            recipe.rollout.vllm.sleep_level = 0
        gpu = read_gpu(like[0] if like else DEFAULT_GPU, total_gib)
        question = Question(gpu, margin=1 - free_gib / total_gib)
        plan = make_plan(recipe, question, compare=False)
        advice = remedies(plan)
    except InputError as error:
        return {"error": str(error)}
    return {
        "peak": plan.worst.peak,
        "phase": plan.worst.peak_phase,
        "allowance": plan.allowance,
        "host": sum(plan.host.values()),
        "checkpoint": plan.checkpoint_bytes,
        "flops": sum(plan.flops.values()),
        "engine": plan.engine.problem if plan.engine is not None else "",
        "remedies": advice,
    }


if __name__ == "__main__":
    from nemo_care.process.quiet import quiet_libraries

    quiet_libraries()
    capability, free_gib, total_gib, *rest = sys.argv[1:]
    say(json.dumps(planned(capability, float(free_gib), float(total_gib), rest)))
