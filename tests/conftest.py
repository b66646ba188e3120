"""What several tests need: the tiny checkpoint, small files of the miniature, one-rank groups."""

import sys
from pathlib import Path

import pytest
from absl import logging as absl_logging

import nemo_care
from nemo_care.parallel.process_groups import Layout, Ranks

# rouge-score brings absl, whose log handler closes a stderr that is not the process's own, such as
# pytest's, as soon as Hydra sets up its logging while composing a recipe.
absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

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
