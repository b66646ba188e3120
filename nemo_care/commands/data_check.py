"""The command `nemo-care data check`, which finds unusable data before a run does.

It needs the checkpoint's configuration and tokenizer, but no weights, ranks, Megatron or NeMo. The
fork server imports torch and transformers while this process does.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.commands.options import option_parser
from nemo_care.data.fork_server import start_fork_server
from nemo_care.errors import InputError
from nemo_care.process.cores import available_cores
from nemo_care.process.os_errors import naming
from nemo_care.process.quiet import quiet_libraries
from nemo_care.process.screen import console, say
from nemo_care.recipe.compose import compose_recipe
from nemo_care.recipe.data import for_validation
from nemo_care.recipe.schema import Recipe

if TYPE_CHECKING:
    from nemo_care.checks.data import FileReport
    from nemo_care.data.decoding import Load

_USAGE = "--config-name RECIPE [options] [key=value ...]"
_DESCRIPTION = """\
Read all training and validation data of a recipe as a run would, and report what can't be used:
bad lines of the annotations, files that are missing or can't be decoded, prompts that are too long.
Exits with status 0 when everything is usable, 2 when anything is not."""
_EPILOG = """\
Recipes and overrides are those of `nemo-care train`; --config-path FOLDER adds your own recipes.
The checkpoint (model.hf_path) needs its config and tokenizer, but no weights. For example:

  nemo-care data check --config-name mine --limit 200                          a first look
  nemo-care data check --config-name mine --sizes-only                         all files, quickly
  nemo-care data check --config-name mine data.max_prompt_tokens=8192          what would not fit
  nemo-care data check --config-name mine data.validation.annotations=null     training data only"""


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command's own options, and return them with the rest, which is the recipe's."""
    cores = available_cores()
    parser = option_parser("data check", _USAGE, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help=f"processes that decode (default: {cores}, the cores available to this command); "
        "0: decode in this process, where a file can hang or crash the command",
    )
    parser.add_argument(
        "--sizes-only",
        action="store_true",
        help="open every file and decode only the first frame of each video: finds missing and "
        "broken files and all lengths, but no damage after the first frame",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="check N samples of each annotations file, spread evenly over it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data_check.json"),
        metavar="FILE",
        help="where to write the complete report (default: data_check.json)",
    )
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care data` and return the exit status."""
    parser = argparse.ArgumentParser(prog="nemo-care data", description="Work with data sets.")
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("check", help="find what can't be used in a recipe's data", add_help=False)
    parser.parse_args(arguments[:1])  # check is the only job; it parses the rest itself
    options, rest = _options(arguments[1:])
    quiet_libraries()
    if options.workers > 0:
        start_fork_server()
    from nemo_care.ranks.launch import guarded

    return guarded(_main, options, rest)


def _main(options: argparse.Namespace, rest: list[str]) -> None:
    if options.workers < 0:
        raise InputError(f"--workers {options.workers}: must be 0 or more")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit}: must be 1 or more")
    recipe = compose_recipe(rest)
    if recipe is None:
        return
    with _written_at_the_end(options.out) as partial:
        reports = check_data(
            recipe, workers=options.workers, sizes_only=options.sizes_only, limit=options.limit
        )
        from nemo_care.reporting.data_report import check_record

        record = {
            "sizes_only": options.sizes_only,
            "limit": options.limit,
            **check_record(reports, recipe.data),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        with naming(options.out):
            partial.write_text(text + "\n", encoding="utf-8")
    _show(recipe, reports, options)


@contextmanager
def _written_at_the_end(file: Path) -> Iterator[Path]:
    """Yield a temporary file, which replaces `file` when the block ends without an error.

    Raises:
        InputError: `file` can't be written; checked first, before hours of work.
    """
    if file.is_dir():
        raise InputError(f"--out {file}: is a folder; name a file in it")
    partial = file.with_name(file.name + ".partial")
    try:
        partial.touch()
    except OSError as error:
        raise InputError(
            f"--out {file}: can't be written ({error.strerror}); choose another"
        ) from error
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def check_data(
    recipe: Recipe,
    *,
    workers: int,
    sizes_only: bool = False,
    limit: int | None = None,
    load: "Load | None" = None,
) -> list["FileReport"]:
    """Return a report for each annotations file that the recipe names.

    Args:
        recipe: only `data`, `model.hf_path` and `trainer.seed` are used.
        workers: number of processes that decode; none are started if there is nothing to decode.
        sizes_only: decode only first frames.
        limit: number of samples of each file.
        load: how a process reads the media of a sample; by default as a run does.

    Raises:
        InputError: no data, checkpoint or tokenizer, an unusable template, or a source whose weight
            gives it no prompt.
    """
    from tqdm import tqdm

    from nemo_care.checks.data import check_samples, data_files, read_file
    from nemo_care.data.decoding import DecodingWorkers
    from nemo_care.data.media import measure_media
    from nemo_care.data.mixing import epoch_shares
    from nemo_care.data.prompts import PromptBuilder
    from nemo_care.data.sources import training_sources
    from nemo_care.data.tokenizer import load_tokenizer
    from nemo_care.miniature import ensure_files
    from nemo_care.models.families import read_family

    prompt = read_family(recipe.model.hf_path).prompt
    tokenizer = load_tokenizer(recipe.model.hf_path, prompt)
    builders = {
        True: PromptBuilder(recipe.data, prompt, tokenizer),
        False: PromptBuilder(for_validation(recipe.data), prompt, tokenizer),
    }
    read = []
    for file in data_files(recipe.data):
        ensure_files(file.kind, file.root)
        say(f"reading {file.path}", file=sys.stderr)
        read.append(read_file(file, seed=recipe.trainer.seed, limit=limit))
    training = [report for report, _ in read if report.file.is_training]
    if training and not any(report.error for report in training):
        weights = [source.weight for source in training_sources(recipe.data)]
        epoch_shares([report.samples for report in training], weights)
    total = sum(len(samples) for _, samples in read)
    decoding = DecodingWorkers(
        min(workers, total),
        seconds=recipe.data.seconds_per_sample,
        memory_gib=recipe.data.worker_memory_gib,
        load=load or measure_media,
    )
    # A log file keeps every state of the bar.
    pause = 0.1 if sys.stderr.isatty() else 10.0
    with (
        closing(decoding),
        tqdm(total=total, desc="data check", unit="sample", mininterval=pause) as bar,
    ):
        for report, samples in read:
            builder = builders[report.file.is_training]
            check_samples(
                report, samples, builder, decoding, sizes_only=sizes_only, done=bar.update
            )
    return [report for report, _ in read]


def _show(recipe: Recipe, reports: Sequence["FileReport"], options: argparse.Namespace) -> None:
    """Print the report.

    Raises:
        InputError: something can't be used.
    """
    from nemo_care.reporting.data_report import print_report

    screen = console(soft_wrap=True)
    whole = options.limit is None and not options.sizes_only
    print_report(screen, reports, recipe.data, whole=whole)
    screen.print(f"the whole report: {options.out}")
    count = sum(len(report.problems) for report in reports)
    errors = sum(report.error is not None for report in reports)
    if not count and not errors:
        return
    what = [f"{count:,} lines and samples"] if count else []
    what += [f"{errors} annotations file{'s' if errors > 1 else ''}"] if errors else []
    fraction = recipe.data.max_skipped_fraction
    stops = any(report.stops_a_run(fraction) for report in reports)
    raise InputError(
        f"{' and '.join(what)} can't be used, and a run would "
        + (f"stop (data.max_skipped_fraction={fraction:g})" if stops else "skip them and continue")
        + f": fix or remove what {options.out} lists"
    )
