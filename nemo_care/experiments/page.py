"""A study as a page that works offline, as Markdown, as JSON and in the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_care.experiments.figures import DOTS, OVER_STEPS, draw_curves, draw_dots
from nemo_care.experiments.findings import Findings
from nemo_care.experiments.tables import (
    contrasts_sheet,
    main_sheet,
    seeds_sheet,
    time_sheet,
    variants_sheet,
)
from nemo_care.files.json_lines import replace_file
from nemo_care.process.screen import console
from nemo_care.reporting.figures import Curve
from nemo_care.reporting.page import write_page
from nemo_care.reporting.sheet import NAME_WIDTH, Sheet

_SHEETS = {
    "variants": variants_sheet,
    "table": main_sheet,
    "contrasts": contrasts_sheet,
    "seeds": seeds_sheet,
    "time": time_sheet,
}
_FIGURES = {"dots": (draw_dots, DOTS), "curves": (draw_curves, OVER_STEPS)}
BLOCKS = (*_SHEETS, *_FIGURES)


def draw(findings: Findings, folder: Path, stem: str) -> dict[str, Curve]:
    """Draw the figures that have values to `folder/STEM_NAME.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: make(findings, folder, f"{stem}_{name}") for name, (make, _) in _FIGURES.items()}
    return {name: curve for name, curve in drawn.items() if curve is not None}


def markdown_block(findings: Findings, name: str, stem: str) -> str:
    """Return one of `BLOCKS` in Markdown; figures are links to `STEM_NAME.png`."""
    if name in _FIGURES:
        return f"![{_FIGURES[name][1]}]({stem}_{name}.png)"
    return _SHEETS[name](findings).markdown()


def publish(findings: Findings, out: Path, settings: str) -> Path:
    """Write figures, study.json, study.md and study.html to `out`, and return the page's path.

    `settings` is the text of the study's file.
    """
    figures = draw(findings, out, "study")
    sheets = {name: make(findings) for name, make in _SHEETS.items()}
    write_json(out / "study.json", findings.as_json())
    replace_file(out / "study.md", _markdown(findings, sheets, figures))
    study, page = findings.study, out / "study.html"
    planned = sum(findings.planned(variant) for variant in study.variants)
    write_page(
        page,
        "study.html",
        title=study.title,
        kind="nemo-care study",
        finished=len(findings.results) == planned,
        state=f"{findings.count()} are done",
        sheets=sheets,
        figures=dict.fromkeys(_FIGURES) | figures,
        notes=findings.notes(),
        facts={
            "recipe": study.recipe,
            "seeds": ", ".join(map(str, study.seeds)),
            "overrides of all runs": " ".join(study.overrides) or None,
        },
        settings=settings,
    )
    return page


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write what the tables show, with all digits."""
    replace_file(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def show(findings: Findings) -> None:
    """Print the means and the contrasts."""
    screen = console()
    for sheet in (main_sheet(findings), contrasts_sheet(findings)):
        for piece in sheet.pieces(screen.width) if sheet.rows else ():
            screen.print(piece.rich(NAME_WIDTH))
    for note in findings.notes():
        screen.print(note)


def _markdown(findings: Findings, sheets: Mapping[str, Sheet], figures: Mapping[str, Curve]) -> str:
    parts = [f"# {findings.study.title}", f"{findings.count()} are done.", *findings.notes()]
    parts += [f"![{curve.title}]({curve.file.name})" for curve in figures.values()]
    for sheet in sheets.values():
        if sheet.rows:
            parts += [f"## {sheet.title}", sheet.markdown()]
    return "\n\n".join(parts) + "\n"
