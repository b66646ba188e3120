"""Experts on their way to and from vLLM's engines, as far as they need no vLLM."""

import numpy as np
import pytest
import torch
from layouts import EXPERT_LAYOUTS
from safetensors.torch import load_file
from small_runs import small_recipe, small_trainer
from test_vllm_rollouts import SAMPLING, Receiver, engine_recipe, seen
from tiny_qwen3_vl import EXPERTS, FUSED, rewritten, write_tiny_qwen3
from vllm_double import use_double

from nemo_care.ranks.process_groups import Layout
from nemo_care.rollouts.build import engine_settings
from nemo_care.rollouts.vllm.messages import OUTPUT_FIRST, split_routing
from nemo_care.rollouts.vllm.shared_memory import SharedMemorySender
from nemo_care.rollouts.vllm.weight_stream import WeightStream
from nemo_care.training.build import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_qwen3(tmp_path_factory.mktemp("experts") / "checkpoint", EXPERTS)


def as_engines_take_them(folder):
    """The file's tensors, [experts, output, input] cut into each expert's matrices."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(FUSED):
            found[name] = tensor
            continue
        prefix, _, kind = name.rpartition(".")
        for number, matrix in enumerate(tensor):
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            parts = matrix.chunk(len(names))
            for part, its_name in zip(parts, names, strict=True):
                found[f"{prefix}.{number}.{its_name}.weight"] = part
    return found


def streamed(ranks, job):
    """Names in order of a stream of weights, those that differ from the file, and what is sent."""
    checkpoint, world = job
    model = load_model(small_recipe(checkpoint, world), ranks)
    stream, wanted = WeightStream(model, ranks), as_engines_take_them(checkpoint)
    wrong, names = [], []
    for (name, got), described in zip(stream, stream.metadata(), strict=True):
        names.append(name)
        fits = (name, got.dtype, tuple(got.shape)) == described
        if not fits or not torch.equal(got, wanted[name]):
            wrong.append(name)
    receiver = Receiver() if ranks.is_model_leader else None
    SharedMemorySender(stream, receiver, bucket_bytes=100_000).send_weights()
    sent = None if receiver is None else [name for piece in receiver.pieces for name in piece]
    return names, wrong, sorted(wanted.keys() - set(names)), sent


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [
        (Layout(tensor=2, pipeline=2, sequence_parallel=True, expert=2), 1),
        pytest.param(*EXPERT_LAYOUTS["tp2_ep2_etp2_sequence_parallel"], marks=pytest.mark.slow),
    ],
    ids=["tp2_pp2_ep2", "tp2_ep2_etp2"],
)
def test_every_rank_sees_each_expert_by_itself(on_ranks, checkpoint, world, layout, replicas):
    results = on_ranks(layout, streamed, (checkpoint, world), replicas=replicas)
    for names, wrong, missing, sent in results:
        assert (wrong, missing) == ([], [])
        assert names == results[0][0]
        assert sent in (None, names)
    assert results[0][3] is not None


def fed_by_one_replica(ranks, job):
    """What the one engine of two replicas holds after its first weights and after an update."""
    checkpoint, world, out = job
    with pytest.MonkeyPatch.context() as patch:
        use_double(patch)
        recipe = engine_recipe(checkpoint, world)
        recipe.rollout.vllm.gpus = [ranks.world_size]
        recipe.trainer.devices = ranks.world_size
        trainer = small_trainer(recipe, ranks, out / "run")
        fed, found = trainer.generator.fleet.fed, []
        for _ in range(2):
            trainer.generator.generate([], SAMPLING)
            found += [seen(engine)["weights"] for engine in fed]
            trainer.policy.scheduler.step(1)
            for parameter in trainer.policy.model.parameters():
                parameter.data.mul_(2)
        ranks.barrier()
        trainer.generator.close()
    return found


def test_a_replica_without_an_engine_of_its_own_contributes_its_experts(
    on_ranks, checkpoint, world, tmp_path
):
    layout, replicas = EXPERT_LAYOUTS["ep2"]
    job = (checkpoint, world, tmp_path)
    (first, second), others = on_ranks(layout, fed_by_one_replica, job, replicas=replicas)
    assert others == []
    wanted = as_engines_take_them(checkpoint)
    assert first.keys() == second.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.array_equal(first[name], tensor), name
        assert np.array_equal(second[name], 2 * tensor), name


def test_engines_know_how_the_checkpoint_stores_its_experts(
    checkpoint, dense_checkpoint, world, ranks, tmp_path
):
    published = rewritten(checkpoint, tmp_path / "old", lambda tensor: tensor.transpose(1, 2))
    found = {}
    for folder in (checkpoint, published, dense_checkpoint):
        recipe = small_recipe(folder, world)
        settings = engine_settings(recipe, load_model(recipe, ranks))
        found[folder] = (settings.load_format, settings.config)
    # vLLM reads this key, which transformers 5 does not write.
    config = {"text_config": {"norm_topk_prob": True}}
    assert found == {
        checkpoint: (OUTPUT_FIRST, config),
        published: ("auto", config),
        dense_checkpoint: ("auto", {}),
    }


@pytest.fixture
def dense_checkpoint(tmp_path):
    return write_tiny_qwen3(tmp_path / "dense")


def test_experts_of_a_sequence_are_split_after_the_prompt():
    """A prompt of three tokens and a completion of two, the last of which was not forwarded."""
    rows = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2)
    prompt, completion = split_routing(rows, 3)
    assert (prompt.dtype, completion.dtype) == (np.int16, np.int16)
    assert prompt.tolist() == rows[:3].tolist()
    assert completion.tolist() == [rows[3].tolist(), [[-1, -1], [-1, -1]]]
