"""Checkpoints hold the moment at which they were asked for, and are only loaded when whole."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pickle
import re
import shutil
import stat
import threading
import types
import zlib
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from records import lines
from small_runs import small_recipe, small_trainer
from torch.distributed.checkpoint.api import CheckpointException

from nemo_care.checkpoints import writer as checkpoint_writer
from nemo_care.checkpoints.manifest import NAME, read_manifest, read_record
from nemo_care.checkpoints.pickles import load
from nemo_care.checkpoints.store import (
    check_writable,
    discard,
    list_checkpoints,
    load_checkpoint,
    remove_left_overs,
    stored_shapes,
    verify_checkpoint,
)
from nemo_care.checkpoints.writer import PendingCheckpoint, _StateWriter
from nemo_care.errors import CheckpointError, DamagedCheckpoint, InputError
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.compose import read_recipe


def made_state(value: float = 1.0, **extra) -> dict:
    """A tensor of its own and a slice of a larger one, and a plain value."""
    tensors = {"whole": torch.full((5, 3), value), "slice": torch.full((9,), value)[2:6]}
    sharded = {
        name: ShardedTensor.from_rank_offsets(f"policy.{name}", tensor)
        for name, tensor in tensors.items()
    }
    return {"policy": sharded, "trainer": {"step": int(value)}, **extra}


def save(folder: Path, step: int, state: dict | None = None, **keep: int) -> Path:
    pending = PendingCheckpoint(folder, step, state or made_state(), recipe="")
    return pending.finish(**({"keep_last": 0, "keep_every": 0} | keep))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole_run(checkpoint, world, ranks, tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 2
    recipe.checkpoint.save_interval = 1
    small_trainer(recipe, ranks, folder).fit()
    return folder


@pytest.fixture
def run(whole_run, tmp_path):
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


@pytest.fixture
def held_back(monkeypatch):
    """Nothing is written until this event is set."""
    event = threading.Event()
    write = _StateWriter.write

    def wait_and_write(writer):
        assert event.wait(60)
        return write(writer)

    monkeypatch.setattr(_StateWriter, "write", wait_and_write)
    yield event
    event.set()


def test_training_on_while_a_checkpoint_is_written_does_not_change_it(ranks, tmp_path, held_back):
    state = made_state(3.0)
    tensors = [entry.data for entry in state["policy"].values()]
    pending = PendingCheckpoint(tmp_path, 3, state, recipe="")
    for tensor in tensors:
        tensor.zero_()
    state["trainer"]["step"] = 4
    assert not pending.is_written()
    assert list_checkpoints(tmp_path) == []
    held_back.set()
    path = pending.finish(keep_last=0, keep_every=0)
    loaded = load_checkpoint(path, made_state)
    assert all(bool((tensor == 3.0).all()) for tensor in loaded["policy"].values())
    assert loaded["trainer"] == {"step": 3}


def test_a_slice_is_written_without_the_memory_around_it(ranks, tmp_path):
    large = torch.zeros(1_000_000)
    state = {"policy": {"few": ShardedTensor.from_rank_offsets("policy.few", large[:4])}}
    (record,) = [r for r in read_manifest(save(tmp_path, 1, state)).values() if r.part]
    assert record.bytes < 10_000


def test_an_asynchronous_run_writes_what_a_synchronous_one_writes(
    checkpoint, world, ranks, tmp_path, held_back
):
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 3  # a checkpoint after the second
    files = []
    for asynchronous in (False, True):
        recipe.checkpoint.asynchronous = asynchronous
        trainer = small_trainer(recipe, ranks, tmp_path / str(asynchronous))
        if asynchronous:
            held_back.clear()
            record = trainer.record
            trainer.record = lambda step, record=record: (
                record(step),
                held_back.set() if step.number == 3 else None,
            )
        else:
            held_back.set()
        trainer.fit()
        path = trainer.files.checkpoints / "step_000002"
        files.append({name: r for name, r in read_manifest(path).items() if r.part})
    assert {record.part for record in files[0].values()} == {"policy", "optimizer", "reference"}
    assert files[0] == files[1]
    (first, *_, last) = lines(tmp_path / "True" / "metrics.jsonl")
    assert first["timing/checkpoint"] == 0.0 < last["timing/checkpoint"]


def test_saving_starts_no_process(ranks, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("multiprocessing.util.spawnv_passfds", refuse)
    before = psutil.Process().children()
    save(tmp_path, 1)
    assert psutil.Process().children() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_a_checkpoint_says_what_it_is(recipe, whole_run):
    _, path = list_checkpoints(whole_run / "checkpoints")
    recipe.trainer.max_steps = 2
    recipe.checkpoint.save_interval = 1
    manifest = json.loads((path / NAME).read_text())
    assert manifest["step"] == 2
    assert manifest["ranks"] == 1
    assert manifest["layout"] == {"tensor": 1, "pipeline": 1, "data": 1, "expert": 1}
    assert set(manifest["files"]) == set(names(path)) - {NAME}
    assert read_recipe(path / "recipe.yaml") == recipe


def test_the_last_and_each_so_many_checkpoints_are_kept(ranks, tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert names(tmp_path) == [f"step_{step:06d}" for step in (3, 6, 7)]


def test_a_kill_while_a_checkpoint_is_removed_leaves_none_in_its_place(
    ranks, tmp_path, monkeypatch
):
    path = save(tmp_path, 1)

    def killed(path, **_):
        (path / NAME).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(path)
    assert list_checkpoints(tmp_path) == []


def test_what_somebody_still_reads_is_removed_at_the_next_start(ranks, run, monkeypatch):
    """NFS keeps files that are open, and their folder."""
    folder = run / "checkpoints"

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(folder, 3, keep_last=2)
        assert [path.name for path in list_checkpoints(folder)] == ["step_000002", "step_000003"]
        assert len(names(folder)) == 3
    remove_left_overs(folder)
    assert names(folder) == ["step_000002", "step_000003"]


def test_a_checkpoint_that_is_a_link_can_be_removed(ranks, tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    save(tmp_path / "checkpoints", 2, keep_last=1)
    assert names(tmp_path / "checkpoints") == ["step_000002"]
    assert (elsewhere / NAME).exists()


def test_a_file_system_that_can_not_sync_folders_will_do(ranks, tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    verify_checkpoint(save(tmp_path, 1))


# ---------------------------------------------------------------------- damage


def largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)


def flip_a_bit(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 16]))


def truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (None, truncate, "bytes, .* were written"),
        (None, flip_a_bit, "its content changed"),
        (None, Path.unlink, "No such file"),
        ("common.pt", flip_a_bit, "its content changed"),
        (".metadata", truncate, "bytes, .* were written"),
        (NAME, Path.unlink, "missing; the checkpoint was not completed"),
        (NAME, truncate, "not a manifest"),
    ],
)
def test_a_damaged_checkpoint_is_found_with_the_file(ranks, run, name, damage, said):
    newest = run / "checkpoints" / "step_000002"
    file = newest / name if name else largest(newest)
    damage(file)
    with pytest.raises(DamagedCheckpoint, match=rf"{re.escape(str(file))}.*{said}"):
        verify_checkpoint(newest)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_taken(recipe, ranks, run, capsys):
    file = largest(run / "checkpoints" / "step_000002")
    flip_a_bit(file)
    trainer = small_trainer(recipe, ranks, run)
    trainer.resume()
    assert trainer.step == 1
    assert names(run / "checkpoints") == ["step_000001", "step_000002.damaged"]
    (record,) = lines(run / "damaged_checkpoints.jsonl")
    assert record["checkpoint"] == "step_000002"
    assert record["set_aside_as"] == "step_000002.damaged"
    said = capsys.readouterr().out
    assert str(file) in record["reason"]
    assert record["reason"] in said
    assert "resumed after step 1" in said


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(recipe, ranks, run):
    for path in list_checkpoints(run / "checkpoints"):
        flip_a_bit(largest(path))
    # Not at the next start either.
    for _ in range(2):
        with pytest.raises(InputError, match=r"step_000001\.damaged, step_000002\.damaged"):
            small_trainer(recipe, ranks, run).resume()


def test_a_step_that_is_saved_again_replaces_what_was_there(ranks, tmp_path):
    save(tmp_path, 1, made_state(1.0))
    path = save(tmp_path, 1, made_state(2.0))
    assert load_checkpoint(path, made_state)["policy"]["whole"].mean() == 2.0
    assert names(tmp_path) == ["step_000001"]


def test_what_a_killed_run_left_is_removed(recipe, ranks, run):
    for left in ("step_000003.partial-0a1b2c3d", "step_000001.removed-00ff00ff"):
        (run / "checkpoints" / left).mkdir()
    small_trainer(recipe, ranks, run).resume()
    assert names(run / "checkpoints") == ["step_000001", "step_000002"]


def test_only_the_parts_that_are_asked_for_are_read(ranks, run):
    path = run / "checkpoints" / "step_000002"
    for name, record in read_manifest(path).items():
        if record.part == "optimizer":
            flip_a_bit(path / name)
    verify_checkpoint(path, {"policy"})
    with pytest.raises(DamagedCheckpoint):
        verify_checkpoint(path)


# ---------------------------------------------------------------------- errors


def halves_of(value: float) -> dict:
    """Half of a vector on each rank."""
    half = torch.full((1000,), value + dist.get_rank())
    sharded = ShardedTensor.from_rank_offsets(
        "policy.vector", half, (0, dist.get_rank(), dist.get_world_size())
    )
    return {"policy": {"vector": sharded}, "trainer": {"step": value}}


def save_halves(folder: Path, step: int) -> None:
    pending = PendingCheckpoint(folder, step, halves_of(step), recipe="")
    while not pending.is_written():
        pass
    pending.finish(keep_last=2, keep_every=0)


def loaded_halves(path: Path) -> list[float]:
    """The values of both halves."""
    half = load_checkpoint(path, lambda: halves_of(0.0))["policy"]["vector"]
    halves = [torch.zeros(1000) for _ in range(dist.get_world_size())]
    dist.all_gather(halves, half)
    return sorted(set(torch.cat(halves).tolist()))


def save_on_a_full_disk(ranks, folder: Path) -> dict:
    """Two ranks save, and the disk of the second is full; before, each has a folder of its own."""
    checkpoints = folder / "checkpoints"
    met: dict = {}
    check_writable(checkpoints)
    try:
        check_writable(folder / f"of_rank_{ranks.rank}")
    except InputError as error:
        met["apart"] = str(error).partition(": ")[2]
    save_halves(checkpoints, 1)

    write = _StateWriter.write

    def full(writer):
        write(writer)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.folder))

    if ranks.rank == 1:
        _StateWriter.write = full
    try:
        save_halves(checkpoints, 2)
    except CheckpointError as error:
        met["full"] = str(error)
    _StateWriter.write = write
    met["left"] = sorted(path.name for path in checkpoints.iterdir())
    ranks.barrier()
    met["first"] = loaded_halves(checkpoints / "step_000001")
    # Now there is room again.
    save_halves(checkpoints, 2)
    met["second"] = loaded_halves(checkpoints / "step_000002")
    if ranks.rank == 0:
        file = checkpoints / "step_000002" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    ranks.barrier()
    try:
        loaded_halves(checkpoints / "step_000002")
    except DamagedCheckpoint as error:
        met["damaged"] = str(error)
    return met


def test_a_full_disk_of_one_rank_reaches_both_and_harms_no_older_checkpoint(on_ranks, tmp_path):
    first, second = on_ranks(Layout(), save_on_a_full_disk, tmp_path, replicas=2)
    assert first == second
    assert "step 2 could not be written" in first["full"]
    assert "No space left on device" in first["full"]
    assert "(rank 1); complete older ones there: step_000001;" in first["full"]
    assert first["left"] == ["step_000001"]
    assert "files from rank 0 do not appear there" in first["apart"]
    assert "(rank 1)" in first["apart"]
    assert (first["first"], first["second"]) == ([1.0, 2.0], [2.0, 3.0])
    assert "__1_0.distcp: its content changed" in first["damaged"]


def test_an_error_while_a_checkpoint_is_completed_leaves_nothing_of_it(
    ranks, tmp_path, monkeypatch
):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; .* step_000001;"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"]


def test_a_folder_that_can_not_be_written_to_is_found_before_the_first_step(
    recipe, ranks, tmp_path
):
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.files.checkpoints.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="checkpoints: no checkpoint can be written there"):
        trainer.fit()
    assert trainer.step == 0


def test_a_checkpoint_that_can_not_be_begun_says_why(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        PendingCheckpoint(tmp_path / "file", 1, made_state(), recipe="")


# ---------------------------------------------------------------------- pickles


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def sign(path: Path) -> None:
    """Make the manifest of a changed checkpoint right again, as its author could."""
    manifest = json.loads((path / NAME).read_text())
    for name, record in manifest["files"].items():
        record |= dataclasses.asdict(read_record(path / name)) | {"part": record["part"]}
    (path / NAME).write_text(json.dumps(manifest))


def state_with_object(value: object) -> dict:
    state = made_state()
    state["policy"]["object"] = ShardedObject("policy.object", value, (1,), (0,))
    return state


def checkpoint_with(evil: Evil, place: str, folder: Path) -> tuple[Path, dict]:
    """A checkpoint that holds this in a file or as an object, and the state of that form."""
    state = state_with_object(evil if place == "object" else "plain")
    path = save(folder, 1, state)
    if place == ".metadata":
        (path / place).write_bytes(pickle.dumps(evil))
    elif place == "common.pt":
        torch.save({"evil": evil}, path / place)
    return path, state


@pytest.mark.parametrize("place", [".metadata", "common.pt", "object"])
def test_a_pickle_that_would_run_code_is_refused(ranks, tmp_path, place):
    evil = Evil(tmp_path / "mark")
    path, state = checkpoint_with(evil, place, tmp_path / "checkpoints")
    sign(path)
    file = "distcp" if place == "object" else place
    with pytest.raises(InputError, match=rf"{file}.*mkdir"):
        load_checkpoint(path, lambda: state)
    if place == ".metadata":
        with pytest.raises(
            InputError, match=r"posix\.mkdir: not a checkpoint that nemo-care wrote"
        ):
            stored_shapes(path)
    assert not evil.mark.exists()
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(evil))
    assert evil.mark.exists()


def with_index(path: Path, change) -> None:
    """Change a checkpoint's index, and sign it again."""
    index = pickle.loads((path / ".metadata").read_bytes())
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    sign(path)


def with_first_place(path: Path, **changed: object) -> None:
    """Change where the index finds its first tensor."""
    with_index(path, lambda index: vars(next(iter(index.storage_data.values()))).update(changed))


class Decoder:
    """Stands for zstandard's: it decompresses what comes after this mark."""

    MARK = b"COMPRESSED:"

    def stream_reader(self, stream):
        compressed = stream.read(-1).partition(self.MARK)[2]
        return io.BytesIO(zlib.decompressobj().decompress(compressed))


def test_an_object_that_would_be_decoded_before_it_is_loaded_is_refused(
    ranks, tmp_path, monkeypatch
):
    """Its bytes are plain values as they are, and run code once they are decoded."""
    monkeypatch.setattr(
        "torch.distributed.checkpoint._extension.zstandard",
        types.SimpleNamespace(ZstdDecompressor=Decoder),
    )
    evil = Evil(tmp_path / "mark")
    decoded = io.BytesIO()
    torch.save(evil, decoded)
    harmless = torch.tensor(list(Decoder.MARK + zlib.compress(decoded.getvalue()))).byte()
    state = state_with_object(harmless)
    path = save(tmp_path / "checkpoints", 1, state)

    def decode(index):
        (place,) = [p for key, p in index.storage_data.items() if "object" in key.fqn]
        place.transform_descriptors = ["stream.zstd/1"]

    with_index(path, decode)
    with pytest.raises(InputError, match=r"\.metadata names policy.object.* to be decoded"):
        load_checkpoint(path, lambda: state)
    assert not evil.mark.exists()
    # Megatron's own loading runs it, and stumbles over the None that comes of it.
    with contextlib.suppress(TypeError):
        dist_checkpointing.load(state, str(path))
    assert evil.mark.exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"relative_path": "../elsewhere.distcp"}, "outside of the checkpoint"),
        ({"relative_path": "/etc/passwd"}, "outside of the checkpoint"),
        ({"relative_path": ".."}, "outside of the checkpoint"),
        ({"length": -1}, "at bytes"),
        ({"offset": -1}, "at bytes"),
        ({"offset": "0"}, "at bytes"),
        ({"transform_descriptors": ["unknown/1"]}, "to be decoded"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(ranks, tmp_path, changed, said):
    path = save(tmp_path / "checkpoints", 1)
    with_first_place(path, **changed)
    with pytest.raises(InputError, match=rf"\.metadata names policy\..*{said}"):
        load_checkpoint(path, made_state)


def test_a_tensor_after_the_end_of_its_file_is_refused(ranks, tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    with_first_place(path, length=1e9)
    with pytest.raises(InputError, match="at bytes"):
        load_checkpoint(path, made_state)
    with_first_place(path, length=10**9)
    with pytest.raises(InputError, match="bytes after the end of"):
        load_checkpoint(path, made_state)
    with_first_place(path, relative_path="__9_9.distcp", length=1)
    with pytest.raises(DamagedCheckpoint, match=r"__9_9\.distcp: No such file"):
        load_checkpoint(path, made_state)


@pytest.mark.parametrize("place", [".metadata", "common.pt", "object"])
def test_the_loading_itself_runs_no_code(ranks, tmp_path, monkeypatch, place):
    """Also of files that another process changed after they were checked."""
    # What torch.load would listen to where it isn't said.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    evil = Evil(tmp_path / "mark")
    path, state = checkpoint_with(evil, place, tmp_path / "checkpoints")
    with pytest.raises((CheckpointException, pickle.UnpicklingError), match="mkdir"):
        load(state, path)
    assert not evil.mark.exists()


def test_objects_of_plain_values_and_tensors_are_loaded(ranks, tmp_path):
    value = {"step": 3, "tensor": torch.arange(4), "name": "AdamW"}
    state = state_with_object(value)
    path = save(tmp_path / "checkpoints", 1, state)
    loaded = load_checkpoint(path, lambda: state_with_object(None))["policy"]["object"]
    assert (loaded["step"], loaded["name"]) == (3, "AdamW")
    assert loaded["tensor"].tolist() == [0, 1, 2, 3]


def test_an_index_of_another_kind_is_refused(ranks, tmp_path):
    path = save(tmp_path, 1)
    (path / ".metadata").write_bytes(pickle.dumps(["a list"]))
    with pytest.raises(InputError, match="holds a list"):
        stored_shapes(path)
