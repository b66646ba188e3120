"""Send weights to vLLM's workers on the same machine without a GPU: files in shared memory.

vLLM's own methods (NCCL, CUDA IPC) need GPUs. `worker.py` receives what is sent here.
"""

import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

# vLLM's workers import this module too.
if TYPE_CHECKING:
    from nemo_care.rollouts.vllm.engine import Engines
    from nemo_care.rollouts.vllm.weight_stream import WeightStream

# The name of this method among vLLM's.
BACKEND = "nemo_care_shared_memory"
_SHARED = Path("/dev/shm")


class SharedMemorySender:
    """Sends the tensors of a stream of weights, in pieces of bounded size."""

    def __init__(
        self, weights: "WeightStream", receiver: "Engines | None", bucket_bytes: int
    ) -> None:
        """Send `weights` to `receiver`; ranks without one only take part in the iteration."""
        self.weights = weights
        self.receiver = receiver
        self.bucket_bytes = bucket_bytes
        self._is_known = False

    def send_weights(self) -> None:
        """Send the weights; all ranks of the replica call it.

        If the engine fails, the iteration continues to its end before the error is raised, because
        the other ranks take part in it.
        """
        failure: Exception | None = None
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0

        def attempt(step: str, *arguments: object) -> None:
            nonlocal failure
            if failure is None and self.receiver is not None:
                try:
                    getattr(self.receiver, step)(*arguments)
                except Exception as error:
                    failure = error

        def flush() -> None:
            nonlocal size
            if bucket and failure is None:
                with tempfile.NamedTemporaryFile(dir=_folder(), prefix="nemo-care-") as file:
                    info = write_bucket(Path(file.name), bucket)
                    attempt("update_weights", info | {"trained_only": self.weights.trained_only})
            bucket.clear()
            size = 0

        if not self._is_known:
            attempt("init_weight_transfer_engine", {})
        self._is_known = failure is None
        attempt("start_weight_update")
        for name, tensor in self.weights:
            if self.receiver is None:
                continue
            bucket.append((name, tensor.detach().cpu().contiguous()))
            size += tensor.numel() * tensor.element_size()
            if size >= self.bucket_bytes:
                flush()
        flush()
        attempt("finish_weight_update")
        if failure is not None:
            raise failure


def write_bucket(path: Path, bucket: list[tuple[str, torch.Tensor]]) -> dict:
    """Write tensors one after another, and return what their receiver needs."""
    checksum = 0
    with path.open("wb") as file:
        for _, tensor in bucket:
            content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            checksum = zlib.crc32(content, checksum)
            file.write(content)
    return {
        "path": str(path),
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "checksum": checksum,
    }


def _folder() -> str | None:
    return str(_SHARED) if _SHARED.is_dir() else None
