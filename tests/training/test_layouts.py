"""Every parallel layout computes what one process computes, and that is what the paper says.

The oracle is plain Hugging Face and torch (golden.py). Each layout really starts its ranks. Other
families import the classes of tests, and define `checkpoint`, `job` and the layouts.
"""

import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from golden import golden_step, hf_model, vision_inputs
from layouts import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    gather_vocabulary,
    gather_weights,
    generate,
    held_by_leader,
    record_gradients,
    share_of,
)
from made_groups import make_groups, make_prompts
from safetensors.torch import load_file
from small_runs import one_step, small_recipe, small_trainer, updated

from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.models.families import read_family
from nemo_care.models.pipeline import forward_only
from nemo_care.models.video_language_model import ModelInputs
from nemo_care.models.weights import export_hf
from nemo_care.ranks.process_groups import Ranks
from nemo_care.rollouts.megatron import MegatronGenerator

pytestmark = pytest.mark.numeric


def passes(trainer, ranks: Ranks, job: dict) -> dict:
    """Logits and sampled tokens of one layout, which also exports the model."""
    model = trainer.policy.model
    result: dict = {}
    logits = forward_only(
        model.eval(),
        [job["inputs"]],
        inputs_of=lambda inputs: inputs,
        result_of=lambda hidden, inputs: model.logits(hidden),
    )
    result["logits"] = gather_vocabulary(logits[0] if logits else None, ranks)
    result["greedy"] = generate(trainer, job["prompts"], 0.0, ranks)
    result["sampled"] = generate(trainer, job["prompts"], 1.0, ranks)
    if model.family.architecture.experts is None:
        fixed = MegatronGenerator(
            model, trainer.generator.tokenizer, ranks, groups_per_batch=3, cuda_graphs=True
        )
        result["fixed"] = generate(trainer, job["prompts"], 1.0, ranks, generator=fixed)
    export_hf(model, job["checkpoint"], job["folder"] / f"{job['name']}-export")
    return result


def computed(ranks: Ranks, job: dict) -> dict:
    """What one layout computes; its files go to NAME-... in the job's folder."""
    folder, name = job["folder"], job["name"]
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.rollout.groups_per_batch = 3  # of 4: batches of different sizes
    trainer = small_trainer(recipe, ranks, folder / name)
    model = trainer.policy.model
    if not ranks.is_model_leader:
        job["prompts"] = [prompt.without_frames() for prompt in job["prompts"]]
    result = {} if job["only"] == "runs" else passes(trainer, ranks, job)

    # One step on given completions.
    groups = held_by_leader(share_of(job["groups"], ranks), ranks)
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    gradients = record_gradients(trainer.policy)
    metrics = updated(trainer.policy, groups)
    trainer.reference.track(model, 1)
    rows = [
        (g.answer_likelihood.tolist(), g.consistency_bonus.tolist(), g.advantage.tolist())
        for g in groups
    ]
    rows = [row for part in ranks.gather_from_replicas(rows) for row in part]
    result["golden"] = {
        "rows": rows,
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
        "gradients": gradients,
        "weights": gather_weights(model),
        "average": gather_weights(trainer.reference.average.model),
    }

    if job["only"] == "parity":
        return result

    # Another step with a KL term, now that reference and policy differ.
    recipe.algorithm.kl_coefficient = 0.04
    trainer.reference.all_tokens = True
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    result["with_kl"] = updated(trainer.policy, groups)
    recipe.algorithm.kl_coefficient = 0.0

    # And one whose sampler was another model than the trainer.
    for group in groups:
        for number, completion in enumerate(group.completions):
            chances = torch.arange(completion.length) % 7 + number
            completion.log_probs = -0.4 * chances.float()
    recipe.rollout.importance_sampling.enabled = True
    result["weighted"] = updated(trainer.policy, groups)
    recipe.rollout.importance_sampling.enabled = False

    # A trainer's own first step, from prompts to EMA.
    trainer = small_trainer(recipe, ranks, folder / f"{name}-step")
    trainer.record(one_step(trainer))
    result["files"] = str(folder / f"{name}-step")

    # A run that one process began, resumed in this layout.
    begun, resumed = folder / "begun", folder / f"{name}-resumed"
    if not begun.exists():
        recipe.trainer.max_steps = 1
        small_trainer(recipe, ranks, begun).fit()
    recipe.trainer.max_steps = 2
    if ranks.rank == 0:
        shutil.copytree(begun, resumed)
    ranks.barrier()
    small_trainer(recipe, ranks, resumed).fit()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def job(checkpoint, world, folder):
    return made_job(checkpoint, world, folder)


def made_job(checkpoint, world, folder, *, only=None):
    """What `computed` works on.

    `only` is None for all, "parity" to end after the step of the golden model, or "runs" to begin
    with it.
    """
    prompts = make_prompts(checkpoint, world, folder)
    # Two rows of equal length for the comparison of logits.
    video = prompts[0]
    rows = torch.stack([video.token_ids, video.token_ids.clone()])
    patches = read_family(checkpoint).prompt.patching.patches(*video.frames)
    rows[1, -6:-3] = rows[1, -5:-2].clone()
    row, columns = torch.stack([video.is_vision] * 2).nonzero(as_tuple=True)
    inputs = ModelInputs(
        token_ids=rows,
        position_ids=torch.stack([video.position_ids] * 2, dim=1),
        pixel_values=torch.cat([patches, patches.flip(0)]),
        grid_thw=torch.cat([video.grid_thw] * 2),
        vision_places=columns * 2 + row,
    )
    return {
        "folder": folder,
        "checkpoint": checkpoint,
        "world": world,
        "prompts": prompts,
        "groups": make_groups(prompts, checkpoint),
        "inputs": inputs,
        "only": only,
    }


@pytest.fixture(scope="module")
def base(on_ranks, job):
    """What one process computes: the other layouts are compared with it, and resume its run."""
    layout, _ = LAYOUTS["tp1"]
    return on_ranks(layout, computed, job | {"name": "tp1"})[0]


@pytest.fixture(scope="module")
def golden(job, checkpoint, world):
    return golden_step(checkpoint, job["groups"], small_recipe(checkpoint, world))


# The layouts of runs: every way to divide the model and the data.
RUNS = ("tp1", "dp2", "tp2_pp2_sequence_parallel")


@pytest.fixture(scope="module")
def in_layout(on_ranks, job, base):
    """Returns name and results of a layout, which computes all or `only` a part."""

    @cache
    def found(name: str, only: str | None) -> tuple[str, dict]:
        if name == "tp1":
            return name, base
        layout, replicas = {**LAYOUTS, **EXPERT_LAYOUTS}[name]
        work = job | {"name": name, "only": job["only"] or only}
        return name, on_ranks(layout, computed, work, replicas=replicas)[0]

    return found


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request, in_layout):
    return in_layout(request.param, None if request.param in RUNS else "parity")


@pytest.fixture(
    scope="module",
    params=[
        name if name in RUNS else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS
    ],
)
def run_layout(request, in_layout):
    return in_layout(request.param, None if request.param in RUNS else "runs")


def assert_close(ours: dict, wanted: dict, *, absolute: float, what: str) -> None:
    assert set(ours) == set(wanted)
    for name, tensor in wanted.items():
        difference = (ours[name] - tensor).abs().max().item()
        assert difference <= absolute, f"{what} of {name} differs by {difference}"


@pytest.fixture(scope="module")
def greedy(job, checkpoint):
    """Hugging Face's greedy tokens after each prompt.

    Step by step without a cache: `generate` would compute positions of its own.
    """
    model = hf_model(checkpoint)
    eos = load_tokenizer(checkpoint, read_family(checkpoint).prompt).eos_ids
    found = []
    for prompt in job["prompts"]:
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
        found.append(wanted)
    return found


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


@pytest.fixture(scope="module")
def loaded(folder, ranks, checkpoint, world):
    """Loads, in one process, what the run of a layout has saved last; each once."""

    @cache
    def load(name: str) -> dict:
        trainer = small_trainer(small_recipe(checkpoint, world), ranks, folder / f"{name}-resumed")
        trainer.resume()
        assert trainer.step == 2
        (part,) = trainer.policy.optimizer.chained_optimizers
        return (
            dict(trainer.policy.model.named_parameters())
            | {f"average {name}": t for name, t in trainer.reference.average.state.items()}
            | {
                f"{key} {number}": tensor.detach()
                for number, state in enumerate(part.optimizer.state.values())
                for key, tensor in state.items()
            }
        )

    return load


class TestParity:
    """What a layout computes is what Hugging Face and plain torch compute."""

    def test_logits_equal_hugging_face(self, layout, job, checkpoint):
        _, result = layout
        inputs = job["inputs"]
        with torch.no_grad():
            wanted = hf_model(checkpoint)(
                input_ids=inputs.token_ids,
                position_ids=inputs.position_ids,
                pixel_values_videos=inputs.pixel_values,
                video_grid_thw=inputs.grid_thw,
            ).logits
        ours = result["logits"][..., : wanted.shape[-1]]
        assert (ours - wanted).abs().max() <= 1e-4

    def test_greedy_tokens_equal_hugging_face_given_the_same_positions(self, layout, greedy):
        _, result = layout
        assert result["greedy"] == [[wanted, wanted] for wanted in greedy]

    def test_sampled_tokens_are_the_same_in_every_layout(self, layout, base):
        name, result = layout
        assert result["sampled"] == base["sampled"], name
        # Also in steps of a fixed shape, where stages exchange tensors without their shapes.
        assert result.get("fixed", base["sampled"]) == base["sampled"], name
        # Two completions of a prompt are samples of their own.
        assert any(first != second for first, second in base["sampled"])

    def test_export_is_bit_equal_to_the_original(self, layout, folder, checkpoint):
        name, _ = layout
        wanted = load_file(checkpoint / "model.safetensors")
        ours: dict = {}
        for file in (folder / f"{name}-export").glob("*.safetensors"):
            ours.update(load_file(file))
        assert set(ours) == set(wanted)
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)

    def test_exported_directory_loads_in_transformers(self, layout, folder, checkpoint):
        name, _ = layout
        ours = hf_model(folder / f"{name}-export").state_dict()
        wanted = hf_model(checkpoint).state_dict()
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)

    def test_whole_step_equals_plain_torch(self, layout, golden):
        _, result = layout
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

    def test_golden_step_exercises_every_mechanism(self, golden):
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


class TestRuns:
    """A run does not depend on the layout."""

    def test_step_with_a_kl_term_is_the_same_in_every_layout(self, run_layout, base):
        ours, wanted = run_layout[1]["with_kl"], base["with_kl"]
        assert wanted["train/kl"] > 1e-5
        for key in ("train/kl", "train/loss", "train/grad_norm", "care/logprob_difference"):
            # An AdamW step of lr * sign(gradient) lies before it: rounding differs a little more.
            assert ours[key] == pytest.approx(wanted[key], abs=1e-5, rel=5e-3), key

    def test_first_training_step_is_the_same_in_every_layout(self, run_layout, folder):
        _, result = run_layout
        ours, base = read_metrics(Path(result["files"])), read_metrics(folder / "tp1-step")
        assert len(ours) == 1
        assert_same_metrics(ours[0], base[0], 1e-4)
        rollouts = "rollouts/step_000001.jsonl"
        texts = [
            [json.loads(line)["completion"] for line in (run / rollouts).read_text().splitlines()]
            for run in (Path(result["files"]), folder / "tp1-step")
        ]
        assert texts[0] == texts[1]

    def test_a_run_of_one_process_resumes_in_every_layout(self, run_layout, folder):
        name, _ = run_layout
        ours, base = read_metrics(folder / f"{name}-resumed"), read_metrics(folder / "tp1-resumed")
        assert [line["step"] for line in ours] == [1, 2]
        # An AdamW step of lr * sign(gradient) lies between; rounding differs a little more.
        for mine, wanted in zip(ours, base, strict=True):
            assert_same_metrics(mine, wanted, 5e-3)

    def test_what_every_layout_saves_one_process_loads(self, run_layout, loaded):
        ours, wanted = loaded(run_layout[0]), loaded("tp1")
        assert sum(key.startswith("exp_avg_sq") for key in wanted) > 50
        # Two AdamW steps of lr * sign(gradient): if the gradient is rounding noise, so is its sign.
        assert_close(ours, wanted, absolute=4.3e-3, what="checkpointed state")
        moved = sum(((ours[key] - wanted[key]).abs() > 1e-4).sum() for key in wanted)
        assert moved < 0.01 * sum(tensor.numel() for tensor in wanted.values())


def test_step_with_importance_weights_is_the_same_in_every_layout(run_layout, base):
    ours, wanted = run_layout[1]["weighted"], base["weighted"]
    assert 0.05 < wanted["rollout/importance_truncated"] < 0.95
    keys = [f"rollout/importance_{name}" for name in ("mean", "max", "truncated")]
    for key in ("train/loss", "train/grad_norm", *keys):
        # Two AdamW steps lie before it.
        assert ours[key] == pytest.approx(wanted[key], abs=1e-5, rel=5e-3), key


def test_frames_take_the_same_memory_in_every_layout_of_a_replica(run_layout):
    """One rank's, in bytes: frames of 8 x 28 x 28 pixels of each of the replica's prompts."""
    name, result = run_layout
    (metrics,) = read_metrics(Path(result["files"]))
    prompts = small_recipe("", "").algorithm.prompts_per_step // LAYOUTS[name][1]
    assert metrics["memory/media_gib"] * 2**30 == prompts * 8 * 28 * 28 * 3
