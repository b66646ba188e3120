"""Compare the fused scoring pass with the naive one, on one model in one process.

    .venv/bin/python benchmarks/scoring.py [--sizes 512,64,8 2048,256,8 8192,256,8] [--threads 2]

naive     as in the released code and in general RL frameworks: G padded sequences [prompt |
          completion], the video's pixel values G times, logits of every position, and a log-softmax
          over the whole vocabulary, row by row
separate  also G sequences, but the output layer on the answers' tokens only
fused     `Scorer.answer_likelihoods` as training runs it: video and prompt once per group

All give the same likelihoods, which is checked. The ideal ratios to the fused pass are computed
from FLOPs, attention, vision tower and output layer included.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from made import Size, given_group, hf_config, lengths, video_prompt, write_checkpoint
from measure import answer_rows, peak_memory, seconds

from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.groups.separate import separate_sequences
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.models.transformer_config import transformer_config
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.models.weights import load_hf_weights
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.planning.work import group_flops
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.scoring.scorer import Scorer


@torch.no_grad()
def naive_likelihoods(model: VideoLanguageModel, group: Group) -> torch.Tensor:
    """Compute answer likelihoods [G], with everything computed for every completion."""
    batch = separate_sequences([group], pad_id=0, multiple=1)
    logits = model.logits(model(batch.rows.inputs(model)))
    rows = []
    for row, ids in zip(logits, batch.rows.token_ids, strict=True):
        log_probs = torch.log_softmax(row[:-1, : model.vocab_size].float(), dim=-1)
        rows.append(log_probs.gather(-1, ids[1:, None])[:, 0])
    log_probs = torch.stack(rows)[:, group.prompt.length - 1 :]
    return answer_likelihood(log_probs, batch.answer_mask).cpu()


def likelihoods_of(scorer: Scorer, group: Group) -> torch.Tensor:
    """Compute answer likelihoods [G] by training's pass."""
    return scorer.answer_likelihoods([group])[0]


def work(size: Size, prompt: int, completion: int, group_size: int, name: str) -> float:
    """Return the FLOPs of one of the passes."""
    rows = group_size * (prompt + completion) if name == "naive" else answer_rows(group_size)
    return group_flops(
        Qwen25VLFamily(hf_config(size)),
        lengths(prompt, completion),
        group_size,
        shared=name == "fused",
        rows=rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["512,64,8", "2048,256,8", "8192,256,8"], metavar="P,C,G"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    ranks = Ranks(Layout(), cpu_threads=args.threads)
    size = Size()
    config = hf_config(size)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), size)
        family = Qwen25VLFamily(config)
        model = family.build(transformer_config(family, Layout(), torch.float32)).eval()
        load_hf_weights(model, folder)
    fused, separate = (
        Scorer(model, ranks, BatchLayout.of(Layout(), 1, pad_id=0, shared_prompt=shared))
        for shared in (True, False)
    )
    print(f"{size}, {args.threads} threads")
    print(f"{'P':>5}{'C':>5}{'G':>3}  pass      seconds  ratio  ideal  share   peak MB   share")
    for text in args.sizes:
        prompt, completion, count = map(int, text.split(","))
        group = given_group(video_prompt(config, prompt), completion, count, size.vocabulary)
        passes: dict[str, Callable[[], torch.Tensor]] = {
            "fused": partial(likelihoods_of, fused, group),
            "separate": partial(likelihoods_of, separate, group),
            "naive": partial(naive_likelihoods, model, group),
        }
        flops = {name: work(size, prompt, completion, count, name) for name in passes}
        measured = {}
        for name, run in passes.items():
            memory, likelihoods = peak_memory(run)
            measured[name] = (seconds(run, args.repeats), memory, likelihoods)
        best, least, wanted = measured["fused"]
        for name, (duration, memory, likelihoods) in measured.items():
            torch.testing.assert_close(likelihoods, wanted, atol=1e-6, rtol=1e-3)
            ratio, ideal = duration / best, flops[name] / flops["fused"]
            print(
                f"{prompt:>5}{completion:>5}{count:>3}  {name:<8}{duration:>9.3f}{ratio:>7.2f}"
                f"{ideal:>7.2f}{ratio / ideal:>7.2f}{memory / 2**20:>10.0f}{least / memory:>8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
