"""Files of groups: a step's rollouts with all values computed for them, without their media.

NAME.safetensors    `groups.N.KEY`: prompt_token_ids [P]; [G] each base_reward, consistency_bonus,
                    reward, advantage, rewards.NAME and answer_likelihood, where known;
                    `completions.M.KEY`, [C] each: token_ids, log_probs (the rollout's),
                    reference_log_probs (NaN where not scored) and policy_log_probs
                    (those of the update), where known; prompt_routing [P, layers, top_k] and
                    `completions.M.routing` [C, layers, top_k], where recorded
NAME.json           prompt_index, sample_id and, of each completion, text, ended, answer_span
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_care.data.prompts import Prompt
from nemo_care.errors import InputError
from nemo_care.files.json_lines import Kinds, check_record, read_object, replace_file
from nemo_care.files.tensors import load_tensors, save_tensors
from nemo_care.groups.group import Completion, Group, known

_PER_TOKEN = ("token_ids", "log_probs")
_REMEDY = "restore it from a copy; without it this step can't be replayed"
_ABOUT: Kinds = {
    "step": int,
    "update": int,
    "optimizer_steps": int,
    "not_finite": list[dict],
    "groups": list[dict],
}
_NOT_FINITE: Kinds = {"what": str, "first_rank": int | None, "replica": int | None}
_GROUP: Kinds = {"prompt_index": int, "sample_id": str, "completions": list[dict]}
_COMPLETION: Kinds = {
    "text": str,
    "ended": bool,
    "answer_span": list[int] | None,
    "not_finite": list[str],
}
_PER_COMPLETION = ("base_reward", "consistency_bonus", "reward", "advantage")


@dataclass
class StoredGroup:
    """The stored form of a group: `record` is plain JSON, `tensors` have names within the group."""

    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, group: Group, policy_log_probs: Sequence[torch.Tensor] | None) -> "StoredGroup":
        """Return a group's; `policy_log_probs` are the update's, one [C] per completion."""
        tensors = {
            "prompt_token_ids": group.prompt.token_ids,
            **{name: known(getattr(group, name)) for name in _PER_COMPLETION},
            **{f"rewards.{name}": values for name, values in known(group.rewards).items()},
            "answer_likelihood": group.answer_likelihood,
            "prompt_routing": group.prompt_routing,
        }
        per_completion = {
            **{key: [getattr(c, key) for c in group.completions] for key in _PER_TOKEN},
            "routing": [completion.routing for completion in group.completions],
            "reference_log_probs": group.reference_log_probs or (),
            "policy_log_probs": policy_log_probs or (),
        }
        for key, vectors in per_completion.items():
            for number, values in enumerate(vectors):
                tensors[f"completions.{number}.{key}"] = values
        record = {
            "prompt_index": group.prompt.index,
            "sample_id": group.prompt.sample.sample_id,
            "completions": [
                {"text": c.text, "ended": c.ended, "answer_span": c.answer_span}
                for c in group.completions
            ],
        }
        # Copies, because tensors that share memory can't be written to one file.
        return cls(record, {key: t.detach().clone() for key, t in tensors.items() if t is not None})

    @property
    def prompt_index(self) -> int:
        """The index of its prompt in the training stream."""
        return self.record["prompt_index"]

    def group(self, prompt: Prompt) -> Group:
        """Rebuild the group, with its prompt given."""
        tensors = self.tensors
        count = len(self.record["completions"])
        completions = [
            Completion(
                token_ids=tensors[f"completions.{number}.token_ids"],
                log_probs=tensors[f"completions.{number}.log_probs"],
                text=completion["text"],
                ended=completion["ended"],
                answer_span=tuple(completion["answer_span"]) if completion["answer_span"] else None,
                routing=tensors.get(f"completions.{number}.routing"),
            )
            for number, completion in enumerate(self.record["completions"])
        ]
        scored = [tensors.get(f"completions.{n}.reference_log_probs") for n in range(count)]
        all_scored = [values for values in scored if values is not None]
        vectors: dict[str, Any] = {name: tensors[name] for name in _PER_COMPLETION}
        return Group(
            prompt,
            completions,
            prompt_routing=tensors.get("prompt_routing"),
            rewards=_inside("rewards.", tensors),
            answer_likelihood=tensors.get("answer_likelihood"),
            reference_log_probs=all_scored if len(all_scored) == count else None,
            **vectors,
        )


def write_groups(file: Path, groups: Sequence[StoredGroup], about: Mapping[str, Any]) -> None:
    """Write groups to `file` and the .safetensors next to it; `about` precedes them.

    The .json is written last: if it exists, both files are complete.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"groups.{number}.{key}": tensor.contiguous()
        for number, group in enumerate(groups)
        for key, tensor in group.tensors.items()
    }
    target = file.with_suffix(".safetensors")
    partial = target.with_name(target.name + ".partial")
    save_tensors(partial, tensors)
    os.replace(partial, target)
    record = {**about, "groups": [group.record for group in groups]}
    replace_file(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_groups(file: Path) -> tuple[dict[str, Any], list[StoredGroup]]:
    """Read the output of `write_groups`: `about`, and the groups.

    Raises:
        InputError: a file is missing or damaged.
    """
    target = file.with_suffix(".safetensors")
    for needed in (file, target):
        if not needed.is_file():
            raise InputError(f"{needed}: no such file; {_REMEDY}")
    about = read_object(file, remedy=_REMEDY, required=_ABOUT)
    for item in about["not_finite"]:
        check_record(f"{file}: not_finite", item, _NOT_FINITE, remedy=_REMEDY)
    tensors = load_tensors(target, remedy=_REMEDY)
    groups = []
    for number, record in enumerate(about.pop("groups")):
        prefix = f"groups.{number}."
        check_record(f"{file}: group {number}", record, _GROUP, remedy=_REMEDY)
        for place, completion in enumerate(record["completions"]):
            where = f"{file}: completion {place} of group {number}"
            check_record(where, completion, _COMPLETION, remedy=_REMEDY)
        own = _inside(prefix, tensors)
        missing = [key for key in _needed_tensors(len(record["completions"])) if key not in own]
        if missing:
            raise InputError(f"{target}: {prefix}{missing[0]} is missing; {_REMEDY}")
        groups.append(StoredGroup(record, own))
    return about, groups


def _inside(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with `prefix`, which is removed."""
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _needed_tensors(completions: int) -> list[str]:
    """Return the names of the tensors that every group has."""
    own = [f"completions.{n}.{key}" for n in range(completions) for key in _PER_TOKEN]
    return ["prompt_token_ids", *_PER_COMPLETION, *own]


def restore_groups(
    stored: Sequence[StoredGroup], prompt_of: Callable[[int], Prompt]
) -> list[Group]:
    """Return the groups, with the prompts that `prompt_of` creates from their indices.

    Raises:
        InputError: a prompt differs from the stored one, because data or recipe have changed.
    """
    groups = []
    for item in stored:
        prompt = prompt_of(item.prompt_index)
        if not torch.equal(prompt.token_ids, item.tensors["prompt_token_ids"]):
            raise InputError(
                f"prompt {item.prompt_index} was made of sample {item.record['sample_id']} and is "
                f"different now (sample {prompt.sample.sample_id}): data, tokenizer or recipe "
                "have changed since the step was stored"
            )
        groups.append(item.group(prompt))
    return groups
