"""A tiny Qwen2.5-VL with the real vocabulary that writes well-formed completions."""

from itertools import product
from pathlib import Path

import torch
from golden import vision_inputs
from made_data import read_made
from qwen_vocabulary import ROWS, SPECIAL, qwen_tokenizer
from small_runs import small_recipe
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.miniature.vocabulary import DIRECTIONS, LETTERS
from nemo_care.models.families import read_family
from nemo_care.recipe.schema import Recipe
from tiny_model import tiny_config

COMPLETIONS = [
    f"<think>the shape moves {direction}</think>\n<answer>{letter}</answer><|im_end|>"
    for direction, letter in product(DIRECTIONS, LETTERS)
]
"""The completions that the model is trained on, equally often."""
STEPS = 60


def write_qwen_checkpoint(folder: Path, world: Path, *, steps: int = STEPS) -> None:
    """Write a random model of 19.6 M parameters, mostly the vocabulary's rows, after `steps` steps
    of supervised training on `COMPLETIONS`."""
    config = tiny_config()
    text = config.text_config
    text.vocab_size, text.max_position_embeddings = ROWS, 1024
    text.bos_token_id = text.pad_token_id = SPECIAL["<|endoftext|>"]
    text.eos_token_id = SPECIAL["<|im_end|>"]
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", SPECIAL[f"<|{name}_pad|>"])
    config.vision_start_token_id = SPECIAL["<|vision_start|>"]
    config.vision_end_token_id = SPECIAL["<|vision_end|>"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = GenerationConfig(
        eos_token_id=[text.eos_token_id, text.pad_token_id], pad_token_id=text.pad_token_id
    )
    config.save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    _teach(model, qwen_recipe(folder, world), world, steps)
    model.save_pretrained(folder)


def qwen_recipe(folder: Path, world: Path) -> Recipe:
    """Return a recipe with room for the prompts and completions of this vocabulary."""
    recipe = small_recipe(folder, world)
    recipe.rollout.max_completion_tokens = 32
    return recipe


def _teach(model, recipe: Recipe, world: Path, steps: int) -> None:
    prompt_format = read_family(recipe.model.hf_path).prompt
    tokenizer = load_tokenizer(recipe.model.hf_path, prompt_format)
    builder = PromptBuilder(recipe.data, prompt_format, tokenizer)
    prompts = [
        builder.build(index, sample)
        for index, sample in enumerate(read_made(world, "train.jsonl").samples[:4])
    ]
    targets = torch.tensor([tokenizer.encode(text) for text in COMPLETIONS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0, fused=True)
    order = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        prompt = prompts[step % len(prompts)]
        chosen = targets[torch.randperm(len(targets), generator=order)[:4]]
        count, length = chosen.shape
        ids = torch.cat([prompt.token_ids.expand(count, -1), chosen], dim=1)
        positions = torch.cat([prompt.position_ids, prompt.continued_positions(length)], dim=1)
        vision = {
            name: torch.cat([value] * count) for name, value in vision_inputs(model, prompt).items()
        }
        logits = model(
            input_ids=ids,
            position_ids=positions[:, None].expand(-1, count, -1),
            logits_to_keep=length + 1,
            **vision,
        ).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
