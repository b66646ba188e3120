"""The rank server, undisturbed runs to compare with, and the table of what each fault cost."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import STEPS, Run
from forked_ranks import RankServer

_ROW = "fault"


@pytest.fixture
def run(rank_server: RankServer, world: Path, tmp_path: Path) -> Run:
    """A run of its own."""
    return Run(rank_server, tmp_path, world)


@pytest.fixture(scope="session")
def undisturbed(
    rank_server: RankServer, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """The run of a layout to which nothing happens."""
    made: dict[str, Run] = {}

    def get(layout: str) -> Run:
        if layout not in made:
            run = Run(rank_server, tmp_path_factory.mktemp("undisturbed"), world)
            run.finish(layout)
            assert run.steps() == [*range(1, STEPS + 1)]
            made[layout] = run
        return made[layout]

    return get


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds a line to the table that the tests end with."""

    def add(fault: str, happened: str, lost: str, seconds: float | None = None) -> None:
        waited = "–" if seconds is None else f"{seconds:.1f} s"
        record_property(_ROW, [fault, happened, lost, waited])

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == _ROW and report.when == "call"
    ]
    if rows:
        terminalreporter.section("faults")
        head = ["fault", "what happened", "lost", "until it trained on"]
        for row in [head, ["---"] * len(head), *rows]:
            terminalreporter.write_line("| " + " | ".join(row) + " |")
