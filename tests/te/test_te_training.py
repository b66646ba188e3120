"""TransformerEngine's own Python with kernels in torch: attention, the optimizer, a whole step."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layouts import gather_weights, generate, record_gradients
from made_groups import make_groups, make_prompts
from made_optimizer import optimizer_of_megatron, resumed, uninterrupted
from made_segments import LENGTH, SEGMENTS, gradients, made_inputs
from small_runs import small_recipe, small_trainer, updated
from tiny_qwen3_vl import EXPERTS, write_tiny_qwen3

from nemo_care.models.group_attention import GroupAttention
from nemo_care.models.segments import PackedSegments, Segment
from nemo_care.models.te_attention import TransformerEngineGroupAttention

pytestmark = pytest.mark.te


@pytest.fixture
def calls(monkeypatch):
    """Which of TransformerEngine's kernels are called, by their versions in torch."""
    import te_kernels  # noqa: F401
    import te_python_half
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    choose = utils.get_attention_backend

    def choose_some(*arguments):
        """Older versions refuse the backend in torch for rows of unequal length."""
        flash, flash_version, fused, kind, _, available = choose(*arguments)
        assert not flash
        assert not fused
        return flash, flash_version, fused, kind, True, available

    monkeypatch.setattr(utils, "get_attention_backend", choose_some)
    te_python_half.CALLS.clear()
    return te_python_half.CALLS


@pytest.fixture
def fused(calls):
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam


# Keys of a row, of a prompt and of itself, outnumber its queries, and yet the longest rows of
# queries and of keys are equally long.
EQUAL_LONGEST = (Segment(0, 12), Segment(12, 16, ((0, 8),)), Segment(16, 22, ((0, 6),)))


@pytest.mark.parametrize("segments", [SEGMENTS, EQUAL_LONGEST], ids=["unequal", "equal longest"])
def test_attention_of_packed_groups(ranks, calls, segments):
    config = SimpleNamespace(
        tensor_model_parallel_size=2, num_attention_heads=8, num_query_groups=4, kv_channels=8
    )
    inputs = made_inputs()
    packed = PackedSegments(segments=segments, length=LENGTH)
    ours, wanted = (
        kind(config, layer_number=1, attn_mask_type=None, attention_type="")(
            *inputs, None, packed_seq_params=packed
        )
        for kind in (TransformerEngineGroupAttention, GroupAttention)
    )
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
    for mine, other in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert "convert_thd_to_bshd" in calls


@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("direction", ["torch to fused", "fused to torch", "fused to fused"])
def test_a_run_goes_on_with_either_kind_of_adamw(ranks, fused, calls, tmp_path, direction, trained):
    first, _, then = direction.partition(" to ")
    kinds = {"torch": None, "fused": fused}
    found = resumed(tmp_path / "checkpoint", kinds[first], kinds[then], trained)
    torch.testing.assert_close(found, uninterrupted(None, trained + 2), atol=1e-6, rtol=1e-6)
    assert ("multi_tensor_adam" in calls) is (then == "fused" or trained > 0)


def test_the_optimizer_steps_alike_with_its_state_in_cpu_memory(ranks, fused):
    found = uninterrupted(fused, 3, offload=True)
    assert all(map(torch.equal, found, uninterrupted(fused, 3)))


def step(trainer, job, ranks) -> dict:
    """Sampling, scoring, an update and the moving average."""
    sampled = generate(trainer, job["prompts"], 1.0, ranks)
    groups = job["groups"]
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    recorded = record_gradients(trainer.policy)
    metrics = updated(trainer.policy, groups)
    trainer.reference.track(trainer.policy.model, 1)
    return {
        "sampled": sampled,
        "likelihoods": [group.answer_likelihood for group in groups],
        "loss": metrics["train/loss"],
        "gradients": recorded,
        "weights": gather_weights(trainer.policy.model),
        "average": gather_weights(trainer.reference.average.model),
    }


@pytest.fixture(params=["dense", "experts"])
def any_checkpoint(request, checkpoint, tmp_path):
    """A tiny model of either kind, and the additional kernels of its layers."""
    if request.param == "dense":
        return checkpoint, set()
    return write_tiny_qwen3(tmp_path / "checkpoint", EXPERTS), {"te_general_grouped_gemm"}


def test_a_whole_step_equals_that_of_local_layers(
    ranks, fused, calls, any_checkpoint, world, tmp_path
):
    """In fp32, which recipes refuse with this backend: there every difference can be seen."""
    checkpoint, kernels = any_checkpoint
    prompts = make_prompts(checkpoint, world, tmp_path)
    job = {"prompts": prompts, "groups": make_groups(prompts, checkpoint)}
    found = {}
    for backend in ("local", "transformer_engine"):
        recipe = small_recipe(checkpoint, world)
        recipe.model.backend = backend
        calls.clear()
        with optimizer_of_megatron(fused if backend == "transformer_engine" else None):
            trainer = small_trainer(recipe, ranks, tmp_path / backend)
            found[backend] = step(trainer, job, ranks)
        found[backend]["calls"] = set(calls)
    ours, wanted = found["transformer_engine"], found["local"]
    assert wanted["calls"] == set()
    kernels |= {"generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd", "multi_tensor_adam"}
    assert kernels | {"convert_thd_to_bshd", "convert_bshd_to_thd"} <= ours["calls"]
    assert ours["sampled"] == wanted["sampled"]
    assert ours["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    for mine, other in zip(ours["likelihoods"], wanted["likelihoods"], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5, equal_nan=True)
    # AdamW's first step is the gradient's sign times the rate of 1e-3, even of a tiny gradient.
    for what, bound in (("gradients", 1e-5), ("weights", 1e-4), ("average", 1e-5)):
        assert set(ours[what]) == set(wanted[what])
        for name, tensor in wanted[what].items():
            torch.testing.assert_close(ours[what][name], tensor, atol=bound, rtol=0)


def test_without_its_compiled_part_it_is_as_if_not_installed():
    """The wheel alone, as pip leaves it where the torch part could not be built."""
    program = (
        "import nemo_care, megatron.core.models.gpt.gpt_layer_specs\n"
        "from nemo_care.megatron.te_import import why_unusable\n"
        "print(why_unusable())"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(os.environ["NEMO_CARE_TE"]).resolve())])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    why = done.stdout.splitlines()[-1]
    assert "transformer" in why.lower().replace(" ", "")
