"""The command `nemo-care`: one subcommand per job, each documented by its own --help."""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from nemo_care import __version__
from nemo_care.process import ending
from nemo_care.process.screen import say

# Command: module of commands/, whose `main` takes its arguments, and a line of help.
_COMMANDS = {
    "train": ("train", "train a policy: --config-name RECIPE [key=value ...]"),
    "evaluate": ("evaluate", "evaluate a model: --config-name RECIPE [key=value ...]"),
    "replay": ("replay", "recompute a step that a run left out: RUN --step N"),
    "data": ("data_check", "data check: find what can't be used in a recipe's data"),
    "doctor": ("doctor", "check this machine, and whether a recipe can run on it"),
    "plan": ("plan", "memory, time and a dry run of a recipe, before queueing it"),
    "export": ("export", "write a trained model as a Hugging Face directory"),
    "report": ("report", "draw a run's curves and a page with them"),
    "view": ("view", "write pages that show a run's completions: RUN [--other RUN2]"),
    "compare": ("compare", "train several recipes and seeds, and print one table"),
    "study": ("study", "train the variants of a study; tables, figures and a page"),
    "miniature": ("miniature", "write the videos and questions of the tiny world"),
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
    module, _ = _COMMANDS[given[0]]
    return import_module(f"nemo_care.commands.{module}").main(given[1:])


if __name__ == "__main__":
    main()
