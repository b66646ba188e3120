"""Run directories with made completions, for what reads them back."""

import json
import random
from pathlib import Path

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
ATTACK = (
    "<script>document.title = 'owned'</script> <img src=x onerror=alert(1)> [bold]not bold[/bold] "
    f"{ESCAPE} \u202egpj.exe\u202c שלום עולם مرحبا"
)
WORDS = "the disc starts at the left edge and moves up past the red square before it stops there"


def row(prompt: int, place: int, rng: random.Random, *, tokens: bool = False, **changes) -> dict:
    """A completion as a run records it."""
    letter = rng.choice("ABCD")
    right = letter == "B"
    reasoning = " ".join(rng.choices(WORDS.split(), k=rng.randint(20, 160)))
    ended = rng.random() > 0.1
    text = (
        f"<think> {reasoning} </think> <answer>{letter}</answer>"
        if ended
        else f"<think> {reasoning}"
    )
    made = {
        "prompt_id": f"clip-{prompt}",
        "prompt_index": prompt,
        "completion_index": place,
        "completion": text,
        "prompt_tokens": 412,
        "tokens": len(text.split()) + 1,
        "ended": ended,
        "has_answer": ended,
        "unscored": False,
        "consistent": rng.random() > 0.3 if ended else None,
        "accuracy": float(right and ended),
        "format": float(ended),
        "reward/brevity": round(rng.random(), 2),
        "answer_likelihood": round(rng.uniform(0.2, 0.95), 3) if ended else None,
        "bonus": 0.5 if right and ended and rng.random() > 0.5 else 0.0,
        "question": f"Where does disc {prompt} go next?",
        "options": {"A": "to the left", "B": "up", "C": "it stays", "D": "to the right"},
        "solution": "B",
        "problem_type": "multiple choice",
        "videos": [],
        "images": [],
        "frame_times": [],
    }
    made["reward"] = made["accuracy"] + made["format"] + made["bonus"]
    made["advantage"] = round(made["reward"] - 1.2, 3)
    made |= changes
    if tokens:
        pieces = [word + " " for word in made["completion"].split(" ")]
        pieces[-1] = pieces[-1][:-1]
        made["token_texts"] = [*pieces, "<|im_end|>"]
        made["log_probs"] = [-round(rng.expovariate(1.5), 4) for _ in made["token_texts"]]
    return made


def make_rollouts(
    folder: Path, steps: dict[int, list[dict]], *, recipe: str = "evaluation: {judge: rule}\n"
) -> Path:
    """A run directory with these rows."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    records = [json.dumps({"step": step, "reward/accuracy": 0.5}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(records) + "\n")
    for step, rows in steps.items():
        file = folder / f"rollouts/step_{step:06d}.jsonl"
        file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    return folder


def groups(seed: int, prompts, size: int = 4, **changes) -> list[dict]:
    """Rows of groups of `size` completions."""
    rng = random.Random(seed)
    return [row(prompt, place, rng, **changes) for prompt in prompts for place in range(size)]
