"""Small models tie their output layer to their embedding; with stages, two ranks hold it."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from golden import hf_model
from layouts import gather_vocabulary
from safetensors.torch import load_file, save_file
from small_runs import small_recipe, small_trainer, updated
from tiny_qwen3_vl import write_tiny_qwen3

from nemo_care.groups.group import Completion, Group
from nemo_care.models.pipeline import forward_only
from nemo_care.models.video_language_model import ModelInputs
from nemo_care.models.weights import export_hf
from nemo_care.ranks.process_groups import Layout, Ranks

pytestmark = pytest.mark.numeric

IDS = torch.arange(8, 40).reshape(2, 16)
POSITIONS = torch.arange(16).expand(3, 2, -1).contiguous()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def tied_checkpoint(request, checkpoint, tmp_path_factory):
    """A tiny checkpoint without lm_head, as a tied model is stored."""
    folder = tmp_path_factory.mktemp("tied") / "checkpoint"
    if request.param == "qwen3_vl":
        return write_tiny_qwen3(folder, tie_word_embeddings=True)
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def given_groups(trainer) -> list[Group]:
    """Prompts with two fixed completions each, one to be learned and one to be unlearned: without
    its output layer the model would never earn a reward."""
    prompts, _ = trainer.prompts.next_step()
    return [
        Group(
            prompt,
            [
                Completion(torch.tensor(ids), torch.zeros(4), "", True, None)
                for ids in ([8, 20, 9, 2], [8, 30, 31, 2])
            ],
            advantage=torch.tensor([1.0, -1.0]),
        )
        for prompt in prompts
    ]


def computed(ranks: Ranks, job: tuple) -> dict:
    """Logits, two steps, and how far the copies of the shared weight are apart then."""
    checkpoint, world, out = job
    recipe = small_recipe(checkpoint, world)
    recipe.algorithm.group_size = 2
    trainer = small_trainer(recipe, ranks, out / "run")
    model = trainer.policy.model
    logits = forward_only(
        model.eval(),
        [ModelInputs(IDS, POSITIONS)],
        inputs_of=lambda inputs: inputs,
        result_of=lambda hidden, inputs: model.logits(hidden),
    )
    logits = gather_vocabulary(logits[0] if logits else None, ranks)
    export_hf(model, checkpoint, out / "export")
    norms = [updated(trainer.policy, given_groups(trainer))["train/grad_norm"] for _ in range(2)]
    export_hf(model, checkpoint, out / "trained")
    shared = model.shared_embedding_or_output_weight().detach().clone()
    copies = [torch.empty_like(shared) for _ in range(ranks.world_size)]
    dist.all_gather(copies, shared)
    return {
        "logits": logits,
        "norms": norms,
        "apart": (copies[0] - copies[-1]).abs().max().item(),
    }


@pytest.fixture(scope="module")
def runs(on_ranks, tied_checkpoint, world, tmp_path_factory):
    """By the number of stages: the folder and what was computed."""
    folders = {stages: tmp_path_factory.mktemp(f"stages{stages}") for stages in (1, 2)}
    return {
        stages: (
            out,
            on_ranks(Layout(pipeline=stages), computed, (tied_checkpoint, world, out))[0],
        )
        for stages, out in folders.items()
    }


@pytest.mark.parametrize("stages", [1, 2])
def test_tied_model_equals_hugging_face_and_exports_bit_for_bit(runs, stages, tied_checkpoint):
    out, result = runs[stages]
    with torch.no_grad():
        wanted = hf_model(tied_checkpoint)(input_ids=IDS, position_ids=POSITIONS).logits
    assert (result["logits"][..., : wanted.shape[-1]] - wanted).abs().max() <= 1e-4
    original = load_file(tied_checkpoint / "model.safetensors")
    exported: dict = {}
    for file in (out / "export").glob("*.safetensors"):
        exported.update(load_file(file))
    assert set(exported) == set(original)
    assert all(torch.equal(exported[key], original[key]) for key in original)


def test_both_copies_of_the_tied_weight_stay_equal(runs):
    out, result = runs[2]
    assert result["apart"] == 0
    trained = hf_model(out / "trained")
    assert trained.lm_head.weight.data_ptr() == trained.get_input_embeddings().weight.data_ptr()


def test_stages_train_a_tied_model_like_one_process(runs):
    one, two = (result["norms"] for _, result in runs.values())
    assert one[0] > 0
    assert one == pytest.approx(two, rel=1e-3)
