"""Every parallel layout computes what one process computes, and that is what the paper says.

The oracle is plain Hugging Face and torch (golden.py). Each layout really starts its ranks.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from golden import golden_step, hf_model
from layout_program import LAYOUTS
from made_groups import make_groups, make_prompts
from safetensors.torch import load_file
from small_runs import small_recipe, small_trainer

from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.models.families import read_family
from nemo_care.models.video_language_model import ModelInputs

pytestmark = pytest.mark.numeric

PROGRAM = Path(__file__).parents[1] / "helpers/layout_program.py"


@pytest.fixture(scope="module")
def job(rank_server, checkpoint, world, tmp_path_factory):
    return run_alone(rank_server, checkpoint, world, tmp_path_factory.mktemp("layouts"))


def run_alone(rank_server, checkpoint, world, folder, *, parity_only=False):
    """The folder and contents of the job, and its results of one process: the other layouts are
    compared with it, and resume the run it begins."""
    prompts = make_prompts(checkpoint, world, folder)
    # Two rows of equal length for the comparison of logits.
    video = prompts[0]
    rows = torch.stack([video.token_ids, video.token_ids.clone()])
    rows[1, -6:-3] = rows[1, -5:-2].clone()
    inputs = ModelInputs(
        token_ids=rows,
        position_ids=torch.stack([video.position_ids] * 2, dim=1),
        pixel_values=torch.cat([video.pixel_values, video.pixel_values.flip(0)]),
        grid_thw=torch.cat([video.grid_thw] * 2),
        is_vision=torch.stack([video.is_vision] * 2),
    )
    contents = {
        "checkpoint": checkpoint,
        "world": world,
        "prompts": prompts,
        "groups": make_groups(prompts, checkpoint),
        "inputs": inputs,
        "parity_only": parity_only,
    }
    torch.save(contents, folder / "job.pt")
    rank_server.run(1, [str(PROGRAM), str(folder), "tp1"])
    return folder, contents


@pytest.fixture(scope="module")
def golden(job, checkpoint, world):
    _, contents = job
    return golden_step(checkpoint, contents["groups"], small_recipe(checkpoint, world))


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(rank_server, request, job):
    return run_layout(rank_server, request.param, job[0])


def run_layout(rank_server, name, folder):
    """Name and results of one layout."""
    if name != "tp1":
        size = LAYOUTS[name]
        count = max(2, size.tensor * size.pipeline)
        rank_server.run(count, [str(PROGRAM), str(folder), name])
    return name, torch.load(folder / f"{name}.pt", weights_only=False), folder


def assert_close(ours: dict, wanted: dict, *, absolute: float, what: str) -> None:
    assert set(ours) == set(wanted)
    for name, tensor in wanted.items():
        difference = (ours[name] - tensor).abs().max().item()
        assert difference <= absolute, f"{what} of {name} differs by {difference}"


def test_logits_equal_hugging_face(layout, job, checkpoint):
    _, result, _ = layout
    inputs = job[1]["inputs"]
    with torch.no_grad():
        wanted = hf_model(checkpoint)(
            input_ids=inputs.token_ids,
            position_ids=inputs.position_ids,
            pixel_values_videos=inputs.pixel_values,
            video_grid_thw=inputs.grid_thw,
        ).logits
    ours = result["logits"][..., : wanted.shape[-1]]
    assert (ours - wanted).abs().max() <= 1e-4


def test_greedy_tokens_equal_hugging_face_given_the_same_positions(layout, job, checkpoint):
    """Step by step without a cache: `generate` would compute positions of its own."""
    _, result, _ = layout
    model = hf_model(checkpoint)
    eos = load_tokenizer(checkpoint, read_family(checkpoint).prompt).eos_ids
    from golden import vision_inputs

    for prompt, completions in zip(job[1]["prompts"], result["greedy"], strict=True):
        ids, wanted = prompt.token_ids, []
        while len(wanted) < 16 and not (wanted and wanted[-1] in eos):
            positions = torch.cat(
                [prompt.position_ids, prompt.continued_positions(len(wanted))], dim=1
            )
            with torch.no_grad():
                logits = model(
                    input_ids=ids[None],
                    position_ids=positions[:, None],
                    **vision_inputs(model, prompt),
                ).logits
            wanted.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor(wanted[-1:])])
        assert completions == [wanted, wanted]


def test_sampled_tokens_are_the_same_in_every_layout(layout, job):
    name, result, folder = layout
    base = torch.load(folder / "tp1.pt", weights_only=False)["sampled"]
    assert result["sampled"] == base, name
    # Two completions of a prompt are samples of their own.
    assert any(first != second for first, second in base)


def test_export_is_bit_equal_to_the_original(layout, checkpoint):
    name, _, folder = layout
    wanted = load_file(checkpoint / "model.safetensors")
    ours: dict = {}
    for file in (folder / f"{name}-export").glob("*.safetensors"):
        ours.update(load_file(file))
    assert set(ours) == set(wanted)
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_exported_directory_loads_in_transformers(layout, checkpoint):
    name, _, folder = layout
    ours = hf_model(folder / f"{name}-export").state_dict()
    wanted = hf_model(checkpoint).state_dict()
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_whole_step_equals_plain_torch(layout, golden):
    _, result, _ = layout
    ours = result["golden"]
    for row, p, bonus, advantage in zip(
        ours["rows"], golden.answer_likelihood, golden.bonus, golden.advantage, strict=True
    ):
        assert row[0] == pytest.approx(p, abs=1e-5, nan_ok=True)
        assert row[1] == pytest.approx(bonus, abs=1e-6)
        assert row[2] == pytest.approx(advantage, abs=1e-4)
    assert ours["loss"] == pytest.approx(golden.loss, abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(golden.grad_norm, rel=1e-4)
    assert_close(ours["gradients"], golden.gradients, absolute=1e-5, what="gradient")
    # AdamW's first step is lr * sign(gradient): where a gradient is rounding noise around zero
    # (the key biases' are, exactly), its sign is too, and eps decides. Compare the others.
    lr = 1e-3
    for key, tensor in golden.weights.items():
        solid = golden.gradients[key].abs() > 1e-6
        difference = (ours["weights"][key] - tensor).abs()
        if solid.any():
            assert difference[solid].max() <= 2e-5, key
        assert difference.max() <= 2.1 * lr, key
        average = (ours["average"][key] - golden.average[key]).abs()
        if solid.any():
            assert average[solid].max() <= 2e-6, key


def test_golden_step_exercises_every_mechanism(golden):
    """The comparison means something only if bonuses, missing answers and signals are there."""
    assert any(math.isnan(p) for group in golden.answer_likelihood for p in group)
    bonuses = [bonus for group in golden.bonus for bonus in group]
    assert 0 < sum(bonus > 0 for bonus in bonuses) < len(bonuses)
    assert golden.grad_norm > small_recipe(Path(), Path()).optimizer.clip_grad
    assert all(
        gradient.abs().max() > 0
        for name, gradient in golden.gradients.items()
        if not name.endswith("k_proj.bias")
    )


def test_step_with_a_kl_term_is_the_same_in_every_layout(layout):
    _, result, folder = layout
    base = torch.load(folder / "tp1.pt", weights_only=False)["with_kl"]
    assert base["train/kl"] > 1e-5
    for key in ("train/kl", "train/loss", "train/grad_norm", "care/logprob_difference"):
        # An AdamW step of lr * sign(gradient) lies before it: rounding differs a little more.
        assert result["with_kl"][key] == pytest.approx(base[key], abs=1e-5, rel=5e-3), key


def test_step_with_importance_weights_is_the_same_in_every_layout(layout):
    _, result, folder = layout
    base = torch.load(folder / "tp1.pt", weights_only=False)["weighted"]
    assert 0.05 < base["rollout/importance_truncated"] < 0.95
    keys = [f"rollout/importance_{name}" for name in ("mean", "max", "truncated")]
    for key in ("train/loss", "train/grad_norm", *keys):
        # Two AdamW steps lie before it.
        assert result["weighted"][key] == pytest.approx(base[key], abs=1e-5, rel=5e-3), key


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(ours: dict, base: dict, tolerance: float) -> None:
    assert set(ours) == set(base)
    for key, value in base.items():
        if key.startswith(("timing/", "memory/")):
            continue
        if value is None:
            assert ours[key] is None
        elif key.startswith("rollout/logprob_difference"):
            assert ours[key] < 1e-4
        else:
            assert ours[key] == pytest.approx(value, abs=tolerance, rel=tolerance), key


def test_first_training_step_is_the_same_in_every_layout(layout):
    _, result, folder = layout
    ours, base = read_metrics(Path(result["files"])), read_metrics(folder / "tp1-step")
    assert len(ours) == 1
    assert_same_metrics(ours[0], base[0], 1e-4)
    rollouts = "rollouts/step_000001.jsonl"
    texts = [
        [json.loads(line)["completion"] for line in (run / rollouts).read_text().splitlines()]
        for run in (Path(result["files"]), folder / "tp1-step")
    ]
    assert texts[0] == texts[1]


def test_a_run_of_one_process_resumes_in_every_layout(layout):
    name, _, folder = layout
    ours, base = read_metrics(folder / f"{name}-resumed"), read_metrics(folder / "tp1-resumed")
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    # Two AdamW steps of lr * sign(gradient) lie between; rounding differs a little more.
    for mine, wanted in zip(ours, base, strict=True):
        assert_same_metrics(mine, wanted, 5e-3)


def test_what_every_layout_saves_one_process_loads(layout, job, ranks, checkpoint, world):
    name, _, folder = layout
    recipe = small_recipe(checkpoint, world)
    states = []
    for run in (name, "tp1"):
        trainer = small_trainer(recipe, ranks, folder / f"{run}-resumed")
        trainer.resume()
        assert trainer.step == 4
        (part,) = trainer.policy.optimizer.chained_optimizers
        states.append(
            dict(trainer.policy.model.named_parameters())
            | {f"average {name}": t for name, t in trainer.reference.average.state.items()}
            | {
                f"{key} {number}": tensor.detach()
                for number, state in enumerate(part.optimizer.state.values())
                for key, tensor in state.items()
            }
        )
    ours, wanted = states
    assert sum(key.startswith("exp_avg_sq") for key in wanted) > 50
    # Four AdamW steps of lr * sign(gradient): where the gradient is rounding noise, so is its sign.
    assert_close(ours, wanted, absolute=8.5e-3, what="checkpointed state")
    moved = sum(((ours[key] - wanted[key]).abs() > 1e-4).sum() for key in wanted)
    assert moved < 0.01 * sum(tensor.numel() for tensor in wanted.values())
