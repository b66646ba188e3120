"""Hide library messages that a user can't act on; the screen is for the run.

Errors are still shown. `environment.VERBOSE` shows everything.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_care.process.environment import VERBOSE

_LOGGERS = (
    "lightning.fabric",
    "lightning.pytorch",
    # Lightning resets its own level when it is imported; this logger keeps its level.
    "lightning.pytorch.utilities.rank_zero",
    "megatron",
    "nv_one_logger",
    "pytorch_lightning",
    "torch.distributed.elastic",
)


def quiet_libraries() -> None:
    """Hide warnings and information of Megatron, NeMo, Lightning and torch in this process."""
    if VERBOSE.is_on:
        return
    warnings.filterwarnings("ignore")
    # transformers shows a bar for each load of a few tensors.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Hide what this process, C libraries included, writes to stderr in the block.

    Only for a process in which no other thread writes to stderr.
    """
    if VERBOSE.is_on:
        yield
        return
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
