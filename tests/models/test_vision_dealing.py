"""Frames dealt to tensor-parallel ranks give the features and gradients of all frames on each."""

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, gather_gradients, reduce_whole_gradients
from made_family import ToyFamily
from made_groups import make_groups, make_prompts
from small_runs import small_recipe

from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.groups.batching import BatchLayout
from nemo_care.models.families import read_family
from nemo_care.models.vision_dealing import VisionDealing, deal
from nemo_care.training.build import load_model
from nemo_care.training.policy import Policy

NAMES = [
    *("tp2_pp2_sequence_parallel", "tp2_dp2"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "tp2_sequence_parallel")),
]


def test_items_are_dealt_by_their_sizes_and_keep_their_order():
    assert deal([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    # One large image against many small ones.
    assert deal([2, 8, 2, 2, 2], 2) == [[1], [0, 2, 3, 4]]
    assert deal([5], 4) == [[0], [], [], []]
    sizes = [7, 5, 5, 4, 4, 3, 2, 2, 1, 1, 1]
    dealt = deal(sizes, 3)
    assert sorted(number for share in dealt for number in share) == list(range(len(sizes)))
    assert max(sum(sizes[n] for n in share) for share in dealt) == -(-sum(sizes) // 3)


def test_frames_of_one_size_are_computed_as_one_video(checkpoint):
    family = read_family(checkpoint)
    dealing = VisionDealing.of(family, [(5, 2, 2), (1, 4, 4), (2, 2, 2)], 2)
    # The image weighs as much as four frames.
    grids = [dealing.grids(rank) for rank in range(2)]
    assert grids == [[(1, 2, 2), (1, 4, 4), (1, 2, 2)], [(5, 2, 2)]]
    pixels = torch.arange(44)[:, None]
    shares = [dealing.pixels(rank, pixels)[:, 0].tolist() for rank in range(2)]
    assert shares == [[*range(16, 36), *range(40, 44)], [*range(16), *range(36, 40)]]


def test_a_rank_without_a_frame_computes_the_smallest_again(checkpoint):
    dealing = VisionDealing.of(read_family(checkpoint), [(1, 4, 4), (1, 2, 2)], 3)
    assert [dealing.grids(rank) for rank in range(3)] == [[(1, 4, 4)], [(1, 2, 2)], [(1, 2, 2)]]


def test_videos_stay_whole_where_a_family_does_not_compute_frames_apart():
    dealing = VisionDealing.of(ToyFamily(2), [(4, 1, 1), (2, 1, 1), (2, 1, 1)], 2)
    assert [dealing.grids(rank) for rank in range(2)] == [[(4, 1, 1)], [(2, 1, 1), (2, 1, 1)]]


@pytest.fixture(scope="module")
def job(checkpoint, world, tmp_path_factory):
    """What the ranks need: groups whose prompts have many frames, fewer than ranks, and none."""
    folder = tmp_path_factory.mktemp("vision")
    prompts = make_prompts(checkpoint, world, folder)
    _, several, mixed, text = prompts
    image = Sample(
        "image", mixed.sample.question, mixed.sample.solution, images=mixed.sample.images
    )
    one = _built(checkpoint, world, image)
    assert one.grid_thw.tolist() == [[1, 4, 4]]
    cases = {"frames": [several, mixed], "one_frame": [one], "text": [text]}
    contents = {"checkpoint": checkpoint, "world": world, "cases": {}}
    for case, of_case in cases.items():
        groups = make_groups(of_case, checkpoint)
        for group in groups:
            group.advantage = torch.linspace(-1, 1.5, group.size)
        contents["cases"][case] = groups
    return contents


def patches_seen(model) -> list[int]:
    """Fill the returned list with the patches that this rank's tower gets from now on."""
    seen: list[int] = []
    if model.pre_process:
        model.visual.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    return seen


def computed(ranks, job) -> dict:
    """Values and gradients of some groups, the vision tower dealt to ranks and not."""
    result: dict = {}
    for shard in (False, True):
        recipe = small_recipe(job["checkpoint"], job["world"])
        recipe.model.vision.shard = shard
        # Each way with one of the layouts.
        recipe.model.recompute_granularity = "none" if ranks.data_size > 1 else "full"
        # Every parameter has to get a gradient then, on every rank.
        recipe.optimizer.overlap_grad_reduce = ranks.data_size > 1
        model = load_model(recipe, ranks)
        layout = BatchLayout.of_recipe(recipe, ranks.layout, pad_id=0)
        policy = Policy(model, recipe, ranks, layout)
        reduce_whole_gradients(policy.wrapped.config)
        seen = patches_seen(model)
        for case, groups in job["cases"].items():
            if case == "text" and ranks.data_size > 1:
                continue
            seen.clear()
            batches = layout.batches(groups)
            losses = policy.forward_backward(batches, policy.loss_count(batches))
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, list(seen))
            result[shard, case] = {
                "log_probs": [found.log_probs.detach() for found in losses],
                "patches": everyone,
                "gradients": gather_gradients(model),
                "norm": policy.gradient_norm(),
            }
    return result


def _built(checkpoint, world, sample):
    prompt_format = read_family(checkpoint).prompt
    tokenizer = load_tokenizer(checkpoint, prompt_format)
    return PromptBuilder(small_recipe(checkpoint, world).data, prompt_format, tokenizer).build(
        0, sample
    )


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
def test_dealt_frames_change_neither_values_nor_gradients(on_ranks, job, name):
    layout, replicas = LAYOUTS["tp2" if name == "tp2_dp2" else name]
    result = on_ranks(layout, computed, job, replicas=2 if name == "tp2_dp2" else replicas)[0]
    cases = {case for _, case in result}
    assert cases == (
        {"frames", "one_frame"} if name == "tp2_dp2" else {"frames", "one_frame", "text"}
    )
    for case in cases:
        whole, dealt = (result[shard, case] for shard in (False, True))
        for ours, wanted in zip(dealt["log_probs"], whole["log_probs"], strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)
        assert dealt["norm"] == pytest.approx(whole["norm"], rel=1e-6)
        for key, wanted in whole["gradients"].items():
            scale = max(1.0, wanted.abs().max().item())
            difference = (dealt["gradients"][key] - wanted).abs().max().item()
            assert difference <= 1e-6 * scale, f"{case}, {key}: {difference}"
        learns = [g for key, g in whole["gradients"].items() if key.startswith("visual.")]
        assert any(bool(g.any()) for g in learns) == (case != "text")
    _assert_shares(result)


def _assert_shares(result) -> None:
    """Ranks 0 and 1 are on the first stage; each has half of the frames, or the only one."""
    first, second = result[False, "frames"]["patches"][:2]
    assert first == second
    dealt = result[True, "frames"]["patches"][:2]
    assert [a + b for a, b in zip(*dealt, strict=True)] == first
    assert max(map(max, dealt)) <= 0.6 * max(first)
    assert result[True, "one_frame"]["patches"][:2] == [[16], [16]]
    if (True, "text") in result:
        assert result[True, "text"]["patches"][:2] == [[], []]
