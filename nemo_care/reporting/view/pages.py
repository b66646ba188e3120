"""Write the folder of pages of `nemo-care view`.

index.html            the page; opens from a file, in any browser
view.css, *.js        its style and its program
steps/index.js        the runs, their steps, and in which steps each prompt was sampled
steps/run0/step_N.js  the groups of a step, loaded when the page shows it (run1: the other run)
steps/media.js        why the frames of a video are missing, by the name of their sheet
media/*.jpg           the frames that the model saw, drawn once (see media.py)
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.files.json_lines import Record, replace_file
from nemo_care.process.screen import one_line
from nemo_care.reporting.page import write_page
from nemo_care.reporting.view.groups import sheets_of, step_groups
from nemo_care.reporting.view.media import Sheet
from nemo_care.runs.files import step_of_file
from nemo_care.runs.reader import RunRecord, read_run

_STATIC = Path(__file__).parent / "static"
PROGRAM = ("store.js", "elements.js", "drawing.js", "page.js")
"""The files of the program, in the order in which they are loaded."""
_MARKER = "nemo_care_view.json"
_THRESHOLD = 0.1  # of recipes that don't say


@dataclass
class View:
    """A folder of pages."""

    folder: Path
    completions: int = 0
    drawn: int = 0
    """Number of sheets of frames that exist."""
    missing: int = 0
    """Number of videos and images that can't be drawn."""
    left: dict[str, Sheet] = field(default_factory=dict)
    """Sheets that were not drawn because of the limit, by the names of their files."""

    @property
    def page(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"


def write_view(run: Path, other: Path | None, out: Path, most_media: int) -> View:
    """Write the pages of a run, or of two side by side, into `out`, which is created if missing.

    The frames of at most `most_media` videos and images are drawn, those of the newest steps first,
    in addition to those of earlier calls.

    Raises:
        InputError: not a run directory, one without completions, or a file in it is damaged; or
            `out` contains something else.
    """
    records = [read_run(path) for path in (run, other) if path is not None]
    for record in records:
        if not record.rollout_files:
            raise InputError(f"{record.folder}: has no completions in rollouts/ yet")
    _claim(out)
    view = View(out)
    sheets: dict[str, Sheet] = {}
    index = {"runs": [_write_run(view, place, one, sheets) for place, one in enumerate(records)]}
    _write_script(out / "steps/index.js", "index", index)
    _write_script(out / "steps/media.js", "media", _draw(view, sheets, most_media))
    for name in ("view.css", *PROGRAM):
        shutil.copyfile(_STATIC / name, out / name)
    names = " and ".join(one["name"] for one in index["runs"])
    write_page(view.page, "view.html", title=names, runs=index["runs"], program=PROGRAM)
    return view


def _claim(out: Path) -> None:
    """Create the folder, or remove the data of an earlier call.

    Raises:
        InputError: it contains files that no call has written.
    """
    if out.exists() and not (out / _MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: is not empty and holds no pages of nemo-care: choose another --out"
        )
    (out / "media").mkdir(parents=True, exist_ok=True)
    replace_file(out / _MARKER, json.dumps({"format": 1}) + "\n")
    shutil.rmtree(out / "steps", ignore_errors=True)


def _write_run(view: View, place: int, run: RunRecord, sheets: dict[str, Sheet]) -> Record:
    """Write a run's steps; return its entry in the index. Adds its media, oldest step first."""
    threshold = run.setting("algorithm.consistency.accuracy_threshold")
    if not isinstance(threshold, int | float):
        threshold = _THRESHOLD
    steps: list[Record] = []
    prompts: dict[str, list[int]] = {}
    for file in run.rollout_files:
        step = step_of_file(file)
        assert step is not None, "a file of a step"
        groups = step_groups(file, threshold)
        for group in groups:
            shown = sheets_of(group)
            sheets |= {sheet.name: sheet for sheet in shown}
            group["media"] = [sheet.record() for sheet in shown]
            del group["first_row"]
            prompts.setdefault(group["id"], []).append(step)
        count = sum(len(group["completions"]) for group in groups)
        view.completions += count
        steps.append({"step": step, "completions": count, **_means(groups)})
        target = view.folder / f"steps/run{place}/step_{step}.js"
        _write_script(target, "step", place, step, groups)
    return {
        "name": one_line(run.folder.resolve().name),
        "state": "finished" if run.finished else f"{run.last_step} steps so far",
        "judged": run.setting("evaluation.judge") in ("rule", None),
        "steps": steps,
        # Pairs: an object of JavaScript has names of its own. Only prompts of several steps.
        "prompts": [
            [name, list(dict.fromkeys(found))]
            for name, found in prompts.items()
            if len(set(found)) > 1
        ],
    }


def _means(groups: Sequence[Record]) -> Record:
    """Return a step's share of right answers and mean reward, for the list of steps."""
    completions = [one for group in groups for one in group["completions"]]
    right = [one["right"] for one in completions if one["right"] is not None]
    rewards = [one["reward"] for one in completions if one["reward"] is not None]
    return {
        "right": sum(right) / len(right) if right else None,
        "reward": sum(rewards) / len(rewards) if rewards else None,
    }


def _draw(view: View, sheets: dict[str, Sheet], most: int) -> dict[str, str]:
    """Draw the frames of the newest steps; return why others are missing, by their file."""
    reasons: dict[str, str] = {}
    drawn_now = 0
    for name, sheet in reversed(sheets.items()):
        is_new = not (view.folder / "media" / name).exists()
        problem = sheet.problem() if is_new else None
        if problem is None and is_new and drawn_now >= most:
            view.left[name] = sheet
            reasons[name] = "not drawn yet"
            continue
        if problem is None and is_new:
            drawn_now += 1
            problem = sheet.draw(view.folder / "media")
        if problem is None:
            view.drawn += 1
        else:
            view.missing += 1
            reasons[name] = problem
    return reasons


def _write_script(target: Path, call: str, *values: Any) -> None:
    """Write `view.CALL(VALUES)`: unlike JSON, a page that was opened from a file can load it.

    All in ASCII, so no encoding and no half of a surrogate pair can break it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(_json(value) for value in values)
    replace_file(target, f"view.{call}({text});\n")


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
