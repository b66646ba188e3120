"""What several tests need: the tiny checkpoint, small files of the miniature, one-rank groups."""

from pathlib import Path

import pytest

import nemo_care
from nemo_care.parallel.process_groups import Layout, Ranks

CHECKPOINT = Path(nemo_care.__file__).parent / "miniature" / "checkpoint_warm"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The warm-started tiny Qwen2.5-VL that comes with the package."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Process groups of a world of one rank, in this process."""
    return Ranks(Layout())


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small miniature: videos and questions."""
    from nemo_care.miniature.files import write_world

    root = tmp_path_factory.mktemp("miniature") / "world"
    write_world(root, train=48, validation=8)
    return root
