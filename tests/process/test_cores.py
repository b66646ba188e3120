"""A rank runs on the cores next to its GPU; the programs that it starts for others do not."""

import io
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from nemo_care.process import cores
from nemo_care.process.cores import bind_near, unbound
from nemo_care.ranks import distributed
from nemo_care.ranks.process_groups import RankEnvironment
from nemo_care.rollouts.vllm import local

GPU = "0000:dc:00.0"


@pytest.fixture
def allowed(monkeypatch):
    """The cores of this process, which it has again after the test."""
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(cores, "_unbound", None)
    yield before
    os.sched_setaffinity(0, before)


def machine(folder, monkeypatch, *, node: int, cpulist: str) -> None:
    """A machine whose GPU is on a node, and whose node 1 has these cores."""
    device, memory = folder / "bus/pci/devices" / GPU, folder / "devices/system/node/node1"
    device.mkdir(parents=True)
    memory.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (memory / "cpulist").write_text(f"{cpulist}\n")
    monkeypatch.setattr(cores, "_SYS", folder)


def test_a_rank_keeps_those_of_its_cores_that_are_near_its_gpu(allowed, tmp_path, monkeypatch):
    one = min(allowed)
    machine(tmp_path, monkeypatch, node=1, cpulist=f"{one},100000-100003")
    bind_near(GPU)
    assert os.sched_getaffinity(0) == {one}
    with unbound():
        assert os.sched_getaffinity(0) == allowed
    assert os.sched_getaffinity(0) == {one}


@pytest.mark.parametrize(
    ("node", "cpulist", "gpu"),
    [(-1, "0-1", GPU), (1, "100000-100003", GPU), (1, "0", "0000:00:00.0")],
    ids=["one node", "none of its own cores", "not listed"],
)
def test_nothing_changes_where_no_core_of_the_process_is_known_to_be_near(
    allowed, tmp_path, monkeypatch, node, cpulist, gpu
):
    machine(tmp_path, monkeypatch, node=node, cpulist=cpulist)
    bind_near(gpu)
    assert os.sched_getaffinity(0) == allowed
    with unbound():
        assert os.sched_getaffinity(0) == allowed


def test_each_rank_is_bound_near_the_gpu_that_it_uses(monkeypatch):
    """With CUDA's part made up."""
    bound = []
    gpus = [SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0) for bus in (12, 220)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **keywords: None)
    monkeypatch.setattr(distributed, "bind_near", bound.append)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    for rank in range(2):
        distributed.init_distributed(RankEnvironment(rank, 2, rank), 1)
    assert bound == ["0000:0c:00.0", GPU]


def test_an_engine_gets_the_cores_that_its_rank_gave_up(allowed, tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch, node=1, cpulist=str(min(allowed)))
    bind_near(GPU)
    started = []

    def start(*arguments, **keywords):
        started.append(os.sched_getaffinity(0))
        return SimpleNamespace(stdin=io.BytesIO(), pid=0)

    monkeypatch.setattr(subprocess, "Popen", start)
    local.HostProcess(None, tmp_path / "engine.log", None).start()
    assert started == [allowed]
