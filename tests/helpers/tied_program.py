"""A model whose output layer is its embedding (as in small ones of both families), cut into stages.

    python tests/helpers/tied_program.py CHECKPOINT WORLD OUT

Rank 0 writes OUT/result.pt: the logits' difference to Hugging Face, whether the export equals the
original, and how far the two copies of the shared weight are apart after two steps.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from golden import hf_model
from layout_program import gather_vocabulary
from safetensors.torch import load_file
from small_runs import small_recipe, small_trainer, updated

from nemo_care.groups.group import Completion, Group
from nemo_care.models.pipeline import forward_only
from nemo_care.models.video_language_model import ModelInputs
from nemo_care.models.weights import export_hf
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks


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


def main() -> None:
    checkpoint, world, out = map(Path, sys.argv[1:4])
    environment = RankEnvironment.read()
    ranks = Ranks(Layout(pipeline=environment.world_size), environment)
    recipe = small_recipe(checkpoint, world)
    recipe.algorithm.group_size = 2
    trainer = small_trainer(recipe, ranks, out / "run")
    model = trainer.policy.model
    ids = torch.arange(8, 40).reshape(2, 16)
    positions = torch.arange(16).expand(3, 2, -1).contiguous()
    logits = forward_only(
        model.eval(),
        [ModelInputs(ids, positions)],
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
    if ranks.rank == 0:
        with torch.no_grad():
            wanted = hf_model(checkpoint)(input_ids=ids, position_ids=positions).logits
        ours, original = (
            load_file(folder / "model.safetensors")
            if (folder / "model.safetensors").exists()
            else {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
            for folder in (out / "export", checkpoint)
        )
        torch.save(
            {
                "logits_difference": (logits[..., : wanted.shape[-1]] - wanted).abs().max().item(),
                "export_equal": set(ours) == set(original)
                and all(torch.equal(ours[key], original[key]) for key in original),
                "grad_norms": norms,
                "copies_apart": (copies[0] - copies[-1]).abs().max().item(),
            },
            out / "result.pt",
        )
    ranks.close()


if __name__ == "__main__":
    main()
