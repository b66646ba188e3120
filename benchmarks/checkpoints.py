"""Measure how long saving blocks training, asynchronously and synchronously, in one process.

    .venv/bin/python benchmarks/checkpoints.py [--hidden 768] [--saves 3] [--threads 1]

The trainer's own save of a random Qwen2.5-VL with about 100 M parameters: weights, AdamW's state
and the reference. "held up" is the time in which no step runs: for the copy of the state; with
checkpoint.asynchronous=false also for writing; for index, manifest and names. While a checkpoint is
written asynchronously, steps of matrix products are computed: "a step meanwhile" is the ratio of
their time to that without saving. Both kinds of saving are measured alternately.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from made import Size, given_group, hf_config, video_prompt, write_checkpoint
from step import made_trainer

from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.training.step import Step
from nemo_care.training.trainer import GRPOCareTrainer


def seconds_of_a_step() -> float:
    """Run a substitute for a step: matrix products of about half a second."""
    matrix = torch.randn(1024, 1024)
    started = time.perf_counter()
    for _ in range(20):
        matrix @ matrix
    return time.perf_counter() - started


def save_and_train_on(trainer: GRPOCareTrainer, *, asynchronous: bool) -> tuple[float, float, list]:
    """Return seconds blocked, seconds until the checkpoint is complete, seconds of steps
    meanwhile."""
    trainer.recipe.checkpoint.asynchronous = asynchronous
    checkpoints = trainer.checkpoints
    checkpoints.take_seconds()
    trainer.step += 1
    started = time.perf_counter()
    trainer.save()
    steps = []
    while checkpoints.is_under_way:
        steps.append(seconds_of_a_step())
        checkpoints.complete_if_written()
    return checkpoints.take_seconds(), time.perf_counter() - started, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ranks = Ranks(Layout(), cpu_threads=options.threads)
    size = Size(hidden=options.hidden, intermediate=3 * options.hidden, heads=options.hidden // 64)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), size)
        trainer = made_trainer(Path(folder), ranks, (256, 16, 2), 1, shared=True)
        trainer.recipe.checkpoint.keep_last = 1
        trainer.prompts.position = 0
        # AdamW has a state after its first step.
        group = given_group(video_prompt(hf_config(size), 256), 16, 2, size.vocabulary)
        group.advantage = torch.tensor([1.0, -1.0])
        trainer.policy.update(Step(0, trained=[group]))
        parameters = sum(p.numel() for p in trainer.policy.model.parameters())
        alone = statistics.median(seconds_of_a_step() for _ in range(10))
        rows: dict[str, list] = {"asynchronous": [], "synchronous": []}
        for _ in range(options.saves):
            for kind, found in rows.items():
                found.append(save_and_train_on(trainer, asynchronous=kind == "asynchronous"))
        written = sum(file.stat().st_size for file in trainer.files.checkpoints.glob("step_*/*"))
    print(f"{parameters / 1e6:.0f} M parameters, {written / 1e9:.2f} GB a checkpoint")
    print("saving        held up  until complete  a step meanwhile")
    for kind, found in rows.items():
        held, complete = (statistics.median(row[n] for row in found) for n in (0, 1))
        steps = [seconds / alone for row in found for seconds in row[2]]
        meanwhile = f"{statistics.median(steps):.2f}" if steps else "-"
        print(f"{kind:12s}  {held:5.2f} s  {complete:12.2f} s  {meanwhile:>16s}")
    stalls = [statistics.median(row[0] for row in found) for found in rows.values()]
    print(f"ratio         {stalls[1] / stalls[0]:6.1f}")
    ranks.close()


if __name__ == "__main__":
    main()
