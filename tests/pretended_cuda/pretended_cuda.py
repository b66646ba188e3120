"""A CUDA device that is not there: its rules hold, and everything is computed on the CPU.

    pretended_cuda.build(folder)      # once: compiles device.cpp, a matter of seconds
    pretended_cuda.install()          # in each process, before it imports torch

A tensor on cuda:0 is then an object around a tensor in CPU memory. Its device, `is_cuda`, dispatch
keys and autograd thread are those of CUDA, and its values are real, so that code which reads values
back continues as on a GPU. An operator that gets tensors of two devices raises where CUDA's would.
Counted are kernels, waits of the CPU for the GPU, uploads from memory that is not pinned,
collectives and float32 products (cuda_counts.py). A CUDA graph records what it captures and repeats
it on `replay` (cuda_graphs.py).

FakeTensorMode has the same rules, but no values. What is not seen here: NCCL (tensors are sent by
gloo), streams, memory, speed, bf16 kernels (the CPU's compute), TransformerEngine, apex, vLLM.
"""

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Names the compiled library; with site/ on the path, every process that has it pretends.
LIBRARY = "NEMO_CARE_PRETENDED_CUDA"
HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """Compile the library into `folder`, and return its path."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    library = folder / "device.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", HERE / "device.cpp"]
    libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run([*command, "-o", library, *libraries], check=True)
    return library


def install() -> None:
    """Pretend for the rest of this process."""
    # torch asks once whether there are CUDA's hooks.
    assert "torch" not in sys.modules, "torch is imported already"
    # Megatron compiles functions when it is imported; the compiler knows no such device.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    library = ctypes.CDLL(os.environ[LIBRARY], mode=ctypes.RTLD_GLOBAL)
    library.pretend_host_register.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    from cuda_runtime import replace_functions
    from cuda_tensors import CudaMode

    library.pretend_device()
    replace_functions(library.pretend_host_register)
    CudaMode().__enter__()
