"""Rollouts with vLLM as far as they need no vLLM: the engine is a double."""

import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from made_groups import make_prompts
from safetensors.torch import load_file
from small_runs import small_recipe, small_trainer
from transformers import Qwen2_5_VLConfig
from vllm_double import KEY, DoubleEngine, HostThread

from nemo_care.errors import InputError, RunFailed
from nemo_care.models.families import read_family
from nemo_care.models.families.positions import mrope_positions
from nemo_care.models.families.qwen2_5_vl.engine import vllm_times
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.process.environment import VLLM_KEY
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.recipe.schema import Recipe, check_recipe
from nemo_care.recipe.vllm import VLLMConfig
from nemo_care.rollouts.build import check_rollouts
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.vllm.engine import Engine
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
    blocks = colocate(VLLMConfig(tensor_parallel_size=8), [*range(8), *range(16, 24)], 8).blocks
    assert blocks == (tuple(range(8)), tuple(range(16, 24)))
    assert colocate(VLLMConfig(), [4, 5], 8).blocks == ((4,), (5,))


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
        ({"placement": "separate", "hosts": ["a:1", "b:2", "c:3"]}, "3 engines for 2 model repl"),
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
        ({"placement": "separate", "hosts": ["node17"]}, "node17 is not NODE:PORT"),
        ({"placement": "separate", "hosts": []}, "is empty"),
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
    recipe.rollout.vllm = VLLMConfig(placement="separate", hosts=["a:1"])
    monkeypatch.delenv("NEMO_CARE_VLLM_KEY", raising=False)
    with pytest.raises(InputError, match="needs the engines' secret"):
        check_rollouts(recipe)
    recipe.model.precision.fp8.enabled = recipe.model.precision.fp8.rollout = True
    with pytest.raises(InputError, match=r"model\.precision\.fp8\.rollout=true is for"):
        check_rollouts(recipe)


# ------------------------------------------------------------------ with the double


@pytest.fixture
def host(monkeypatch):
    return HostThread(monkeypatch)


@pytest.fixture
def trainer(checkpoint, world, ranks, tmp_path, host):
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.hosts = [host.address]
    recipe.rollout.vllm.timeout_seconds = 20
    recipe.rollout.vllm.bucket_mib = 1
    made = small_trainer(recipe, ranks, tmp_path)
    yield made
    made.generator.close()


def test_groups_come_back_in_order_with_log_probs_and_spans(trainer, prompts, host):
    groups = trainer.generator.generate(prompts, SAMPLING)
    assert [group.prompt.index for group in groups] == [0, 1, 2, 3]
    assert [group.size for group in groups] == [3] * 4
    assert all(c.ended and c.length == 4 for group in groups for c in group.completions)
    assert groups[0].completions[0].log_probs.tolist() == [-0.5] * 4
    assert [group.size for group in trainer.generator.generate(prompts, GREEDY)] == [3] * 4
    assert [request.count for request in host.engine.requests] == [3] * 4 + [1] * 4


def test_weights_go_before_the_first_rollout_and_after_updates_only(
    trainer, prompts, host, checkpoint
):
    trainer.generator.generate(prompts[:1], SAMPLING)
    engine = host.engine
    on_disk = load_file(checkpoint / "model.safetensors")
    assert engine.weights.keys() == on_disk.keys()
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in on_disk.items())
    # 1.1 MB in pieces of 1 MiB.
    assert engine.calls == ["init", "start", "update", "update", "finish"]
    trainer.generator.generate(prompts[:1], SAMPLING)
    assert engine.calls.count("finish") == 1
    trainer.policy.scheduler.step(1)
    trainer.policy.model.language_model.decoder.final_layernorm.weight.data.fill_(7)
    trainer.generator.generate(prompts[:1], SAMPLING)
    assert engine.calls.count("finish") == 2
    assert engine.calls.count("init") == 1
    assert bool((engine.weights["model.norm.weight"] == 7).all())


def test_frozen_weights_go_before_the_first_rollout_only(trainer, prompts, host):
    trainer.policy.model.freeze(["vision", "merger"])
    trainer.generator.generate(prompts[:1], SAMPLING)
    engine = host.engine
    assert any(name.startswith("visual.") for name in engine.weights)
    trained = {name for name in engine.weights if not name.startswith("visual.")}
    for forgets in (False, True, False):
        engine.weights.clear()
        if forgets:
            # An engine that has slept at level 2 has lost everything.
            trainer.generator._sent = None
        trainer.policy.scheduler.step(1)
        trainer.generator.generate(prompts[:1], SAMPLING)
        assert (engine.weights.keys() == trained) == (not forgets)
        assert trained <= engine.weights.keys()


def test_other_tokens_in_a_prompt_end_the_run_with_the_samples_name(trainer, prompts, host):
    trainer.generator.generate(prompts[:1], SAMPLING)
    host.engine.lies = True
    count = prompts[1].length
    message = (
        rf"sample two: vLLM's prompt has {count - 1} tokens and training's {count}, .* token \d+"
    )
    with pytest.raises(InputError, match=message):
        trainer.generator.generate(prompts[1:], SAMPLING)


def test_weights_that_change_on_the_way_end_the_run(trainer, prompts, monkeypatch):
    monkeypatch.setattr(
        DoubleEngine, "digests", lambda self: {"lm_head.weight": str(self.calls.count("finish"))}
    )
    with pytest.raises(RunFailed, match=r"1 of 1 parameters differ, the first is lm_head\.weight"):
        trainer.generator.generate(prompts[:1], SAMPLING)


def test_a_dead_engine_ends_the_run_and_stays_dead(trainer, prompts, host):
    trainer.generator.generate(prompts[:1], SAMPLING)
    host.engine.dies = True
    with pytest.raises(RunFailed, match="has died: Dead: the worker was killed"):
        trainer.generator.generate(prompts, SAMPLING)
    assert host.end() == 1
    with pytest.raises(RunFailed, match="has died"):
        trainer.generator.generate(prompts, SAMPLING)


def test_an_engine_that_stays_silent_is_given_up(trainer, prompts, host, monkeypatch):
    trainer.generator.generate(prompts[:1], SAMPLING)
    trainer.generator.fleet.own[0][1].timeout = 0.2
    monkeypatch.setattr(DoubleEngine, "is_busy", False)
    with pytest.raises(RunFailed, match=r"did not answer \(generation\) within .*timeout_seconds"):
        trainer.generator.generate(prompts[:1], SAMPLING)


def test_weights_do_not_change_under_a_running_generation(trainer, prompts, host, monkeypatch):
    trainer.generator.generate(prompts[:1], SAMPLING)
    monkeypatch.setattr(DoubleEngine, "is_busy", True)
    trainer.policy.scheduler.step(1)
    with pytest.raises(RunFailed, match="busy"):
        trainer.generator.generate(prompts[:1], SAMPLING)


def test_a_host_ends_when_the_last_trainer_leaves(trainer, prompts, host):
    trainer.generator.generate(prompts[:1], SAMPLING)
    trainer.generator.close()
    assert host.end() == 0
    assert host.engine.calls[-1] == "close"


def test_a_host_of_an_unknown_name_is_not_waited_for(checkpoint, world, ranks, tmp_path, host):
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.hosts = ["no-such-node.invalid:5600"]
    trainer = small_trainer(recipe, ranks, tmp_path)
    with pytest.raises(InputError, match=r"no engine at no-such-node\.invalid:5600 \(.*\[Errno"):
        trainer.generator.generate([], SAMPLING)


def test_an_address_where_nobody_listens_is_named(checkpoint, world, ranks, tmp_path, host):
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.hosts = ["127.0.0.1:1"]
    recipe.rollout.vllm.timeout_seconds = 0.2
    trainer = small_trainer(recipe, ranks, tmp_path)
    with pytest.raises(InputError, match=r"rollout\.vllm\.hosts: no engine at 127\.0\.0\.1:1"):
        trainer.generator.generate([], SAMPLING)


HANGS = """
import subprocess, sys, threading, types
from nemo_care.rollouts.vllm import host, messages

class Engine:
    def __init__(self, settings):
        print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
        threading.Event().wait()

module = types.ModuleType("nemo_care.rollouts.vllm.llm")
module.Engine = Engine
sys.modules[module.__name__] = module
host._PATIENCE = 0.5
serving = host.Host(None, b"", watches_stdin=True)
serving._accept = lambda: None
serving.events.put((object(), messages.Call(0, "open", {"settings": None})))
serving.serve()
"""


def test_a_host_whose_engine_hangs_ends_with_who_started_it():
    host = subprocess.Popen(
        [sys.executable, "-c", HANGS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        child = psutil.Process(int(host.stdout.readline()))
        host.stdin.close()
        assert host.wait(20) == -signal.SIGKILL
        child.wait(20)
    finally:
        host.kill()
        host.stdout.close()


def test_an_engine_with_another_secret_is_named(trainer, host, monkeypatch):
    ((_, engine),) = trainer.generator.fleet.own
    other = Engine("other", host.address, "another secret", engine.settings, timeout=5)
    with pytest.raises(InputError, match=r"another secret: give it the same NEMO_CARE_VLLM_KEY"):
        other.begin()


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


def sampled_twice(ranks: Ranks, job: tuple) -> list:
    """What this rank's groups hold, before and after an update."""
    checkpoint, world, out, address = job
    os.environ[VLLM_KEY.name] = KEY
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.hosts = [address]
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
    trainer.generator.close()
    return found


@pytest.mark.parametrize("pipeline", [1, 2])
def test_two_ranks_ask_one_engine_which_gets_the_weights_once_for_both(
    on_ranks, checkpoint, world, tmp_path, host, pipeline
):
    """As two replicas, and as two stages of one."""
    job = (checkpoint, world, tmp_path, host.address)
    ranks = on_ranks(Layout(pipeline=pipeline), sampled_twice, job, replicas=2 // pipeline)
    assert host.end() == 0
    indices = [[index for index, _ in found[0]] for found in ranks]
    if pipeline == 1:
        assert sorted(indices[0] + indices[1]) == [0, 1, 2, 3]
        assert len(indices[0]) == 2
    else:
        assert ranks[0] == ranks[1]
        assert indices[0] == [0, 1, 2, 3]
    assert all(len(texts) == 2 for found in ranks for step in found for _, texts in step)
    engine = host.engine
    assert engine.weights.keys() == load_file(checkpoint / "model.safetensors").keys()
    assert engine.calls.count("init") == 1
    assert engine.calls.count("finish") == 2
    assert len(engine.requests) == 8
