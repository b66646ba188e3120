"""The command `nemo-care compare`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care compare` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="nemo-care compare",
        description="Train several recipes with several seeds and print one table. Completed "
        "runs are not repeated.",
    )
    parser.add_argument("--recipes", nargs="+", default=["tiny_cpu_grpo", "tiny_cpu"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=2, help="number of concurrent runs (default 2)")
    parser.add_argument("--config-path", help="a folder with your own recipes")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run"
    )
    options = parser.parse_args(arguments)
    from nemo_care.ranks.launch import guarded

    return guarded(_compare, options)


def _compare(options: argparse.Namespace) -> None:
    from nemo_care.experiments.compare import compare

    failures = compare(
        options.recipes,
        options.seeds,
        options.out,
        options.set,
        options.jobs,
        options.config_path,
    )
    if failures:
        sys.exit(1)
