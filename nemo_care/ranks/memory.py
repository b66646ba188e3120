"""Measure the memory of the rank that uses the most."""

import psutil
import torch
import torch.distributed as dist

from nemo_care.runs.metric import Metric
from nemo_care.runs.metrics import GPU_MEMORY, PROCESS_MEMORY

GIB = 2**30


def memory_metrics() -> dict[Metric, float | None]:
    """Return the largest process memory of a rank, and the largest GPU peak since the last call.

    In GiB; None for the GPU if there is none. Collective over all ranks.
    """
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    largest = torch.tensor([psutil.Process().memory_info().rss, peak], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    process, gpu = (largest / GIB).tolist()
    return {PROCESS_MEMORY: process, GPU_MEMORY: gpu if on_gpu else None}
