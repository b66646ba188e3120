"""Rollouts with vLLM as far as they need no vLLM: the engine is a double."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_groups import make_prompts
from safetensors.torch import load_file
from small_runs import small_recipe, small_trainer
from transformers import Qwen2_5_VLConfig
from vllm_double import use_double

from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError, RunFailed
from nemo_care.models.families import read_family
from nemo_care.models.families.positions import mrope_positions
from nemo_care.models.families.qwen2_5_vl.engine import vllm_times
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.recipe.schema import Recipe, check_recipe
from nemo_care.recipe.vllm import VLLMConfig
from nemo_care.rollouts.build import build_generator, check_rollouts
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.vllm.placement import (
    check_placement,
    check_tensor_parallel,
    colocate,
    share,
)
from nemo_care.rollouts.vllm.requests import RequestBuilder, seed_of
from nemo_care.rollouts.vllm.shared_memory import SharedMemorySender
from nemo_care.rollouts.vllm.weight_stream import WeightStream
from nemo_care.training.build import load_model

SAMPLING = Sampling(group_size=3, temperature=1.0, top_p=0.95, max_tokens=8, seed=(5,))
GREEDY = dataclasses.replace(SAMPLING, temperature=0.0)


@pytest.fixture(scope="module")
def prompts(checkpoint, world, tmp_path_factory):
    return make_prompts(checkpoint, world, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def builder(checkpoint):
    return RequestBuilder(read_family(checkpoint), frozenset({2}))


# ------------------------------------------------------------------ requests


def test_a_prompt_becomes_tokens_frames_and_images_in_order(builder, prompts):
    video, two, mixed, text = (builder.build(prompt, SAMPLING) for prompt in prompts)
    assert [len(r.videos) for r in (video, two, mixed, text)] == [1, 2, 1, 0]
    assert [len(r.images) for r in (video, two, mixed, text)] == [0, 0, 1, 0]
    assert video.videos[0].frames.shape == (8, 28, 28, 3)
    assert video.videos[0].frames.dtype == np.uint8
    assert mixed.images[0].shape == (56, 56, 3)
    assert np.array_equal(mixed.images[0], prompts[2].frames[1][0])
    assert not np.array_equal(two.videos[0].frames, two.videos[1].frames)
    for request, prompt in zip((video, two, mixed, text), prompts, strict=True):
        assert sum(id in (6, 7) for id in request.token_ids) == len(prompt.seconds_per_grid)
        kept = [id for id in request.token_ids if id not in (6, 7)]
        assert kept == prompt.token_ids[~prompt.is_vision].tolist()
    assert mixed.token_ids.index(7) < mixed.token_ids.index(6)


def test_greedy_completions_are_asked_for_once(builder, prompts):
    assert builder.build(prompts[0], SAMPLING).count == 3
    assert builder.build(prompts[0], GREEDY).count == 1


def test_vllm_computes_our_positions_at_any_frame_rate(builder):
    """30000 frames per 1001 seconds and the like, where products are whole but for rounding."""
    generator = np.random.default_rng(0)
    rates = [1.0, 2.0, 29.97 / 15, 30000 / 1001 / 15, 0.7, 1 / 3, *generator.uniform(0.05, 30, 300)]
    for rate in rates:
        for seconds in (2 / rate, 2 / (8 / 240 * rate)):
            grid = (64, 4, 4)
            fps = builder.family.video_fps(grid, seconds)
            ids = torch.full((64 * 4,), 7)
            ours = mrope_positions(ids, [grid], [seconds], image_token_id=6, video_token_id=7)
            theirs = vllm_times(fps, 64, 2, 2).repeat(4)
            assert ours[0].tolist() == theirs.tolist()


def test_seeds_differ_by_prompt_and_use_and_leave_room_for_the_group():
    seeds = {
        seed_of(dataclasses.replace(SAMPLING, seed=s), i) for s in ((1,), (2,)) for i in (0, 1)
    }
    assert len(seeds) == 4
    assert max(seeds) + 1024 < 2**63
    assert seed_of(SAMPLING, 3) == seed_of(SAMPLING, 3)


# ------------------------------------------------------------------ placement


def test_a_replica_shares_its_gpus_with_as_many_engines_as_fit():
    blocks = colocate(VLLMConfig(tensor_parallel_size=8), [*range(8), *range(16, 24)], 8)
    assert blocks == (tuple(range(8)), tuple(range(16, 24)))
    assert colocate(VLLMConfig(), [4, 5], 8) == ((4,), (5,))


@pytest.mark.parametrize(
    ("engines", "replicas", "mine", "wanted"),
    [
        (4, range(2), 1, ((2, 3), (1,))),
        (1, range(4), 2, ((0,), (0, 1, 2, 3))),
        (2, range(4), 3, ((1,), (2, 3))),
        (1, [3], 3, ((0,), (3,))),
    ],
)
def test_engines_and_replicas_share_each_other_out(engines, replicas, mine, wanted):
    shared = share(engines, replicas, mine, "key")
    assert (shared.engines, shared.sharers) == wanted


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide the 4 ranks"),
        ({"tensor_parallel_size": 4}, "several machines"),
        (
            {"placement": "separate", "ray_address": "a:1", "engines": 3},
            "engines=3 makes 3 engines for 2 model repl",
        ),
        ({"placement": "separate", "gpus": [4, 5, 6]}, "3 engines for 2 model"),
        (
            {"placement": "separate", "gpus": [3, 4]},
            r"GPU 3 trains \(trainer\.devices=4",
        ),
    ],
)
def test_engines_that_do_not_fit_the_ranks_are_refused(keys, message, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machines = {"devices": 2, "replicas": 2, "tensor": 2, "pipeline": 2}
    if "gpus" in keys:
        machines = {"devices": 4, "replicas": 2, "tensor": 2, "pipeline": 1}
    with pytest.raises(InputError, match=message):
        check_placement(VLLMConfig(**keys), **machines)


def test_gpus_that_train_are_those_that_the_ranks_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    machines = {"devices": 2, "replicas": 1, "tensor": 2, "pipeline": 1}
    check_placement(VLLMConfig(placement="separate", gpus=[6, 7]), **machines)
    with pytest.raises(InputError, match=r"GPU 5 trains \(trainer.devices=2 ranks take 4, 5\)"):
        check_placement(VLLMConfig(placement="separate", gpus=[5, 6]), **machines)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "vision_width", "good"),
    [
        (16, 2, 11008, 3420, [1, 2, 4]),
        (28, 4, 18944, 3420, [1, 2, 4]),
        (40, 8, 27648, 3456, [1, 2, 4, 8]),
        (64, 8, 29568, 3456, [1, 2, 4, 8, 16]),
    ],
    ids=["3b", "7b", "32b", "72b"],
)
def test_a_size_that_vllm_cannot_cut_the_model_into_is_refused(
    heads, groups, width, vision_width, good
):
    text = {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": width}
    vision = {"num_heads": 16, "intermediate_size": vision_width}
    hf = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model = Qwen25VLFamily(hf).architecture
    for size in good:
        check_tensor_parallel(model, size)
    for size in {3, 5, 8, 16, 32} - set(good):
        message = f"tensor_parallel_size={size} does not.* use {', '.join(map(str, good))}$"
        with pytest.raises(InputError, match=message):
            check_tensor_parallel(model, size)


def test_every_replicas_engines_have_to_stay_on_a_machine():
    """Ranks 0 to 2 do, ranks 3 to 5 are on two."""
    vllm = VLLMConfig(tensor_parallel_size=3)
    with pytest.raises(InputError, match="ranks 3 to 5 would share an engine but are on several"):
        check_placement(vllm, devices=4, replicas=4, tensor=3, pipeline=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpus": [1]}, "rollout.vllm.gpus is for rollout.vllm.placement=separate"),
        ({"placement": "separate"}, "needs either rollout.vllm.gpus"),
        ({"placement": "separate", "gpus": [1, 1]}, "each GPU once"),
        ({"placement": "separate", "gpus": [1], "tensor_parallel_size": 2}, "multiple of"),
        ({"ray_address": "a:1", "engines": 1}, "ray_address is for rollout.vllm.placement=sep"),
        ({"placement": "separate", "ray_address": "a", "engines": 1}, "a is not NODE:PORT"),
        ({"placement": "separate", "ray_address": "a:1"}, "give both or neither"),
        ({"placement": "separate", "gpus": [1], "engines": 1}, "give both or neither"),
        ({"placement": "separate", "ray_address": "a:1", "engines": 0}, "engines=0"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"placement": "here"}, "choose colocated or separate"),
        ({"sleep_level": 3}, "between 0 and 2"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, message):
    recipe = Recipe()
    recipe.trainer.max_steps = 1
    recipe.model.hf_path = "somewhere"
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm = VLLMConfig(**keys)
    with pytest.raises(InputError, match=message):
        check_recipe(recipe)


def test_what_engines_need_is_asked_for_before_anything_starts(monkeypatch, checkpoint):
    monkeypatch.setattr("nemo_care.rollouts.build.find_spec", lambda name: None)
    recipe = Recipe()
    recipe.model.hf_path = str(checkpoint)
    check_rollouts(recipe)
    recipe.rollout.backend = "vllm"
    with pytest.raises(InputError, match=r"needs the package vllm: install it with pip install"):
        check_rollouts(recipe)
    there = SimpleNamespace(origin="somewhere")
    monkeypatch.setattr(
        "nemo_care.rollouts.build.find_spec", lambda name: there if name == "vllm" else None
    )
    check_rollouts(recipe)
    recipe.rollout.vllm = VLLMConfig(placement="separate", ray_address="a:1", engines=1)
    with pytest.raises(InputError, match="ray_address needs the package ray: install it with pip"):
        check_rollouts(recipe)
    recipe.model.precision.fp8.enabled = recipe.model.precision.fp8.rollout = True
    with pytest.raises(InputError, match=r"model\.precision\.fp8\.rollout=true is for"):
        check_rollouts(recipe)


# ------------------------------------------------------------------ with the double


def engine_recipe(checkpoint, world, engines=1):
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.gpus = list(range(1, engines + 1))
    recipe.rollout.vllm.timeout_seconds = 20
    recipe.rollout.vllm.bucket_mib = 1
    return recipe


@pytest.fixture
def trainer(checkpoint, world, ranks, tmp_path, monkeypatch):
    use_double(monkeypatch)
    made = small_trainer(engine_recipe(checkpoint, world), ranks, tmp_path)
    yield made
    made.generator.close()


@pytest.fixture
def engine(trainer):
    ((_, engine),) = trainer.generator.fleet.own
    return engine


def seen(engine):
    """What the double has seen."""
    return engine.ask("seen")


def test_groups_come_back_in_order_with_log_probs_and_spans(trainer, prompts, engine):
    groups = trainer.generator.generate(prompts, SAMPLING)
    assert [group.prompt.index for group in groups] == [0, 1, 2, 3]
    assert [group.size for group in groups] == [3] * 4
    assert all(c.ended and c.length == 4 for group in groups for c in group.completions)
    assert groups[0].completions[0].log_probs.tolist() == [-0.5] * 4
    assert [group.size for group in trainer.generator.generate(prompts, GREEDY)] == [3] * 4
    assert [request.count for request in seen(engine)["requests"]] == [3] * 4 + [1] * 4


def test_groups_have_the_experts_that_an_engine_returns(
    checkpoint, world, ranks, prompts, tmp_path, monkeypatch
):
    use_double(monkeypatch)
    recipe = engine_recipe(checkpoint, world)
    model = load_model(recipe, ranks)
    generator = build_generator(
        recipe,
        ranks,
        model,
        load_tokenizer(checkpoint, model.family.prompt),
        groups_per_batch=1,
        shared_prompt=True,
        folder=tmp_path,
        from_checkpoint=True,
        records_routing=True,
    )
    try:
        (group,) = generator.generate(prompts[:1], SAMPLING)
    finally:
        generator.close()
    length = group.prompt.length
    assert group.prompt_routing.flatten().tolist() == list(range(2 * length))
    for completion in group.completions:
        experts = completion.routing.flatten().tolist()
        assert experts == list(range(2 * length, 2 * (length + completion.length)))


def test_weights_go_before_the_first_rollout_and_after_updates_only(
    trainer, prompts, engine, checkpoint
):
    trainer.generator.generate(prompts[:1], SAMPLING)
    on_disk = load_file(checkpoint / "model.safetensors")
    weights = seen(engine)["weights"]
    assert weights.keys() == on_disk.keys()
    assert all(np.array_equal(weights[name], tensor) for name, tensor in on_disk.items())
    # 1.1 MB in pieces of 1 MiB.
    assert seen(engine)["calls"] == ["init", "start", "update", "update", "finish"]
    trainer.generator.generate(prompts[:1], SAMPLING)
    assert seen(engine)["calls"].count("finish") == 1
    trainer.policy.scheduler.step(1)
    trainer.policy.model.language_model.decoder.final_layernorm.weight.data.fill_(7)
    trainer.generator.generate(prompts[:1], SAMPLING)
    assert seen(engine)["calls"].count("finish") == 2
    assert seen(engine)["calls"].count("init") == 1
    assert bool((seen(engine)["weights"]["model.norm.weight"] == 7).all())


def test_frozen_weights_go_before_the_first_rollout_only(trainer, prompts, engine):
    trainer.policy.model.freeze(["vision", "merger"])
    trainer.generator.generate(prompts[:1], SAMPLING)
    weights = seen(engine)["weights"].keys()
    assert any(name.startswith("visual.") for name in weights)
    trained = {name for name in weights if not name.startswith("visual.")}
    for forgets in (False, True, False):
        engine.ask("become", weights={})
        if forgets:
            # An engine that has slept at level 2 has lost everything.
            trainer.generator._sent = None
        trainer.policy.scheduler.step(1)
        trainer.generator.generate(prompts[:1], SAMPLING)
        weights = seen(engine)["weights"].keys()
        assert (weights == trained) == (not forgets)
        assert trained <= weights


def test_other_tokens_in_a_prompt_end_the_run_with_the_samples_name(trainer, prompts, engine):
    trainer.generator.generate(prompts[:1], SAMPLING)
    engine.ask("become", lies=True)
    count = prompts[1].length
    message = (
        rf"sample two: vLLM's prompt has {count - 1} tokens and training's {count}, .* token \d+"
    )
    with pytest.raises(InputError, match=message):
        trainer.generator.generate(prompts[1:], SAMPLING)


def test_weights_that_change_on_the_way_end_the_run(trainer, prompts, engine):
    engine.ready()
    engine.ask("become", damages=True)
    with pytest.raises(RunFailed, match=r"1 of 1 parameters differ, the first is lm_head\.weight"):
        trainer.generator.generate(prompts[:1], SAMPLING)


def test_weights_do_not_change_under_a_running_generation(trainer, prompts, engine):
    trainer.generator.generate(prompts[:1], SAMPLING)
    engine.ask("become", pending=["a generation"])
    trainer.policy.scheduler.step(1)
    with pytest.raises(RunFailed, match="busy"):
        trainer.generator.generate(prompts[:1], SAMPLING)


# ------------------------------------------------------------------ weights of any layout


class Receiver:
    """Keeps the names of what it is sent; fails at the second piece if it is meant to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.pieces: list[list[str]] = []

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict) -> None:
        if self.fails and self.pieces:
            raise RunFailed("the engine has failed")
        self.pieces.append(update_info["names"])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


def streamed(ranks: Ranks, job: tuple) -> dict:
    """Differences of a weight stream to the checkpoint's file, and what a sender sends."""
    checkpoint, world = job
    model = load_model(small_recipe(checkpoint, world), ranks)
    stream = WeightStream(model, ranks)
    on_disk = load_file(checkpoint / "model.safetensors")
    described = stream.metadata()
    wrong, names, held = [], [], []
    for (name, got), wanted in zip(stream, described, strict=True):
        names.append(name)
        if not torch.equal(got, on_disk[name]):
            wrong.append(name)
        if (name, got.dtype, tuple(got.shape)) != wanted:
            wrong.append(f"metadata of {name}")
    receiver = Receiver() if ranks.is_model_leader else None
    SharedMemorySender(stream, receiver, bucket_bytes=100_000).send_weights()
    if receiver is not None:
        held = [name for piece in receiver.pieces for name in piece]
    # An engine that fails must not leave the other ranks in a collective.
    failing = Receiver(fails=True) if ranks.is_model_leader else None
    try:
        SharedMemorySender(stream, failing, bucket_bytes=100_000).send_weights()
        error = ""
    except RunFailed as failure:
        error = str(failure)
    errors = ranks.gather_in_replica(error)
    result = {"wrong": wrong, "names": names, "held": held, "errors": errors}
    result["missing"] = sorted(on_disk.keys() - set(names))
    result["pieces"] = len(receiver.pieces) if receiver is not None else None
    return result


@pytest.mark.parametrize(
    ("tensor", "pipeline"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_every_rank_sees_the_whole_model_tensor_by_tensor(
    on_ranks, checkpoint, world, tensor, pipeline
):
    layout = Layout(tensor=tensor, pipeline=pipeline)
    results = on_ranks(layout, streamed, (checkpoint, world))
    for result in results:
        assert (result["wrong"], result["missing"]) == ([], [])
        assert result["names"] == results[0]["names"]
        assert result["errors"] == ["the engine has failed"] + [""] * (tensor * pipeline - 1)
    assert results[0]["held"] == results[0]["names"]
    assert results[0]["pieces"] > 5


def sampled_twice(ranks: Ranks, job: tuple) -> tuple[list, dict | None]:
    """What this rank's groups hold, before and after an update; what its own engine has seen."""
    checkpoint, world, out = job
    with pytest.MonkeyPatch.context() as patch:
        use_double(patch)
        recipe = engine_recipe(checkpoint, world)
        recipe.rollout.vllm.gpus = [ranks.world_size]
        recipe.rollout.vllm.timeout_seconds = 60
        recipe.trainer.devices = ranks.world_size
        trainer = small_trainer(recipe, ranks, out / "run")
        prompts, _ = trainer.prompts.next_step()
        sampling = Sampling(group_size=2, temperature=1.0, top_p=0.95, max_tokens=8, seed=(5,))
        found = []
        for _ in range(2):
            groups = trainer.generator.generate(prompts, sampling)
            found.append([(g.prompt.index, [c.text for c in g.completions]) for g in groups])
            trainer.policy.scheduler.step(1)
        fed = trainer.generator.fleet.fed
        known = seen(fed[0]) if fed else None
        ranks.barrier()
        trainer.generator.close()
    return found, known


@pytest.mark.parametrize("pipeline", [1, 2])
def test_two_ranks_ask_one_engine_which_gets_the_weights_once_for_both(
    on_ranks, checkpoint, world, tmp_path, pipeline
):
    """As two replicas, and as two stages of one."""
    job = (checkpoint, world, tmp_path)
    ranks = on_ranks(Layout(pipeline=pipeline), sampled_twice, job, replicas=2 // pipeline)
    groups = [found for found, _ in ranks]
    indices = [[index for index, _ in found[0]] for found in groups]
    if pipeline == 1:
        assert sorted(indices[0] + indices[1]) == [0, 1, 2, 3]
        assert len(indices[0]) == 2
    else:
        assert groups[0] == groups[1]
        assert indices[0] == [0, 1, 2, 3]
    assert all(len(texts) == 2 for found in groups for step in found for _, texts in step)
    (engine,) = [known for _, known in ranks if known is not None]
    assert engine["weights"].keys() == load_file(checkpoint / "model.safetensors").keys()
    assert engine["calls"].count("init") == 1
    assert engine["calls"].count("finish") == 2
    assert len(engine["requests"]) == 8
