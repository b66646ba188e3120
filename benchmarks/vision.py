"""The vision tower, forward and backward, with its frames dealt to tensor-parallel ranks and not.

    .venv/bin/python benchmarks/vision.py [--ranks 1 2 4] [--prompt 2048] [--repeats 3]

Each rank computes with one thread, so times mean something up to as many ranks as there are cores.
Time and memory (what torch's allocator gives out at the peak) are those of the rank that takes
most, the gathering of the features included; FLOPs are counted by torch while the tower runs. The
sum of the gradients over the ranks, once a step, is not in it.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from made import Size, hf_config, video_prompt
from measure import allocated_peak, seconds
from torch.utils.flop_counter import FlopCounterMode

from nemo_care.groups.batch import model_inputs
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks

_SIZE = replace(Size(), hidden=256, layers=1, vision_hidden=256, vision_depth=8)


def measured(ranks: Ranks, prompt_tokens: int, repeats: int, *, shard: bool) -> torch.Tensor:
    """Seconds, peak bytes and FLOPs, each of the rank that has most of it."""
    family = Qwen25VLFamily(hf_config(_SIZE))
    torch.manual_seed(0)
    model = family.build(family.transformer_config(ranks.layout, torch.float32)).train()
    if shard:
        model.deal_vision()
    prompt = video_prompt(family.hf, prompt_tokens)
    row = prompt.token_ids[None], prompt.position_ids[:, None], prompt.is_vision[None]
    inputs = model_inputs([prompt], *row)

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
    args = parser.parse_args()
    if "RANK" in os.environ:
        be_rank(args.prompt, args.repeats)
        return
    print(_SIZE)
    print("ranks  tower       seconds  share  peak MB  share    GFLOP  share", flush=True)
    for count in args.ranks:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        options = ["--prompt", str(args.prompt), "--repeats", str(args.repeats)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launch, __file__, *options], check=True, env=environment)


if __name__ == "__main__":
    main()
