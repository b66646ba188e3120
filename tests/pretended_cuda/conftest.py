"""Ranks on pretended GPUs; skipped with the reason if no compiler builds the pretence."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pretended_cuda
import pytest
from forked_ranks import RankServer
from on_ranks import OnRanks

import nemo_care


@pytest.fixture(scope="session")
def pretended_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the pretended device."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return pretended_cuda.build(tmp_path_factory.mktemp("pretended"))


@pytest.fixture(scope="session")
def pretended_server(
    pretended_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RankServer]:
    """Start ranks on pretended GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(pretended_cuda.LIBRARY, str(pretended_library))
        server = RankServer(tmp_path_factory.mktemp("pretended_ranks"), "pretended_cuda")
    yield server
    server.close()


@pytest.fixture(scope="session")
def on_pretended_gpu(
    pretended_server: RankServer, tmp_path_factory: pytest.TempPathFactory
) -> OnRanks:
    """Run a function of a test on pretended GPUs: see on_ranks.py."""
    return OnRanks(pretended_server, tmp_path_factory.mktemp("pretended_jobs"))


@pytest.fixture
def pretended_environment(pretended_library: Path) -> dict[str, str]:
    """Environment of a program of which every process is to be on pretended GPUs."""
    paths = [pretended_cuda.HERE / "site", Path(nemo_care.__file__).parent.parent]
    return {
        **os.environ,
        pretended_cuda.LIBRARY: str(pretended_library),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
    }
