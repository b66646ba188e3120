"""The command `nemo-care`: one subcommand per job, each documented by its own --help."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_care import __version__
from nemo_care.process import ending
from nemo_care.process.screen import say


def _train(arguments: list[str]) -> int:
    from nemo_care.commands.train import train

    return train(arguments)


def _evaluate(arguments: list[str]) -> int:
    from nemo_care.commands.evaluate import evaluate

    return evaluate(arguments)


def _replay(arguments: list[str]) -> int:
    from nemo_care.commands.replay import replay

    return replay(arguments)


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="nemo-care export",
        description="Write a trained model as a Hugging Face directory, which transformers, vLLM "
        "and other libraries load. One process on the CPU is enough, whichever layout trained it.",
    )
    parser.add_argument(
        "source", type=Path, help="a run directory (its newest checkpoint) or a step_... folder"
    )
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="where the Hugging Face checkpoint that the run started from is now, if it has moved "
        "since (its configuration and tokenizer are copied; weights are not needed)",
    )
    options = parser.parse_args(arguments)
    # A model trained on many GPUs does not fit on one of them; the host's memory is larger.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from nemo_care.commands.export import export
    from nemo_care.ranks.launch import guarded

    return guarded(export, options.source, options.out, options.base)


def _report(arguments: list[str]) -> int:
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

    def report() -> None:
        from nemo_care.reporting.report import follow_report, write_report
        from nemo_care.reporting.scaling import write_scaling_report

        if options.scaling:
            out = options.out or options.runs[0].resolve().parent
            page, lines = write_scaling_report(options.runs, out)
            for line in lines:
                say(" | ".join(line))
            say(page)
            return
        if options.follow is not None:
            say(options.runs[0] / "report.html")
            follow_report(options.runs[0], options.follow)
            return
        say(write_report(options.runs[0]))

    return guarded(report)


def _view(arguments: list[str]) -> int:
    from nemo_care.commands.view import main as view

    return view(arguments)


def _compare(arguments: list[str]) -> int:
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

    def compare() -> None:
        from nemo_care.experiments.compare import compare as run

        failures = run(
            options.recipes,
            options.seeds,
            options.out,
            options.set,
            options.jobs,
            options.config_path,
        )
        if failures:
            sys.exit(1)

    return guarded(compare)


def _study(arguments: list[str]) -> int:
    from nemo_care.commands.study import main as study

    return study(arguments)


def _miniature(arguments: list[str]) -> int:
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
    from nemo_care.miniature.files import write_world
    from nemo_care.ranks.launch import guarded

    given.pop("job")
    return guarded(lambda: write_world(given.pop("root"), **given))


def _data(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nemo-care data", description="Work with data sets.")
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("check", help="find what can't be used in a recipe's data", add_help=False)
    parser.parse_args(arguments[:1])  # check is the only job; it parses the rest itself
    from nemo_care.commands.data_check import main

    return main(arguments[1:])


def _plan(arguments: list[str]) -> int:
    from nemo_care.commands.plan import main as plan
    from nemo_care.process.quiet import quiet_libraries
    from nemo_care.ranks.launch import guarded

    quiet_libraries()
    return guarded(plan, arguments)


def _doctor(arguments: list[str]) -> int:
    # Not guarded: `guarded` imports torch, which this command does not need.
    from nemo_care.commands.doctor import main as doctor

    return doctor(arguments)


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a policy: --config-name RECIPE [key=value ...]"),
    "evaluate": (_evaluate, "evaluate a model: --config-name RECIPE [key=value ...]"),
    "replay": (_replay, "recompute a step that a run left out: RUN --step N"),
    "data": (_data, "data check: find what can't be used in a recipe's data"),
    "doctor": (_doctor, "check this machine, and whether a recipe can run on it"),
    "plan": (_plan, "memory, time and a dry run of a recipe, before queueing it"),
    "export": (_export, "write a trained model as a Hugging Face directory"),
    "report": (_report, "draw a run's curves and a page with them"),
    "view": (_view, "write pages that show a run's completions: RUN [--other RUN2]"),
    "compare": (_compare, "train several recipes and seeds, and print one table"),
    "study": (_study, "train the variants of a study; tables, figures and a page"),
    "miniature": (_miniature, "write the videos and questions of the tiny world"),
}

# These commands run as ranks and can be stopped by a scheduler.
_RUNS = ("train", "evaluate", "replay")


def _help() -> str:
    lines = [
        f"nemo-care {__version__}: post-train large video-language models with GRPO-CARE",
        "",
        "usage: nemo-care COMMAND ...",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in _COMMANDS.items()),
        "",
        "nemo-care COMMAND --help shows its options.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status (0 done, 1 failed, 2 unusable input).

    By default it runs the command line of this process, which it then ends.
    """
    if arguments is None:
        if sys.argv[1:2] and sys.argv[1] in _RUNS:
            ending.watch_run()
        else:
            ending.watch(signal.SIGINT)
        ending.leave(main(sys.argv[1:]))
    given = list(arguments)
    if not given or given[0] in ("-h", "--help"):
        say(_help())
        return 0 if given else 2
    if given[0] == "--version":
        say(__version__)
        return 0
    if given[0] not in _COMMANDS:
        say(f"nemo-care: unknown command {given[0]}\n\n{_help()}", file=sys.stderr)
        return 2
    return _COMMANDS[given[0]][0](given[1:])


if __name__ == "__main__":
    main()
