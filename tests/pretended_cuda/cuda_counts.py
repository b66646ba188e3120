"""What a program does with the pretended device."""

import sys
from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass
class Counts:
    """Counted since the last `clear`.

    Kernels by the operator's name. All else by its name and the place in nemo_care that caused it,
    such as "item models/log_probs.py:token_log_probs".
    """

    kernels: Counter[str] = field(default_factory=Counter)
    # The CPU waits until the GPU has computed a value.
    waits: Counter[str] = field(default_factory=Counter)
    # Copies to the GPU from memory that is not pinned.
    uploads: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    # Products of two float32 matrices, on the GPU.
    float32_products: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in fields(self):
            getattr(self, counter.name).clear()


COUNTS = Counts()


def place() -> str:
    """The innermost function of nemo_care that is running, or autograd's thread."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/nemo_care/" in file:
            return f"{file.rpartition('/nemo_care/')[2]}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "autograd"
