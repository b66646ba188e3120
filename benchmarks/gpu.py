"""Time scoring and update of a model of Qwen2.5-VL-3B's shape, with random weights, on one GPU.

    python benchmarks/gpu.py [--layers 36] [--prompt 8192] [--completion 512] [--group 8]

packed    one sequence per group, as training runs it
separate  the prompt copied for every completion
fp8       packed, the update's products in 8 bits (needs TransformerEngine)

Tokens/s count a group's prompt once in every layout, so that they can be compared. MFU is forward
(and in the update twice as much for backward) over the GPU's dense bf16 peak, also in 8 bits;
recomputation does not count. *Planned* is `nemo-care plan`'s estimate for the same weights and
lengths without CUDA's own memory, *measured* the memory allocated by torch at the peak of the
update, including the optimizer's step. Every way runs in a separate process. Without a GPU the same
code runs with `--shape tiny`, and peaks are not measured. Not run on a GPU yet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GIB = 2**30
CONFIGURATIONS = Path(__file__).parent.parent / "nemo_care" / "planning" / "configurations"
SHAPES = ("3b", "tiny")
# For a CPU.
TINY = {
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


@dataclass(frozen=True)
class Way:
    """A backend, a layout of groups and a precision."""

    backend: str
    shared: bool
    fp8: str | None = None

    @property
    def name(self) -> str:
        layout = "packed" if self.shared else "separate"
        return f"{layout}, {self.backend}, {self.fp8 + ' fp8' if self.fp8 else 'bf16'}"


def ways(fp8_recipes: list[str]) -> list[Way]:
    """Return all ways, the simplest first."""
    engine = "transformer_engine"
    return [
        Way("local", shared=False),
        Way("local", shared=True),
        Way(engine, shared=True),
        *(Way(engine, shared=True, fp8=recipe) for recipe in fp8_recipes),
    ]


def left_out(way: Way) -> str | None:
    """Return why this machine can't run it, None if it can."""
    import torch

    from nemo_care.errors import InputError
    from nemo_care.models.precision import check_gpu
    from nemo_care.recipe.model import FP8Config

    if way.backend == "local":
        return None
    if not torch.cuda.is_available():
        return "TransformerEngine needs a GPU"
    if find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed"
    if way.fp8 is None:
        return None
    fp8 = FP8Config(enabled=True, recipe=way.fp8)
    try:
        check_gpu(fp8, torch.cuda.get_device_capability(), torch.version.cuda)
    except InputError as error:
        return str(error)
    return None


def write_shape(folder: Path, shape: str, layers: int | None) -> None:
    """Write a config.json of that shape with `layers` layers (None: all)."""
    if shape == "tiny":
        config = dict(TINY)
    else:
        config = json.loads((CONFIGURATIONS / "Qwen2.5-VL-3B-Instruct/config.json").read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))


def recipe_of(folder: str, way: Way, args: argparse.Namespace) -> Any:
    from nemo_care.recipe.schema import Recipe, check_recipe

    recipe = Recipe()
    recipe.trainer.max_steps = 1000
    recipe.model.hf_path = folder
    recipe.model.backend = way.backend
    recipe.model.recompute_granularity = args.recompute
    recipe.model.precision.fp8.enabled = way.fp8 is not None
    recipe.model.precision.fp8.recipe = way.fp8 or "tensorwise"
    recipe.algorithm.group_size = args.group
    recipe.algorithm.prompts_per_step = 1
    recipe.algorithm.shared_prompt = way.shared
    recipe.rollout.max_completion_tokens = args.completion
    recipe.data.max_prompt_tokens = args.prompt
    recipe.data.train.root = recipe.data.validation.root = "nowhere"
    check_recipe(recipe)
    return recipe


def planned(folder: str, way: Way, args: argparse.Namespace) -> dict[str, float]:
    """Return the planned bytes at the peak of the update, in a fake world."""
    from nemo_care.planning.shapes import longest_lengths, read_model_shape
    from nemo_care.planning.stage import built_stage

    recipe, shape = recipe_of(folder, way, args), read_model_shape(folder)
    with built_stage(recipe, shape, 0, reference=False) as stage:
        lengths = longest_lengths(recipe, shape.family)
        peak = stage.build.held(recipe) + max(stage.update(lengths, 1))
    return {"planned_bytes": peak}


def measured(folder: str, way: Way, args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, tokens/s and FLOPs of both passes, and the peak of the update."""
    import torch
    from made import with_noise
    from measure import seconds

    from nemo_care.groups.batching import BatchLayout
    from nemo_care.planning.shapes import longest_lengths, made_group, read_model_shape
    from nemo_care.planning.work import group_flops, packed_tokens
    from nemo_care.ranks.process_groups import Layout, Ranks
    from nemo_care.scoring.scorer import Scorer
    from nemo_care.training.build import build_model
    from nemo_care.training.policy import Policy
    from nemo_care.training.step import Step

    recipe, family = recipe_of(folder, way, args), read_model_shape(folder).family
    ranks = Ranks(Layout(), cpu_threads=args.threads)
    torch.manual_seed(0)
    model = build_model(recipe, ranks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    layout = BatchLayout.of(
        ranks.layout, 1, 0, shared_prompt=way.shared, fp8=recipe.model.precision.fp8
    )
    policy = Policy(model, recipe, ranks, layout)
    scorer = Scorer(model, ranks, layout)
    lengths = longest_lengths(recipe, family)
    group = made_group(lengths, family, 0, args.group)
    group.prompt = with_noise(group.prompt)
    tokens = packed_tokens(lengths, args.group, shared=True)
    begin, end = group.completions[0].answer_span or (0, 0)

    def forward(rows: int) -> float:
        return group_flops(family, lengths, args.group, shared=way.shared, rows=rows)

    rows = args.group * args.completion
    passes = {
        "scoring": (
            lambda: scorer.answer_likelihoods([group]),
            forward(args.group * (end - begin)),
        ),
        "update": (lambda: policy.update(Step(0, trained=[group])), 3 * forward(rows)),
    }
    result: dict[str, Any] = {}
    for name, (run, flops) in passes.items():
        run()  # compiles, fills buffers and creates the optimizer's state
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        duration = seconds(run, args.repeats)
        result[name] = {
            "seconds": duration,
            "tokens_per_second": tokens / duration,
            "flops": flops,
            "mfu": mfu(flops, duration),
        }
    on_gpu = torch.cuda.is_available()
    result["measured_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    result["device"] = torch.cuda.get_device_name() if on_gpu else "CPU"
    return result


def mfu(flops: float, seconds: float) -> float | None:
    """Return the share of the GPU's dense bf16 peak; None if the peak is unknown."""
    import torch

    from nemo_care.planning.gpus import gpu_names, read_gpu

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name().lower()
    # By name: H100 and H200 have the same compute capability, and A100s come in two sizes.
    for name in gpu_names():
        if name.partition("-")[0].removesuffix("s") in device:
            return flops / seconds / read_gpu(name).flops
    return None


def part(args: argparse.Namespace, way: Way, folder: str, name: str) -> dict[str, Any]:
    """Run one part in a separate process and return its results, or `error`."""
    options = [f"--{key}={getattr(args, key)}" for key in _PASSED]
    spec = json.dumps([way.backend, way.shared, way.fp8, folder])
    command = [sys.executable, "-W", "ignore", __file__, *options, "--part", name, spec]
    # The plan's fake world needs a process that sees no GPU.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if name == "planned" else {}
    done = subprocess.run(
        command, env={**os.environ, **hidden}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table with a line per way."""
    heading = ("way", "pass", "seconds", "tokens/s", "MFU", "against separate", "planned",
               "measured", "plan is off by")  # fmt: skip
    out = [" | ".join(heading), " | ".join(["---"] * 2 + ["---:"] * 7)]
    base = next((row for row in rows if row["way"].startswith("separate")), {})
    for row in rows:
        for name in ("scoring", "update"):
            found = row.get(name)
            if found is None:
                continue
            ratio = base[name]["seconds"] / found["seconds"] if name in base else None
            memory = ["", "", ""]
            if name == "update":
                memory = _memory(row)
            out.append(
                " | ".join(
                    (
                        row["way"],
                        name,
                        f"{found['seconds']:.3f}",
                        f"{found['tokens_per_second']:.0f}",
                        "–" if found["mfu"] is None else f"{found['mfu']:.1%}",
                        "–" if ratio is None else f"{ratio:.2f}",
                        *memory,
                    )
                )
            )
    return [f"| {line} |" for line in out]


def _memory(row: dict[str, Any]) -> list[str]:
    planned_bytes, measured_bytes = row.get("planned_bytes"), row.get("measured_bytes")
    plan = "–" if planned_bytes is None else f"{planned_bytes / GIB:.2f} GiB"
    if measured_bytes is None:
        return [plan, "not measured", "–"]
    off = "–" if planned_bytes is None else f"{planned_bytes / measured_bytes - 1:+.1%}"
    return [plan, f"{measured_bytes / GIB:.2f} GiB", off]


_PASSED = ("shape", "prompt", "completion", "group", "repeats", "recompute", "threads")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--layers", type=int, help="of the language model (default: all)")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens, most of them video")
    parser.add_argument("--completion", type=int, default=512, help="tokens")
    parser.add_argument("--group", type=int, default=8, help="completions")
    parser.add_argument("--repeats", type=int, default=3, help="the shortest counts")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--threads", type=int, default=2, help="without a GPU")
    parser.add_argument("--fp8-recipes", nargs="*", default=["tensorwise", "blockwise"])
    parser.add_argument("--out", type=Path, help="write the same as JSON to this file")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = _parser().parse_args()
    if args.part:
        name, spec = args.part
        backend, shared, fp8, folder = json.loads(spec)
        run = planned if name == "planned" else measured
        print(json.dumps(run(folder, Way(backend, shared, fp8), args)))
        return 0
    rows, omitted, failed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder), args.shape, args.layers)
        for way in ways(args.fp8_recipes):
            reason = left_out(way)
            if reason is not None:
                omitted.append(f"{way.name}: {reason}")
                continue
            row: dict[str, Any] = {"way": way.name}
            for name in ("planned", "measured"):
                found = part(args, way, folder, name)
                if "error" in found:
                    failed.append(f"{way.name}, {name}: {found['error']}")
                else:
                    row |= found
            rows.append(row)
    options = {key: getattr(args, key) for key in ("layers", *_PASSED)}
    for line in table(rows):
        print(line)
    for line in omitted:
        print(f"left out: {line}")
    for line in failed:
        print(f"failed: {line}")
    record = {"options": options, "rows": rows, "left_out": omitted, "failed": failed}
    text = json.dumps(record)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
