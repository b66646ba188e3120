"""The files of an artificial run, with texts that must not be executed by a page."""

import json
import math
from pathlib import Path

ATTACK = '<script>alert("x")</script> & <img src=http://evil.example/a.png>'
METRICS = (
    "reward/accuracy",
    "reward/format",
    "reward/total",
    "care/answer_likelihood",
    "care/bonus_rate",
    "care/clipped_rate",
    "care/missing_answer_rate",
    "care/ema_distance",
    "rollout/completion_tokens",
    "rollout/ended_rate",
    "rollout/groups_all_right",
    "rollout/groups_all_wrong",
    "rollout/groups_without_signal",
    "rollout/consistency_rate",
    "rollout/logprob_difference",
    "train/loss",
    "train/kl",
    "train/grad_norm",
    "train/lr",
    "timing/rollout",
    "timing/reward",
    "timing/scoring",
    "timing/update",
)


def levels(accuracy, consistency=0.7, probe=None):
    level = {
        "accuracy": accuracy,
        "consistency_rate": consistency,
        "format_rate": 1.0,
        "count": 256,
        "reasoning_words": 5.5,
    }
    if probe is not None:
        level |= {"probe_implied": probe, "probe_true": 0.2}
    return {"L1": level, "L2": {**level, "consistency_rate": None}, "L3": dict(level)}


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def metric(step):
    values = {key: abs(math.sin(step * (place + 1))) for place, key in enumerate(METRICS)}
    return {"step": step, **values, "timing/step": 5.0}


def completion(prompt, place, reward, text="<think> it moves up </think> <answer> B </answer>"):
    return {
        "prompt_id": f"sample-{prompt}",
        "prompt_index": prompt,
        "completion_index": place,
        "completion": text,
        "tokens": 9,
        "ended": place == 0,
        "has_answer": place == 0,
        "accuracy": 1.0,
        "format": 1.0,
        "answer_likelihood": 0.8 if place == 0 else None,
        "bonus": 0.5,
        "reward": reward,
        "advantage": 0.1,
    }


def make_run(folder: Path, steps=12, finished=True, every=5) -> Path:
    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(as_lines(metric(step) for step in range(1, steps + 1)))
    validated = [0, *range(every, steps + 1, every)]
    (folder / "validation.jsonl").write_text(
        as_lines({"step": s, "levels": levels(0.4 + s / 50, probe=0.7)} for s in validated)
    )
    for step in (1, steps):
        (folder / f"rollouts/step_{step:06d}.jsonl").write_text(
            as_lines(
                [
                    completion(0, 0, 2.5, ATTACK),
                    completion(0, 1, 0.0, "cut off \u2028 here"),
                    completion(1, 0, 1.0),
                    completion(1, 1, 1.0),
                ]
            )
        )
    (folder / "skipped.jsonl").write_text(
        as_lines([{"index": 3, "sample_id": "<b>bad</b>", "reason": "no such file"}])
    )
    (folder / "recipe.yaml").write_text(
        "model: {hf_path: tiny}\ntrainer: {max_steps: 12, seed: 7}\n"
        "data: {train: {kind: miniature}}\n"
    )
    if finished:
        summary = {
            "steps": steps,
            "wall_seconds": 75.2,
            "export": None,
            "skipped": 1,
            "start": levels(0.4, probe=0.7),
            "end": levels(0.9, 0.95, probe=0.1),
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
