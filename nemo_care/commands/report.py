"""The command `nemo-care report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_care.process.screen import say


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care report` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="nemo-care report",
        description="Draw a run's curves to PNG files and one self-contained page, report.html; "
        "with --scaling, compare the speed of one recipe's runs at several sizes.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--scaling", action="store_true", help="tokens/s per GPU by size")
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write the page of --scaling (default: the folder of the first run)",
    )
    parser.add_argument(
        "--follow",
        type=int,
        nargs="?",
        const=30,
        metavar="SECONDS",
        help="write the page again every SECONDS until the run is finished, and let the browser "
        "load it again (default: 30)",
    )
    options = parser.parse_args(arguments)
    if options.follow is not None and (options.scaling or options.follow < 1):
        parser.error("--follow takes at least 1 second, and one run")
    if not options.scaling and (len(options.runs) > 1 or options.out):
        parser.error("give one run, or --scaling")
    from nemo_care.ranks.launch import guarded

    return guarded(_report, options)


def _report(options: argparse.Namespace) -> None:
    from nemo_care.reporting.report import follow_report, write_report
    from nemo_care.reporting.scaling import write_scaling_report

    if options.scaling:
        out = options.out or options.runs[0].resolve().parent
        page, lines = write_scaling_report(options.runs, out)
        for line in lines:
            say(" | ".join(line))
        say(page)
    elif options.follow is not None:
        say(options.runs[0] / "report.html")
        follow_report(options.runs[0], options.follow)
    else:
        say(write_report(options.runs[0]))
