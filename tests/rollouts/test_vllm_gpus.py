"""What sending weights to engines on the same GPUs asks of memory and addresses, without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from nemo_care.planning.engines import beside, engine_plan
from nemo_care.planning.gpus import GIB
from nemo_care.planning.shapes import read_model_shape
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import Recipe
from nemo_care.recipe.vllm import VLLMConfig
from nemo_care.rollouts.vllm import fleet as fleets
from nemo_care.rollouts.vllm.generator import VLLMGenerator
from nemo_care.rollouts.vllm.local import LocalActor
from nemo_care.rollouts.vllm.weight_stream import Described
from nemo_care.rollouts.vllm.weight_sync import (
    _free_address,
    ipc_buffer_bytes,
    without_expandable_segments,
)

EMBEDDING_7B = 152064 * 3584 * 2


def test_the_buffer_holds_the_largest_tensor():
    weights = SimpleNamespace(
        metadata=lambda: [
            Described("model.embed_tokens.weight", torch.bfloat16, (152064, 3584)),
            Described("model.norm.weight", torch.bfloat16, (3584,)),
        ]
    )
    assert ipc_buffer_bytes(weights, 512 * 2**20) == EMBEDDING_7B
    assert ipc_buffer_bytes(weights, 2 * GIB) == 2 * GIB


def test_a_plan_counts_the_buffer_where_engines_share_the_gpus():
    sizes = read_model_shape("Qwen2.5-VL-7B-Instruct").architecture
    recipe = Recipe()
    recipe.rollout.backend = "vllm"
    gpu = SimpleNamespace(memory=80 * GIB)
    plan = engine_plan(recipe, sizes, 8 * 10**9, gpu)
    assert plan.buffer == EMBEDDING_7B
    assert beside(plan, "rollout") == plan.share + EMBEDDING_7B
    assert beside(plan, "update") == plan.asleep
    recipe.rollout.vllm = VLLMConfig(placement="separate", gpus=[0])
    assert engine_plan(recipe, sizes, 8 * 10**9, gpu).buffer == 0


def test_memory_goes_back_to_cuda_before_engines_start_and_wake(monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("emptied"))
    ranks = SimpleNamespace(
        together=lambda do: do(), barrier=lambda: happened.append("all ranks"), layout=Layout()
    )
    fleet = fleets.Fleet.__new__(fleets.Fleet)
    fleet.vllm, fleet.ranks, fleet.sleep_level, fleet.feeds = VLLMConfig(), ranks, 1, False
    fleet.own = []
    monkeypatch.setattr(fleet, "start", lambda: happened.append("start"), raising=False)
    generator = VLLMGenerator.__new__(VLLMGenerator)
    generator.fleet, generator.ranks, generator.version = fleet, ranks, lambda: 0
    generator.weights = SimpleNamespace(ranks=ranks)
    generator.from_checkpoint, generator._asleep, generator._started = False, False, False
    generator._sender = generator._sent = None
    monkeypatch.setattr(
        generator, "_tell", lambda name, **more: happened.append(name), raising=False
    )
    generator._wake()
    assert happened == ["emptied", "all ranks", "start"]
    generator._wake()
    assert happened == ["emptied", "all ranks", "start"]
    generator.rest()
    del happened[:]
    generator._wake()
    assert happened == ["emptied", "all ranks", "wake_up", "wake_up"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_another_process_opens_is_no_expandable_segment(monkeypatch, name):
    given = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append)
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    with without_expandable_segments():
        assert given == []
    settings = "expandable_segments:True,garbage_collection_threshold:0.8"
    monkeypatch.setenv(name, settings)
    with without_expandable_segments():
        assert given == ["expandable_segments:False,garbage_collection_threshold:0.8"]
    assert given[-1] == settings


def test_engines_get_the_address_by_which_they_reach_the_trainer():
    engine = SimpleNamespace(actor=LocalActor("/tmp/engine", b"", None))
    host, port = _free_address([engine])
    assert host == "127.0.0.1"
    assert port > 0
