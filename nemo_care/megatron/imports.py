"""Import Megatron Core and transformers without optional packages that are not used here.

Both look for optional packages, and Megatron compiles fused functions that are not used on a CPU.
Without these, each process starts two seconds sooner.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

# For logging in Megatron's own inference engine, transformers' assisted decoding, and its losses of
# object detection. None is needed; W&B's logger finds its package afterwards.
_NEVER_USED = ("wandb", "sklearn", "scipy")


def import_lightly() -> None:
    """Import both; for commands that need them anyway, before their own modules are imported."""
    if "megatron.core" in sys.modules:
        return
    with _absent(_NEVER_USED), _compiling_late():
        import_module("megatron.core")
        import_module("transformers.generation.candidate_generator")  # looks for sklearn
        import_module("transformers.loss.loss_utils")  # looks for scipy


@contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """Hide packages that are not loaded yet."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _compiling_late() -> Iterator[None]:
    """Compile functions at their first call, on a machine without CUDA.

    `torch.compile` loads torch's compiler for every function that it decorates.
    """
    import torch

    compile_now = torch.compile
    if torch.cuda.is_available():
        yield
        return

    def compile_late(model: Callable | None = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_late, **options)
        compiled: list[Callable] = []

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(model, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_late
    try:
        yield
    finally:
        torch.compile = compile_now
