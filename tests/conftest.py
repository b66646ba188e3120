"""Fixtures of many tests: the tiny checkpoint, the miniature, ranks, an endpoint and judges."""

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from absl import logging as absl_logging

import nemo_care
from nemo_care.megatron.imports import import_lightly

# rouge-score imports absl, whose log handler closes a stderr that is not the process's own, such as
# pytest's, as soon as Hydra sets up its logging while composing a recipe.
absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

# As commands do, before a test imports Megatron.
import_lightly()

if TYPE_CHECKING:
    from forked_ranks import RankServer
    from made_endpoint import Endpoint
    from on_ranks import OnRanks

    from nemo_care.evaluation.llm_judge import LLMJudge
    from nemo_care.ranks.process_groups import Ranks

CHECKPOINT = Path(nemo_care.__file__).parent / "miniature" / "checkpoint_warm"


def pytest_report_header() -> str:
    """Report the CPU instructions in use, which affect rounding and so the last digits."""
    return f"torch's CPU instructions: {torch.backends.cpu.get_cpu_capability()}"


# Folders with the slowest files: if started last, one of them would delay the end. `tests` itself
# has that of Slurm.
_LONG = (
    *("faults", "tests", "training", "commands", "models", "evaluation", "data", "planning"),
    "ranks",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slowest files first; without xdist's own order (--no-loadscope-reorder)."""
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.parent.name, len(_LONG)))


@pytest.fixture(scope="session", autouse=True)
def _imported_modules_are_no_garbage() -> None:
    """Exclude imported modules from garbage collection, which Megatron runs at every save."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Return the warm-started tiny Qwen2.5-VL that comes with the package."""
    return CHECKPOINT


@pytest.fixture
def copied_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of that checkpoint which a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def ranks() -> "Ranks":
    """Return process groups of a world of one rank, in this process."""
    from nemo_care.ranks.process_groups import Layout, Ranks

    return Ranks(Layout())


@pytest.fixture(scope="session")
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["RankServer"]:
    """Start ranks without waiting for their imports."""
    from forked_ranks import RankServer

    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def on_ranks(rank_server: "RankServer", tmp_path_factory: pytest.TempPathFactory) -> "OnRanks":
    """Run a function of a test on ranks: see on_ranks.py."""
    from on_ranks import OnRanks

    return OnRanks(rank_server, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small miniature: videos and questions."""
    from nemo_care.miniature.files import write_world

    root = tmp_path_factory.mktemp("miniature") / "world"
    write_world(root, train=48, validation=8)
    return root


@pytest.fixture
def endpoint() -> Iterator["Endpoint"]:
    """Serve a chat endpoint on this machine."""
    from made_endpoint import serving

    with serving() as made:
        yield made


@pytest.fixture
def judge(
    endpoint: "Endpoint", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., "LLMJudge"]]:
    """Create judges that use that endpoint, and close them; arguments change their settings."""
    from made_endpoint import KEY, PATIENCE

    from nemo_care.evaluation.llm_judge import LLMJudge
    from nemo_care.recipe.evaluation import LLMJudgeConfig

    # Retry after a hundredth of a second; use no proxy for this machine.
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("THE_KEY", KEY)
    made: list[LLMJudge] = []

    def make(cache: Path = tmp_path / "cache.sqlite", **keys: object) -> LLMJudge:
        usual = {
            "base_url": endpoint.url,
            "model": "judge-1",
            "api_key_env": "THE_KEY",
            "max_retries": 2,
            "timeout_seconds": PATIENCE,
        }
        made.append(LLMJudge(LLMJudgeConfig(**(usual | keys)), cache))
        return made[-1]

    yield make
    for one in made:
        one.close()
