"""What a weight stream yields on each rank of a layout, and what a shared-memory sender sends.

    python tests/helpers/weight_stream_program.py CHECKPOINT WORLD OUT TENSOR PIPELINE

Each rank writes OUT/rank_N.pt: the differences to the checkpoint's file, and the metadata's.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from safetensors.torch import load_file
from small_runs import small_recipe

from nemo_care.errors import RunFailed
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks
from nemo_care.rollouts.vllm.shared_memory import SharedMemorySender
from nemo_care.rollouts.vllm.weight_stream import WeightStream
from nemo_care.training.build import load_model


class Receiver:
    """Keeps the names of what it is sent; fails at the second piece where it is told to."""

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


def main() -> None:
    checkpoint, world, out = map(Path, sys.argv[1:4])
    tensor, pipeline = map(int, sys.argv[4:6])
    ranks = Ranks(Layout(tensor=tensor, pipeline=pipeline), RankEnvironment.read())
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
    told = ranks.gather_in_replica(error)
    result = {"wrong": wrong, "names": names, "held": held, "told": told}
    result["missing"] = sorted(on_disk.keys() - set(names))
    result["pieces"] = len(receiver.pieces) if receiver is not None else None
    torch.save(result, out / f"rank_{ranks.rank}.pt")
    ranks.close()


main()
