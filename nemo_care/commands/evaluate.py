"""The command `nemo-care evaluate`: a model answers the validation samples and is judged.

    nemo-care evaluate --config-name tiny_cpu evaluation.checkpoint=runs/tiny_cpu
    python -m nemo_care evaluate --config-name tiny_cpu trainer.devices=2
    torchrun --nproc-per-node 8 -m nemo_care evaluate --config-name MY_RECIPE

Each model replica takes its share of the samples; rank 0 writes the results, batch by batch.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.commands.start import Command, start
from nemo_care.errors import InputError
from nemo_care.process.screen import console
from nemo_care.recipe.schema import Recipe

if TYPE_CHECKING:
    from nemo_care.data.annotations import Annotations
    from nemo_care.data.decoding import DecodingWorkers
    from nemo_care.data.samples import Skipped
    from nemo_care.data.sources import RunData
    from nemo_care.evaluation.evaluator import Evaluator
    from nemo_care.evaluation.files import EvaluationFiles
    from nemo_care.models.video_language_model import VideoLanguageModel
    from nemo_care.ranks.process_groups import Ranks
    from nemo_care.training.model_source import ModelSource


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care evaluate` and return the exit status."""
    return start(_COMMAND, arguments)


def _check(recipe: Recipe) -> "RunData":
    from nemo_care.checks.recipe import check_evaluation_inputs
    from nemo_care.runs.directory import check_run_directory
    from nemo_care.training.experiment import run_directory

    folder = run_directory(recipe.exp_manager)
    data = check_evaluation_inputs(recipe)
    check_run_directory(folder)
    return data


def run_evaluation(recipe: Recipe, ranks: "Ranks", checked: "RunData | None" = None) -> None:
    """Evaluate on one rank from start to end; resumes after the rows in the run directory.

    `checked` is the data that the check of the inputs has read; it is available on rank 0 only.

    Raises:
        InputError: the run directory is in use or holds rows from other settings, the model does
        not fit, or more of a level than data.max_skipped_fraction can't be used.
    """
    from nemo_care.runs.directory import hold_run_directory
    from nemo_care.training.experiment import run_directory

    folder = run_directory(recipe.exp_manager)
    with ExitStack() as held:
        ranks.from_rank_zero(lambda: held.enter_context(hold_run_directory(folder, "evaluate")))
        _evaluate_in(recipe, ranks, checked, folder)


def _evaluate_in(recipe: Recipe, ranks: "Ranks", checked: "RunData | None", folder: Path) -> None:
    from nemo_care.data.decoding import DecodingWorkers
    from nemo_care.data.sources import RunData
    from nemo_care.evaluation.files import EvaluationFiles
    from nemo_care.evaluation.judge_again import judge_again, unjudged
    from nemo_care.evaluation.leader_judge import build_llm_judge
    from nemo_care.evaluation.settings import evaluation_settings
    from nemo_care.training.model_source import (
        evaluated_model,
        judging_model,
        prompt_files_identity,
    )

    levels = RunData.on_every_rank(
        ranks,
        checked,
        lambda: RunData.read(recipe.data, seed=recipe.trainer.seed, trains=False),
    ).levels
    files = EvaluationFiles(folder, levels)
    # A run can write a newer checkpoint at any time: only one rank looks for it.
    model, reference = ranks.from_rank_zero(
        lambda: (evaluated_model(recipe), judging_model(recipe))
    )

    def begin() -> bool:
        models: dict[str, Any] = {
            source.key: source.identity() for source in (model, reference) if source is not None
        }
        models["model.hf_path"] = prompt_files_identity(Path(recipe.model.hf_path))
        files.begin(evaluation_settings(recipe, models))
        return files.results() is None

    incomplete = ranks.from_rank_zero(begin)
    asks = recipe.evaluation.judge == "llm"
    # Only completions of earlier starts: what has just failed would fail again.
    missing = unjudged(files) if asks and ranks.rank == 0 else {}
    if incomplete:
        workers = DecodingWorkers.of(recipe.data, leads=ranks.is_model_leader)
        with (
            closing(workers),
            closing(_build(recipe, ranks, files, workers, model, reference)) as evaluator,
        ):
            _ask_all(recipe, ranks, files, levels, evaluator)
    if ranks.rank != 0:
        return
    if missing:
        samples = {level: annotations.samples for level, annotations in levels.items()}
        with closing(build_llm_judge(recipe, files.folder.parent)) as judge:
            judge_again(files, samples, missing, judge)
    if incomplete or missing:
        files.finish(judged=recipe.evaluation.judge != "none")
    _show(files)


def _build(
    recipe: Recipe,
    ranks: "Ranks",
    files: "EvaluationFiles",
    workers: "DecodingWorkers",
    source: "ModelSource",
    reference: "ModelSource | None",
) -> "Evaluator":
    """Build the evaluator of the checkpoint, with its judge; collective over all ranks."""
    from nemo_care.data.loader import PromptLoader
    from nemo_care.data.prompts import PromptBuilder
    from nemo_care.data.tokenizer import load_tokenizer
    from nemo_care.evaluation.build import build_evaluator
    from nemo_care.groups.batching import BatchLayout
    from nemo_care.recipe.data import for_validation
    from nemo_care.scoring.scorer import Scorer

    fp8 = recipe.model.precision.fp8
    model = _load(recipe, ranks, source)
    tokenizer = load_tokenizer(recipe.model.hf_path, model.family.prompt)
    layout = BatchLayout.of_recipe(recipe, ranks.layout, tokenizer.pad_id)
    scorer, judging = Scorer(model, ranks, layout, fp8=fp8.scoring), None
    if reference is not None:
        same = reference.identity() == source.identity()
        judging = (
            scorer
            if same
            else Scorer(_load(recipe, ranks, reference), ranks, layout, fp8=fp8.scoring)
        )
    return build_evaluator(
        recipe,
        ranks,
        scorer,
        PromptLoader(
            PromptBuilder(for_validation(recipe.data), model.family.prompt, tokenizer), workers
        ),
        likelihoods=judging.answer_likelihoods if judging is not None else None,
        folder=files.folder.parent,
        from_checkpoint=source.folder.resolve() == Path(recipe.model.hf_path).resolve(),
    )


def _load(recipe: Recipe, ranks: "Ranks", source: "ModelSource") -> "VideoLanguageModel":
    from nemo_care.training.build import build_model

    model = build_model(recipe, ranks)
    source.load(model)
    return model.requires_grad_(False).eval()


def _ask_all(
    recipe: Recipe,
    ranks: "Ranks",
    files: "EvaluationFiles",
    levels: "Mapping[str, Annotations]",
    evaluator: "Evaluator",
) -> None:
    """Evaluate every sample that has no row yet, and write the results."""
    from tqdm import tqdm

    done = ranks.from_rank_zero(
        lambda: {level: {row["index"] for row in files.rows(level)} for level in levels}
    )
    with tqdm(
        total=sum(len(annotations.samples) for annotations in levels.values()),
        initial=sum(map(len, done.values())),
        desc="evaluation",
        unit="prompt",
        disable=ranks.rank != 0,
        dynamic_ncols=True,
    ) as bar:
        for level, annotations in levels.items():
            skipped: list[Skipped] = []
            for batch in evaluator.run(annotations.samples, done[level]):
                if ranks.rank == 0:
                    files.append(level, batch)
                skipped += batch.skipped
                bar.update(len(batch.rows) + len(batch.skipped))
                _check_skipped(recipe, level, annotations, skipped)


def _check_skipped(
    recipe: Recipe, level: str, annotations: "Annotations", skipped: "Sequence[Skipped]"
) -> None:
    from nemo_care.data.samples import too_many_skipped

    # If a level is cut short, its bad lines can be after the cut; reading has checked them.
    bad = 0 if recipe.data.validation.samples_per_level else len(annotations.bad)
    count, total = len(skipped) + bad, len(annotations.samples) + bad
    if skipped and too_many_skipped(count, total, recipe.data.max_skipped_fraction):
        raise InputError(
            f"{count} of {total} samples of level {level} can't be used, more than "
            f"data.max_skipped_fraction={recipe.data.max_skipped_fraction:g} allows; fix them "
            f"and start again; the first is {skipped[0].sample_id}: {skipped[0].reason}"
        )


def _show(files: "EvaluationFiles") -> None:
    """Print the table of results, and where the files are."""
    from nemo_care.reporting.tables import evaluation_table, measures_table

    results: dict[str, Any] = files.results() or {}
    screen = console(soft_wrap=True)
    screen.print(evaluation_table(results))
    screen.print(measures_table(results))
    skipped = sum(level["skipped"] for level in results.values())
    if skipped:
        screen.print(f"{skipped} samples skipped, see {files.skipped}")
    screen.print(f"results: {files.folder.with_suffix('.json')}; completions: {files.folder}")


_COMMAND = Command(
    name="evaluate",
    purpose="""\
Evaluate a model on the samples of data.validation: one completion each, its accuracy and whether
its reasoning supports its answer. An interrupted evaluation resumes where it stopped.""",
    examples=(
        "evaluation.checkpoint=runs/mine",
        "evaluation.judge=likelihood evaluation.temperature=0",
        "trainer.devices=2",
        "exp_manager.explicit_log_dir=runs/mine_evaluated",
    ),
    check=_check,
    run=run_evaluation,
)
