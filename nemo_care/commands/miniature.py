"""The command `nemo-care miniature`."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care miniature` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="nemo-care miniature",
        description="The tiny world of the tiny_cpu recipes.",
        epilog="Their tiny checkpoint is made by examples/miniature/make_checkpoint.py of the "
        "repository.",
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    writer = jobs.add_parser("data", help="write the videos and questions")
    writer.add_argument("root", type=Path, help="the directory to create")
    writer.add_argument("--train", type=int, default=argparse.SUPPRESS, help="training questions")
    writer.add_argument(
        "--validation", type=int, default=argparse.SUPPRESS, help="questions per level"
    )
    writer.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    del given["job"]
    from nemo_care.miniature.files import write_world
    from nemo_care.ranks.launch import guarded

    return guarded(lambda: write_world(**given))
