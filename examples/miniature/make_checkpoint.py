"""Make the checkpoint of the `tiny_cpu` recipes: `python make_checkpoint.py OUT --seed N`."""

import argparse
import json
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gate import Gate, GateNotPassed, measure_gate
from nemo_care.errors import InputError
from nemo_care.process import ending
from nemo_care.process.screen import one_line, say
from tiny_model import MODEL_TYPES, build_model, load_checkpoint, save_checkpoint, with_experts
from warm_start import STAGES, Stage, warm_start

GATE_FILE = "gate.json"


def build(
    out_dir: str | Path,
    *,
    seed: int,
    model_type: str = MODEL_TYPES[0],
    start_from: str | Path | None = None,
    stages: Sequence[Stage] = STAGES,
    scale: float = 1.0,
    require_gate: bool = True,
) -> Gate:
    """Build, warm-start and check a miniature, and write it to `out_dir`.

    The directory is a Hugging Face checkpoint with its tokenizer, and `gate.json` with the
    gate's numbers. It appears only when complete. Takes about ten minutes on one core.

    Args:
        out_dir: must not exist, or be empty.
        seed: seed of the weights and the data.
        model_type: the family's name in config.json.
        start_from: directory of a checkpoint whose weights come before the stages, instead of
            random ones; for a family with experts it may be one without.
        stages: of the warm start.
        scale: shortens every warm-start stage, for tests.
        require_gate: False accepts a model that did not pass the gate.

    Returns:
        The gate's numbers.

    Raises:
        InputError: `out_dir` is not empty, or `start_from` is another family's.
        GateNotPassed: the gate is not passed; the model is kept in `<out_dir>.rejected`.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: exists already; remove it or choose another directory")
    start = time.monotonic()
    model = _initial_model(seed, model_type, start_from)
    say(f"{model_type}, {sum(p.numel() for p in model.parameters())} parameters, seed {seed}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small for more threads to help
    try:
        warm_start(model, seed=seed, scale=scale, stages=stages)
        gate = measure_gate(model)
    finally:
        torch.set_num_threads(threads)

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    save_checkpoint(model, partial)
    report = {
        "gate": {name: round(value, 4) for name, value in asdict(gate).items()},
        "passed": gate.passes(),
        "seed": seed,
        "scale": scale,
        "torch": torch.__version__,
    }
    (partial / GATE_FILE).write_text(json.dumps(report, indent=2) + "\n")
    rejected = require_gate and not gate.passes()
    target = out_dir.with_name(f"{out_dir.name}.rejected") if rejected else out_dir
    if rejected:
        shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    minutes = (time.monotonic() - start) / 60
    say(f"{target}: {json.dumps(report['gate'])}, {minutes:.1f} minutes")
    if require_gate:
        gate.require()
    return gate


def _initial_model(seed: int, model_type: str, start_from: str | Path | None) -> PreTrainedModel:
    if start_from is None:
        return build_model(seed, model_type)
    model = load_checkpoint(start_from)
    given = model.config.model_type
    if given != model_type and f"{given}_moe" != model_type:
        raise InputError(f"{start_from}: is a {given}; give --model-type {given}")
    return model if given == model_type else with_experts(model)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        description="Build a tiny video-language model and warm-start it for the miniature.",
        epilog="Takes about ten minutes on one core. Exit status: 0 built; 1 the warm start did "
        "not pass the forced-reasoning gate (try another seed); 2 OUT can't be used.",
    )
    parser.add_argument("out", metavar="OUT", help="directory to write; must be new or empty")
    parser.add_argument(
        "--model-type",
        choices=MODEL_TYPES,
        default=MODEL_TYPES[0],
        help=f"the model's family (default: {MODEL_TYPES[0]})",
    )
    parser.add_argument(
        "--start-from",
        metavar="DIR",
        help="continue with this checkpoint's weights; experts can start from a model without any",
    )
    parser.add_argument(
        "--stages",
        type=int,
        nargs="+",
        choices=range(1, len(STAGES) + 1),
        default=range(1, len(STAGES) + 1),
        help="of the warm start (default: all)",
    )
    parser.add_argument(
        "--follows",
        type=float,
        default=STAGES[-1].follows,
        help=f"share of stage 4's answers that follow reasoning (default: {STAGES[-1].follows})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="shorten every stage, for tests (default: 1)"
    )
    parser.add_argument(
        "--no-gate", action="store_true", help="keep the model even if it fails the gate"
    )
    options = parser.parse_args(arguments)
    stages = (*STAGES[:-1], replace(STAGES[-1], follows=options.follows))
    try:
        build(
            options.out,
            seed=options.seed,
            model_type=options.model_type,
            start_from=options.start_from,
            stages=[stages[number - 1] for number in options.stages],
            scale=options.scale,
            require_gate=not options.no_gate,
        )
    except GateNotPassed as error:
        say(error, file=sys.stderr)
        return 1
    except InputError as error:
        say(one_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    ending.watch(signal.SIGINT)
    ending.leave(main())
