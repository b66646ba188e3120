"""Imports the Python half of TransformerEngine on a machine without CUDA, as a plugin of pytest.

    NEMO_CARE_TE=FOLDER PYTHONPATH=tests/te pytest -p te_python_half -m te tests/te

FOLDER holds the wheel `transformer_engine` of PyPI (1 MB; `pip install --no-deps --target FOLDER`).
Its compiled halves are missing there: the extension `transformer_engine_torch` becomes a module
whose enumerations are numbered by name and whose kernels raise, unless `te_kernels.py` has written
them in torch. All else is TransformerEngine's own code: constructors, parameters and their marks,
states, recipes, the optimizer, the choice of attention's backend.

A plugin, because Megatron looks for TransformerEngine when it is imported, which the tests' own
`conftest.py` does.
"""

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

EXTENSION = "transformer_engine_torch"
# What is imported and never called here: compilers of kernels, exports, an inspector.
ABSENT = ("triton", "onnxscript", "nvdlfw_inspect")
# transformer_engine.h; the values of the others don't matter, so they are numbered by name.
ENUMERATIONS = {
    "DType": {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6,
              "kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10},
    "FP8FwdTensors": {f"GEMM{n}_{what}": 3 * n - 3 + place for n in (1, 2, 3)
                      for place, what in enumerate(("INPUT", "WEIGHT", "OUTPUT"))},
    "FP8BwdTensors": {f"GRAD_{what}{n}": 2 * n - 2 + place for n in (1, 2, 3)
                      for place, what in enumerate(("OUTPUT", "INPUT"))},
    "NVTE_Fused_Attn_Backend": {"NVTE_F16_max512_seqlen": 0, "NVTE_F16_arbitrary_seqlen": 1,
                                "NVTE_FP8": 2, "NVTE_No_Backend": -1},
}  # fmt: skip
# Functions of the extension by name; te_kernels.py adds to them.
FUNCTIONS: dict[str, Callable] = {
    "get_cublasLt_version": lambda: 130100,
    "get_cudnn_version": lambda: 91200,
    "get_num_cublas_streams": lambda: 4,
}
# Which functions of the extension were called, in order.
CALLS: list[str] = []
# These modules refuse tensors that are not on a GPU, before they call a kernel.
GUARDED = (
    "transformer_engine.pytorch.module.base",
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention",
    "transformer_engine.pytorch.attention.dot_product_attention.backends",
)
H100 = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 << 30
)


def name_of_dtype(value: int) -> str:
    """Such as Float32, of a number of the extension's DType."""
    return sys.modules[EXTENSION].DType(int(value)).name.removeprefix("k")


def no_fused_attention() -> enum.IntEnum:
    """What the extension says where cuDNN has no kernel."""
    return sys.modules[EXTENSION].NVTE_Fused_Attn_Backend.NVTE_No_Backend


class _ByName(type):
    """An enumeration whose members are numbered at first use."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = hash(f"{cls.__name__}.{name}") % 2**31
        setattr(cls, name, value)
        return value


class _Extension(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = self._made(name)
        setattr(self, name, made)
        return made

    @staticmethod
    def _made(name: str) -> object:
        if name in ENUMERATIONS:
            return enum.IntEnum(name, ENUMERATIONS[name])
        if name[0].isupper() and not name.isupper():
            return _ByName(name, (), {"__init__": lambda self, *a, **k: None})

        def function(*arguments: object, **keywords: object) -> object:
            CALLS.append(name)
            if name not in FUNCTIONS:
                raise AssertionError(f"{EXTENSION}.{name} is a CUDA kernel, and was called")
            return FUNCTIONS[name](*arguments, **keywords)

        return function


class _Anything:
    """What an absent package exports: decorators that change nothing, names that lead nowhere."""

    def __call__(self, *arguments: object, **keywords: object) -> object:
        if len(arguments) == 1 and callable(arguments[0]) and not keywords:
            return arguments[0]
        return self

    def __getattr__(self, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> "_Anything":
        return self

    def __contains__(self, key: object) -> bool:
        return False

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (object,)


class _Absent(types.ModuleType):
    __path__: tuple = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return type(name, (), {"__init__": lambda self, *a, **k: None})
        return _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Changes how three kinds of modules are loaded."""

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name != "transformer_engine.common" and name not in GUARDED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (
            self._without_guards(module, spec)
            if name in GUARDED
            else self._without_libraries(module, execute)
        )
        return spec

    def create_module(self, spec: object) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...

    @staticmethod
    def _without_libraries(module: types.ModuleType, execute: Callable) -> None:
        """transformer_engine.common loads no shared objects while the project is built."""
        os.environ["NVTE_PROJECT_BUILDING"] = "1"
        try:
            execute(module)
        finally:
            del os.environ["NVTE_PROJECT_BUILDING"]
        module.load_framework_extension = lambda framework: None

    @staticmethod
    def _without_guards(module: types.ModuleType, spec: object) -> None:
        text = Path(spec.origin).read_text()
        text = re.sub(r"\b\w+\.is_cuda\b|\btorch\.cuda\.is_available\(\)", "True", text)
        exec(compile(text, spec.origin, "exec"), vars(module))


def install(folder: Path) -> None:
    """Let `import transformer_engine.pytorch` find FOLDER's, for the rest of this process."""
    assert "megatron.core" not in sys.modules, "Megatron looks for TransformerEngine on import"
    os.environ.update(CUDA_VISIBLE_DEVICES="", NVTE_TORCH_COMPILE="0")
    sys.path.insert(0, str(folder))
    extension = _Extension(EXTENSION)
    sources = [path.read_text() for path in (folder / "transformer_engine/pytorch").rglob("*.py")]
    # For `from transformer_engine_torch import *`: what its importers use.
    names = {name for text in sources for name in re.findall(r"\btex\.([A-Za-z]\w*)", text)}
    if not any("NVTE_F16_max512_seqlen" in text for text in sources):
        del ENUMERATIONS["NVTE_Fused_Attn_Backend"]["NVTE_F16_max512_seqlen"]
    extension.__all__ = sorted(names | set(ENUMERATIONS) | set(FUNCTIONS))
    sys.modules[EXTENSION] = extension
    sys.meta_path.insert(0, _Finder())

    import torch

    torch.cuda.get_device_properties = lambda *device: H100
    torch.cuda.get_device_capability = lambda *device: (H100.major, H100.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *name: None
    # Made by 2.9's offloading of activations, which stays off.
    torch.cuda.Stream = type("Stream", (), {"__init__": lambda self, *a, **k: None})


if "NEMO_CARE_TE" in os.environ:
    install(Path(os.environ["NEMO_CARE_TE"]).resolve())
