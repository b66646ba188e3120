"""The vision tower, forward and backward, with its frames dealt to tensor-parallel ranks and not.

    .venv/bin/python benchmarks/vision.py [--ranks 1 2 4] [--prompt 2048] [--repeats 3]

Each rank computes with one thread, so times mean something up to as many ranks as there are cores.
Time and memory (what torch's allocator gives out at the peak) are those of the rank that takes
most, the gathering of the features included; FLOPs are counted by torch while the tower runs. The
sum of the gradients over the ranks, once a step, is not in it.

Then, in one process, how often the tower computes each prompt in a step of the trainer (rollout,
scoring, update), by what is frozen.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from made import Size, hf_config, lengths, video_prompt, write_checkpoint
from measure import allocated_peak, seconds
from step import made_trainer
from torch.utils.flop_counter import FlopCounterMode

from nemo_care.groups.batch import Rows
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.models.transformer_config import transformer_config
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks
from nemo_care.training.step import Step

_SIZE = replace(Size(), hidden=256, layers=1, vision_hidden=256, vision_depth=8)


def measured(ranks: Ranks, prompt_tokens: int, repeats: int, *, shard: bool) -> torch.Tensor:
    """Seconds, peak bytes and FLOPs, each of the rank that has most of it."""
    family = Qwen25VLFamily(hf_config(_SIZE))
    torch.manual_seed(0)
    model = family.build(transformer_config(family, ranks.layout, torch.float32)).train()
    if shard:
        model.deal_vision()
    prompt = video_prompt(family.hf, prompt_tokens)
    row = prompt.token_ids[None], prompt.position_ids[:, None], prompt.is_vision[None]
    inputs = Rows([prompt], *row).inputs(model)

    def forward_backward() -> None:
        model.all_vision_features(inputs).square().sum().backward()
        model.visual.zero_grad()
        # The next one starts together.
        dist.barrier()

    forward_backward()
    duration = seconds(forward_backward, repeats)
    with FlopCounterMode(display=False) as counter:
        forward_backward()
    found = [duration, allocated_peak(forward_backward), counter.get_total_flops()]
    most = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most


def print_tower_runs() -> None:
    """Run a step for each choice of `model.freeze`, and count the patches that the tower gets."""
    tokens, prompts = 512, 2
    ranks = Ranks(Layout(), RankEnvironment.read(), cpu_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            Path(folder), replace(_SIZE, hidden=128, intermediate=256, vocabulary=1024)
        )
        print("| frozen | tower runs per prompt and step | seconds of the step |")
        print("| --- | ---: | ---: |")
        for freeze in ((), ("vision",), ("vision", "merger")):
            trainer = made_trainer(
                Path(folder), ranks, (tokens, 16, 2), prompts, shared=True, freeze=freeze
            )
            seen: list[int] = []
            assert trainer.reference is not None
            for model in (trainer.policy.model, trainer.reference.average.model):
                model.visual.register_forward_pre_hook(
                    lambda _, arguments, seen=seen: seen.append(len(arguments[0]))
                )
            started = time.perf_counter()
            trainer.run_training_step(Step(1))
            duration = time.perf_counter() - started
            runs = sum(seen) / (prompts * lengths(tokens, 0).patches)
            print(f"| {', '.join(freeze) or 'nothing'} | {runs:g} | {duration:.2f} |", flush=True)
    ranks.close()


def be_rank(prompt: int, repeats: int) -> None:
    """Measure both ways; rank 0 prints."""
    env = RankEnvironment.read()
    ranks = Ranks(Layout(tensor=env.world_size), env, cpu_threads=1)
    whole = measured(ranks, prompt, repeats, shard=False)
    for name, shard in (("replicated", False), ("dealt", True)):
        if shard and env.world_size == 1:
            continue
        found = measured(ranks, prompt, repeats, shard=True) if shard else whole
        duration, memory, flops = found.tolist()
        shares = (found / whole).tolist()
        if env.rank == 0:
            print(
                f"{env.world_size:>5}  {name:<10}{duration:>9.3f}{shares[0]:>7.2f}"
                f"{memory / 2**20:>9.0f}{shares[1]:>7.2f}{flops / 1e9:>9.1f}{shares[2]:>7.2f}",
                flush=True,
            )
    ranks.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens, half of them of a video")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tower-runs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" in os.environ:
        if args.tower_runs:
            print_tower_runs()
        else:
            be_rank(args.prompt, args.repeats)
        return
    print(_SIZE)
    print("ranks  tower       seconds  share  peak MB  share    GFLOP  share", flush=True)
    given = ["--prompt", str(args.prompt), "--repeats", str(args.repeats)]
    for count, options in (*((count, given) for count in args.ranks), (1, ["--tower-runs"])):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launch, __file__, *options], check=True, env=environment)


if __name__ == "__main__":
    main()
