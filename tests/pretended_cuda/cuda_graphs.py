"""CUDA graphs: what is captured is not done, and is repeated on the same memory by a replay."""

from typing import Any, ClassVar

import torch
from cuda_counts import COUNTS
from cuda_rules import Capturing, tensors, written


class CUDAGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    capturing: ClassVar["CUDAGraph | None"] = None

    def __init__(self) -> None:
        """Nothing is captured yet."""
        self._calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        # Memory of the graph, by storage; memory from outside, and what it held before.
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def check(self) -> None:
        """Refuse what the CPU would do or learn only once."""
        if COUNTS.waits != self._waits or COUNTS.uploads != self._uploads:
            new = (COUNTS.waits - self._waits) + (COUNTS.uploads - self._uploads)
            raise Capturing(f"operation not permitted when stream is capturing: {dict(new)}")

    def record(self, func: Any, compute: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute for the shapes; what memory from outside held comes back when capturing ends."""
        for _, value in written(func, args, kwargs):
            for tensor in tensors([value]):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._own:
                    self._before.setdefault(storage._cdata, (storage, storage.clone()))
        outside = {t.untyped_storage()._cdata for t in tensors((*args, *kwargs.values()))}
        out = compute(*args, **kwargs)
        self._own |= {t.untyped_storage()._cdata for t in tensors([out])} - outside
        self._calls.append((compute, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Repeat what was captured; one launch for the CPU."""
        COUNTS.kernels["replay"] += 1
        for compute, args, kwargs, out in self._calls:
            again = compute(*args, **kwargs)
            for old, new in zip(tensors([out]), tensors([again]), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)
            for item in again if isinstance(again, tuple) else ():
                if isinstance(item, torch.ScriptObject):
                    # The work of a collective.
                    item.wait()

    def __enter__(self) -> "CUDAGraph":
        """Capture from here on."""
        self._waits, self._uploads = COUNTS.waits.copy(), COUNTS.uploads.copy()
        CUDAGraph.capturing = self
        return self

    def __exit__(self, *error: object) -> None:
        """Capture no more."""
        CUDAGraph.capturing = None
        for storage, before in self._before.values():
            storage.copy_(before)


def capture(graph: CUDAGraph, **unused: Any) -> CUDAGraph:
    """Stand for `torch.cuda.graph`."""
    return graph
