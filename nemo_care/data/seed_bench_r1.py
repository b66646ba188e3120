"""SEED-Bench-R1 as published: egocentric videos, and the question what to do next.

    annotations/training_6k.jsonl, annotations/validation_L1.jsonl, ...
    videos/<video_source>/<video_basename>                 what was done so far
    images/<video_source>/<current_observation_basename>   what the wearer sees now

A record with `negative_answers` (training) gets four options in random order; one with `choice_a`
to `choice_d` and `golden_choice_idx` (validation) keeps its order. A record with an empty
`task_progress_metadata` has no video. The annotations have no task type; those of level 3 have a
`domain`, which is used instead. Other fields are ignored.
"""

import hashlib
import json

from nemo_care.data.annotations import Record
from nemo_care.data.samples import Sample

_LETTERS = ("A", "B", "C", "D")
_CHOICES = {letter: f"choice_{letter.lower()}" for letter in _LETTERS}


def parse(record: Record, seed: int) -> Sample:
    """Convert a record to a sample; raises InputError for an unusable record.

    Only `seed` and a sample's id decide which negative answers are options, and in which order:
    neither the place in the file nor the rank that reads it matters.
    """
    sample_id = record.identifier("sample_id")
    source = record.text("video_source")
    if not isinstance(record.content.get("task_progress_metadata"), list):
        raise record.error('"task_progress_metadata" must be a list, empty where there is no video')
    videos = []
    if record.content["task_progress_metadata"]:
        videos = [record.media(f"videos/{source}/{record.text('video_basename')}", "video")]
    observation = record.text("current_observation_basename")
    question = record.text("question")
    if any(record.has(key) for key in ("golden_choice_idx", *_CHOICES.values())):
        options = {letter: record.text(key) for letter, key in _CHOICES.items()}
        solution = record.solution("golden_choice_idx", "multiple choice", options)
    elif record.has("negative_answers"):
        options, solution = _shuffled_options(record, sample_id, seed)
    else:
        raise record.error('neither "negative_answers" (training) nor "choice_a" ... (validation)')
    return Sample(
        sample_id=sample_id,
        question=question,
        solution=solution,
        videos=tuple(videos),
        images=(record.media(f"images/{source}/{observation}", "image"),),
        options=options,
        task_type=record.text("task_type" if record.has("task_type") else "domain", default=""),
    )


def _shuffled_options(record: Record, sample_id: str, seed: int) -> tuple[dict[str, str], str]:
    """Return options by letter, and the letter of the answer."""
    answer = record.text("answer")
    # Each once, in file order. The answer among its negatives would make two options right.
    negatives = [text for text in dict.fromkeys(record.texts("negative_answers")) if text != answer]
    wanted = len(_LETTERS) - 1
    if len(negatives) < wanted:
        raise record.error(
            f'"negative_answers" has {len(negatives)} different wrong answers, {wanted} are needed'
        )
    chosen = _in_random_order(negatives, seed, sample_id, "negatives")[:wanted]
    texts = _in_random_order([answer, *chosen], seed, sample_id, "options")
    return dict(zip(_LETTERS, texts, strict=True)), _LETTERS[texts.index(answer)]


def _in_random_order(texts: list[str], *key: str | int) -> list[str]:
    """Return an order decided by the key; hashed, so that no library version can change it."""
    return sorted(
        texts, key=lambda text: hashlib.sha256(json.dumps([*key, text]).encode()).digest()
    )
