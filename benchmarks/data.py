"""Samples per second of video decoding, alone and during training steps, by decoding processes.

    .venv/bin/python benchmarks/data.py [--workers 0 1 2] [--prompts 4] [--steps 8] [--videos 16]

Real H.264 files (426 x 240 pixels, 30 frames per second, 10 seconds, moving noise) pass through the
training stream. "alone" requests step after step; "overlapped" computes between them (matrix
products on one core, for as long as decoding a step's prompts takes without processes), so that the
best possible value is twice that without processes. "cached" requests step after step when
data.cache has all frames. All rows are measured in one run.
"""

import argparse
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch

import nemo_care
from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.frame_cache import CacheSettings
from nemo_care.data.loader import PromptLoader
from nemo_care.data.mixing import TrainingData
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.recipe.schema import Recipe

if TYPE_CHECKING:
    from nemo_care.data.stream import PromptStream

CHECKPOINT = Path(nemo_care.__file__).parent / "miniature" / "checkpoint_warm"
HEIGHT, WIDTH, RATE, SECONDS = 240, 426, 30, 10


def write_videos(folder: Path, count: int) -> list[Sample]:
    """Write `count` questions, each about its own video."""
    samples = []
    for number in range(count):
        picture = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        path = folder / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for shift in range(RATE * SECONDS):
                frame = np.ascontiguousarray(np.roll(picture, shift, axis=1))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        samples.append(Sample(str(number), "which way does it move ?", "A", videos=(path,)))
    return samples


def steps_per_second(stream: "PromptStream", steps: int, compute: float) -> tuple[float, float]:
    """Return steps per second, and the share of time spent waiting for prompts.

    `compute` is the number of matrix products between two steps.
    """
    matrix = torch.randn(512, 512)
    stream.next_step()  # the processes have started, and decode the first measured step
    waited = 0.0
    started = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        stream.next_step()
        waited += time.perf_counter() - asked
        for _ in range(int(compute)):
            matrix @ matrix
    total = time.perf_counter() - started
    return steps / total, waited / total


def products_per_second() -> float:
    """Return the rate of `steps_per_second`'s matrix products on one core."""
    matrix = torch.randn(512, 512)
    matrix @ matrix
    started = time.perf_counter()
    for _ in range(200):
        matrix @ matrix
    return 200 / (time.perf_counter() - started)


def main() -> None:
    # The decoding processes import this file, and do not need Megatron.
    from nemo_care.data.stream import PromptStream
    from nemo_care.models.families import read_family
    from nemo_care.ranks.process_groups import Layout, Ranks

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--videos", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = Ranks(Layout())
    form = read_family(CHECKPOINT).prompt
    builder = PromptBuilder(Recipe().data, form, load_tokenizer(CHECKPOINT, form))
    with tempfile.TemporaryDirectory() as folder:
        samples = write_videos(Path(folder), options.videos)

        cache = CacheSettings(Path(folder) / "cache", 2**33)

        def run(
            workers: int, compute: float, cache: CacheSettings | None = None
        ) -> tuple[float, float, float | None]:
            builder.media = replace(builder.media, cache=cache)
            with closing(DecodingWorkers(workers, seconds=60, memory_gib=8)) as pool:
                stream = PromptStream(
                    TrainingData.of(samples),
                    PromptLoader(builder, pool),
                    ranks,
                    prompts_per_step=options.prompts,
                    seed=0,
                    shuffle=True,
                    max_skipped_fraction=0.0,
                )
                return *steps_per_second(stream, options.steps, compute), pool.peak_memory_gib

        in_thread = run(0, 0)[0]
        compute = products_per_second() / in_thread
        builder.media = replace(builder.media, cache=cache)
        for number, sample in enumerate(samples):
            builder.build(number, sample)  # fills the cache
        print("workers  alone/s  overlapped/s  ratio to 0  waiting  memory of a process  cached/s")
        base = None
        for workers in options.workers:
            alone = run(workers, 0)[0] * options.prompts
            cached = run(workers, 0, cache)[0] * options.prompts
            rate, waiting, memory = run(workers, compute)
            overlapped = rate * options.prompts
            base = base or overlapped
            shown = "-" if memory is None else f"{memory:.2f} GiB"
            print(
                f"{workers:7d}  {alone:7.2f}  {overlapped:12.2f}  {overlapped / base:10.2f}"
                f"  {waiting:6.0%}  {shown:>19}  {cached:8.2f}"
            )
    ranks.close()


if __name__ == "__main__":
    main()
