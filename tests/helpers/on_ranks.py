"""Run a function of a test on ranks, and return its results to the test.

    def double(ranks, job):
        return job * ranks.rank

    assert on_ranks(Layout(), double, 2, replicas=2) == [0, 2]

The ranks are forked by a rank server. Function, job and results are transferred with torch.save:
the function must be at the top level of a module, which each rank imports.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forked_ranks import RankServer

from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks


class OnRanks:
    """Runs functions on ranks of one server."""

    def __init__(self, server: RankServer, folder: Path) -> None:
        """Keep jobs and results in `folder`."""
        self._server = server
        self._folders = (folder / f"{number}" for number in itertools.count(1))

    def __call__(
        self,
        layout: Layout | None,
        function: Callable[..., Any],
        job: Any = None,
        *,
        replicas: int = 1,
    ) -> list[Any]:
        """Return the results of `function(ranks, job)` on every rank of the layout, in their order.

        Without a layout, it is one process without process groups, and calls `function(job)`.

        Raises:
            AssertionError: a rank failed or hangs; with the output of all ranks.
        """
        folder = next(self._folders)
        folder.mkdir()
        torch.save((layout, function, job), folder / "job.pt")
        count = replicas * layout.tensor * layout.pipeline if layout else 1
        self._server.start(count, ["-m", "on_ranks", str(folder)]).succeed()
        files = [folder / f"{rank}.pt" for rank in range(count)]
        return [torch.load(file, weights_only=False) for file in files]


def _be_rank(folder: Path) -> None:
    layout, function, job = torch.load(folder / "job.pt", weights_only=False)
    if layout is None:
        torch.save(function(job), folder / "0.pt")
        return
    ranks = Ranks(layout, RankEnvironment.read())
    torch.save(function(ranks, job), folder / f"{ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    _be_rank(Path(sys.argv[1]))
