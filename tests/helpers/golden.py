"""One complete GRPO-CARE step in plain Hugging Face and torch: the oracle of the layout tests.

One sequence per completion, formulas written out from the specification, nothing imported from
the package but the prompts' tokens, positions and patches.
"""

import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from nemo_care.groups.group import Group
from nemo_care.models.families import FAMILIES


@dataclass
class GoldenStep:
    """All tensors under Hugging Face's names."""

    answer_likelihood: list[list[float]]
    bonus: list[list[float]]
    advantage: list[list[float]]
    loss: float
    grad_norm: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]


def hf_model(path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def parameters_on_disk(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters under the names that they have in a checkpoint of the hub."""
    if model.config.model_type != "qwen2_5_vl":
        return dict(model.named_parameters())
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): p
        for name, p in model.named_parameters()
    }


def vision_inputs(model, prompt) -> dict:
    if prompt.grid_thw is None:
        return {}
    is_image = [
        bool(seconds)
        for seconds in [False] * len(prompt.sample.videos) + [True] * len(prompt.sample.images)
    ]
    patching = FAMILIES[model.config.model_type](model.config).prompt.patching
    parts = [patching.patches(frames) for frames in prompt.frames]
    inputs = {}
    for images, pixels, grid in (
        (False, "pixel_values_videos", "video_grid_thw"),
        (True, "pixel_values", "image_grid_thw"),
    ):
        chosen = [place for place, image in enumerate(is_image) if image is images]
        if chosen:
            inputs[pixels] = torch.cat([parts[place] for place in chosen])
            inputs[grid] = prompt.grid_thw[chosen]
    return inputs


def log_probs(model, prompt, completion) -> torch.Tensor:
    """Return log-probabilities [C] of a completion's tokens."""
    ids = torch.cat([prompt.token_ids, completion.token_ids])
    positions = torch.cat(
        [prompt.position_ids, prompt.continued_positions(completion.length)], dim=1
    )
    logits = model(
        input_ids=ids[None], position_ids=positions[:, None], **vision_inputs(model, prompt)
    ).logits[0]
    predicted = torch.log_softmax(logits[prompt.length - 1 : -1], dim=-1)
    return predicted.gather(1, completion.token_ids[:, None])[:, 0]


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, by its name on disk."""
    if "visual." not in name:
        return "language"
    return "merger" if "merger" in name else "vision"


def golden_step(path, groups: list[Group], recipe) -> GoldenStep:
    """Compute a step from the weights in `path`, with reference = policy, for groups that have
    tokens, answer spans, accuracy and format.

    Frozen parts have no gradients."""
    model, algorithm, optimizer = hf_model(path), recipe.algorithm, recipe.optimizer
    for name, parameter in parameters_on_disk(model).items():
        parameter.requires_grad_(part_of(name) not in recipe.model.freeze)
    start = {name: p.detach().clone() for name, p in parameters_on_disk(model).items()}
    likelihoods, bonuses, advantages = [], [], []
    for group in groups:
        accuracy, p = group.accuracy.tolist(), []
        for completion in group.completions:
            if completion.answer_span is None:
                p.append(math.nan)
                continue
            with torch.no_grad():
                chosen = log_probs(model, group.prompt, completion)[slice(*completion.answer_span)]
            p.append(min(math.exp(chosen.mean().item()), algorithm.consistency.likelihood_clip))
        mean = sum(accuracy) / len(accuracy)
        selected = [
            i
            for i, a in enumerate(accuracy)
            if a > algorithm.consistency.accuracy_threshold and a >= mean and not math.isnan(p[i])
        ]
        bonus = [0.0] * len(accuracy)
        if selected:
            m = sum(p[i] for i in selected) / len(selected)
            for i in selected:
                if p[i] >= m - algorithm.consistency.margin:
                    bonus[i] = algorithm.consistency.bonus_coefficient * accuracy[i]
        rewards = [
            a + f + b
            for a, f, b in zip(accuracy, group.rewards["format"].tolist(), bonus, strict=True)
        ]
        center = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - center) ** 2 for r in rewards) / (len(rewards) - 1))
        advantages.append([(r - center) / (std + 1e-4) for r in rewards])
        likelihoods.append(p)
        bonuses.append(bonus)

    total = sum(len(group.completions) for group in groups)
    loss_value = 0.0
    for group, advantage in zip(groups, advantages, strict=True):
        for completion, a in zip(group.completions, advantage, strict=True):
            logp = log_probs(model, group.prompt, completion)
            loss = (-a * torch.exp(logp - logp.detach())).mean() / total
            if loss.requires_grad:
                loss.backward()
            loss_value += loss.item()
    gradients = {n: p.grad.clone() for n, p in parameters_on_disk(model).items() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad).item()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    ).step()
    decay = algorithm.reference.ema_decay
    weights = {n: p.detach().clone() for n, p in parameters_on_disk(model).items()}
    average = {n: decay * p + (1 - decay) * weights[n] for n, p in start.items()}
    return GoldenStep(
        likelihoods, bonuses, advantages, loss_value, norm, gradients, weights, average
    )
