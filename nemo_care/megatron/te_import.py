"""Hide a TransformerEngine that is installed but can't be imported from Megatron Core.

Without NVIDIA's driver (a login node, a CI machine), or with one of its parts missing, importing
TransformerEngine raises OSError, FileNotFoundError, AssertionError or RuntimeError. Megatron Core
0.16.1 imports it in forty places and handles only ImportError, so its own import would fail.
"""

import importlib
import importlib.abc
import sys
from functools import cache
from importlib.util import find_spec

from nemo_care.errors import first_line

_NAMES = ("transformer_engine", "transformer_engine_torch")


@cache
def why_unusable() -> str | None:
    """Return why the installed TransformerEngine can't be imported, in one line.

    After that, every further import of it raises ImportError, as if it were not installed. None: it
    can be imported, or is not installed.
    """
    if find_spec(_NAMES[0]) is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        # Modules loaded before the failure must not be found again.
        for name in [name for name in sys.modules if name.partition(".")[0] in _NAMES]:
            del sys.modules[name]
        for name in _NAMES:
            sys.modules[name] = None  # type: ignore[assignment]
        return f"{type(error).__name__}: {first_line(error)}"
    return None


class _BeforeMegatron(importlib.abc.MetaPathFinder):
    """Checks TransformerEngine when Megatron Core is about to be imported; finds no module."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "megatron.core":
            sys.meta_path.remove(self)
            why_unusable()


def check_before_megatron() -> None:
    """Call `why_unusable` right before this process imports Megatron Core, if it ever does."""
    sys.meta_path.insert(0, _BeforeMegatron())
