"""Prompts of every kind and groups of given completions, for tests that need no sampling."""

import torch
from made_data import read_made
from small_runs import small_recipe

from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.groups.answer_span import answer_token_span
from nemo_care.groups.group import Completion, Group
from nemo_care.models.families import read_family
from nemo_care.objective.rewards import accuracy_reward, format_reward


def make_prompts(checkpoint, world, folder):
    """Return four prompts of unequal length: a video, two videos, video then image, text only."""
    from PIL import Image

    recipe = small_recipe(checkpoint, world)
    prompt_format = read_family(checkpoint).prompt
    builder = PromptBuilder(recipe.data, prompt_format, load_tokenizer(checkpoint, prompt_format))
    image = folder / "image.png"
    Image.linear_gradient("L").resize((28, 28)).convert("RGB").save(image)
    plain = read_made(world, "train.jsonl").samples[:4]
    samples = [
        plain[0],
        Sample(
            "two",
            plain[1].question + " and so",
            plain[1].solution,
            videos=(*plain[1].videos, *plain[2].videos),
        ),
        Sample(
            "mixed", plain[2].question, plain[2].solution, videos=plain[2].videos, images=(image,)
        ),
        Sample("text", "which way does the disc move ?", "B"),
    ]
    return [builder.build(index, sample) for index, sample in enumerate(samples)]


TEXTS = [
    "<think> i see the disc . it moves up </think> <answer> {right} </answer> <|im_end|>",
    "<think> the disc moves left </think> <answer> {right} </answer> <|im_end|>",
    "<think> it goes right so it moves right </think> <answer> {wrong} </answer> <|im_end|>",
    "<think> the disc starts at the left and goes to the",
]


def make_groups(prompts, checkpoint):
    """Return right, wrong, inconsistent and unfinished completions of unequal length."""
    tokenizer = load_tokenizer(checkpoint, read_family(checkpoint).prompt)
    groups = []
    for number, prompt in enumerate(prompts):
        right = prompt.sample.solution
        wrong = next(letter for letter in "ABCD" if letter != right)
        completions, texts = [], TEXTS[number % 2 :] + TEXTS[: number % 2]
        for text in texts:
            ids = tokenizer.encode(text.format(right=right, wrong=wrong))
            completions.append(
                Completion(
                    token_ids=torch.tensor(ids),
                    log_probs=torch.zeros(len(ids)),
                    text=tokenizer.completion_text(ids),
                    ended=ids[-1] in tokenizer.eos_ids,
                    answer_span=answer_token_span(tokenizer.base, ids),
                )
            )
        texts = [completion.text for completion in completions]
        accuracy = torch.tensor([accuracy_reward("multiple choice", t, right) for t in texts])
        well_formed = torch.tensor([format_reward(text) for text in texts])
        groups.append(
            Group(
                prompt,
                completions,
                rewards={"accuracy": accuracy, "format": well_formed},
                base_reward=accuracy + well_formed,
            )
        )
    return groups
