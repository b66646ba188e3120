"""Bytes that each rank receives for the prompts of a step: objects and frames, at TP 2 x PP 2.

    .venv/bin/python benchmarks/media.py [--tensor 2] [--pipeline 2] [--tokens 2048] [--prompts 2] \
        [--freeze vision merger]

Real ranks on this machine run one step of the trainer: rollout, scoring, update. Their receiving
side of every broadcast of bytes is counted. "as patches" is what a rank would receive if prompts
travelled whole, with float32 patches, as pickled objects to all ranks of the replica.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist


def count_received(counted: Counter) -> None:
    """Count the bytes of objects and of frames that this rank gets by broadcasts from now on."""
    broadcast = dist.broadcast
    inside, counting_now = [], []

    def counting(tensor, src=None, group=None, async_op=False, group_src=None):
        source = src if src is not None else dist.get_global_rank(group, group_src)
        # torch's function calls itself by its name where a function mode is active.
        if tensor.dtype == torch.uint8 and source != dist.get_rank() and not counting_now:
            counted["objects" if inside else "frames"] += tensor.nbytes
            counted["broadcasts of frames"] += not inside
        counting_now.append(True)
        try:
            return broadcast(tensor, src, group, async_op, group_src)
        finally:
            counting_now.pop()

    objects = dist.broadcast_object_list

    def of_objects(*args, **kwargs):
        inside.append(True)
        try:
            return objects(*args, **kwargs)
        finally:
            inside.pop()

    # The list of objects goes through the function of its own module.
    dist.distributed_c10d.broadcast = dist.broadcast = counting
    dist.broadcast_object_list = of_objects


def be_rank(folder: Path, args: argparse.Namespace) -> None:
    """One step as one rank."""
    from made import Size, hf_config, video_prompt
    from step import made_trainer

    from nemo_care.data.prompts import without_frames
    from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks
    from nemo_care.training.step import Step

    ranks = Ranks(Layout(args.tensor, args.pipeline), RankEnvironment.read())
    size = (args.tokens, 8, 2)
    trainer = made_trainer(folder, ranks, size, args.prompts, shared=True, freeze=args.freeze)
    config = hf_config(Size())
    made = [video_prompt(config, args.tokens, index) for index in range(args.prompts)]
    counted: Counter = Counter()
    count_received(counted)

    class Stream:
        frame_bytes = 0

        def next_step(self):
            return ranks.from_leader(lambda: made, for_others=without_frames), []

    trainer.rollouts.prompts = Stream()
    step = Step(1)
    trainer.run_training_step(step)
    patching = trainer.policy.model.patching
    whole = len(
        pickle.dumps(
            [replace(prompt, frames=tuple(map(patching.patches, prompt.frames))) for prompt in made]
        )
    )
    held = sum(group.prompt.frame_bytes for group in step.groups)
    received = counted["objects"], counted["frames"], counted["broadcasts of frames"]
    rows = ranks.gather_on_rank_zero((*received, held))
    if ranks.rank == 0:
        print("| rank | as patches | objects | frames, rank to rank | times | frames held |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for rank, (objects, frames, times, held) in enumerate(rows):
            before = 0 if rank == 0 else whole
            print(f"| {rank} | {before:,} | {objects:,} | {frames:,} | {times} | {held:,} |")
    ranks.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt, half of them video")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--freeze", nargs="*", default=[], help="as model.freeze")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checkpoint:
        be_rank(args.checkpoint, args)
        return
    from made import Size, write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            Path(folder), Size(layers=2, hidden=128, intermediate=256, vocabulary=1024)
        )
        ranks = args.tensor * args.pipeline
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        # Threads of several ranks would take the cores from each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, __file__, *sys.argv[1:], "--checkpoint", folder], check=True, env=environment
        )


if __name__ == "__main__":
    main()
