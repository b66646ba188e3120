"""The statistics of a study: means over seeds and differences paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nemo_care.experiments.config import START, Contrast, Study
from nemo_care.experiments.results import Result
from nemo_care.reporting.tables import known, level_names, numbers, reading_notes, summary
from nemo_care.runs.reader import Levels

if TYPE_CHECKING:
    from pandas import DataFrame

ACCURACY, CONSISTENCY, PROBE = "accuracy", "consistency_rate", "probe_implied"
CONSISTENCY_OF_RIGHT, WORDS = "consistency_among_correct", "reasoning_words"
PROBE_TRUE, FORMAT = "probe_true", "format_rate"
# The results of each level, in the order of the tables' columns.
KEYS = (ACCURACY, CONSISTENCY, CONSISTENCY_OF_RIGHT, PROBE, PROBE_TRUE, WORDS, FORMAT)

Place = tuple[str, str]
"""Level and key of a number in a validation."""


@dataclass(frozen=True)
class Findings:
    """A study with its completed runs."""

    study: Study
    results: Sequence[Result]

    @cached_property
    def _sides(self) -> list[Levels | None]:
        return [side for one in self.results for side in (one.start, one.end)]

    @cached_property
    def levels(self) -> list[str]:
        """The validation's levels."""
        return level_names(*self._sides)

    def frame(self, validations: Mapping[int, Levels | None]) -> DataFrame:
        """Arrange validations by seed: a row for each, with a column for each place."""
        return numbers(validations, self.levels, KEYS)

    @cached_property
    def _known(self) -> set[Place]:
        counts = self.frame(dict(enumerate(self._sides))).count()
        return set(counts.index[counts > 0])

    def places(self, key: str, levels: Iterable[str]) -> list[Place]:
        """Return the places of a key at these levels, as far as any run has them."""
        return [(level, key) for level in dict.fromkeys(levels) if (level, key) in self._known]

    def compared(self) -> list[Place]:
        """Return the numbers by which variants are compared."""
        probed = [level for level, _ in self.places(PROBE, self.levels)]
        return [
            *self.places(ACCURACY, self.levels),
            *self.places(CONSISTENCY, self.levels),
            # The probe tests the model, not the data: one level is enough here.
            *self.places(PROBE, probed[:1]),
        ]

    def of(self, variant: str) -> dict[int, Result]:
        """Return the runs of a variant by seed, in the study's order."""
        done = {one.seed: one for one in self.results if one.variant == variant}
        return {seed: done[seed] for seed in self.study.seeds_of(variant) if seed in done}

    def ends(self, name: str) -> DataFrame:
        """Return a variant's last validations by seed; for a row of `starts`, those of the row."""
        if name in self.starts:
            return self.frame(self.starts[name])
        return self.frame({seed: one.end for seed, one in self.of(name).items()})

    def planned(self, name: str) -> int:
        """Return the number of seeds that a row will have in the end."""
        of_row = [one for one in self.study.variants if name in (one, self._start_row(one))]
        return len({seed for variant in of_row for seed in self.study.seeds_of(variant)})

    @cached_property
    def starts(self) -> dict[str, dict[int, Levels]]:
        """Return the validations before the first step, by row of the tables and by seed.

        The row is "start", or "start of RECIPE" for each recipe if these train different models. A
        row has each seed from its first variant with it.
        """
        every: dict[int, Levels] = {}
        by_recipe: dict[str, dict[int, Levels]] = {}
        for variant in self.study.variants:
            of_recipe = by_recipe.setdefault(self.study.recipe_of(variant), {})
            for seed, one in self.of(variant).items():
                if one.start:
                    every.setdefault(seed, one.start)
                    of_recipe.setdefault(seed, one.start)
        if all(every[seed] == start for one in by_recipe.values() for seed, start in one.items()):
            by_recipe = {"": every}
        return {
            f"{START} of {recipe}" if recipe else START: dict(sorted(starts.items()))
            for recipe, starts in by_recipe.items()
        }

    def _start_row(self, variant: str) -> str:
        return START if START in self.starts else f"{START} of {self.study.recipe_of(variant)}"

    def other_starts(self) -> list[str]:
        """Return the variants whose start differs from their row of `starts`."""
        return [
            variant
            for variant in self.study.variants
            if any(
                one.start != self.starts[self._start_row(variant)].get(seed)
                for seed, one in self.of(variant).items()
            )
        ]

    def differences(self, contrast: Contrast) -> DataFrame:
        """Return left minus right for the seeds that both have; NaN if a number is missing."""
        return self.ends(contrast.left) - self.ends(contrast.right)

    def times(self, variant: str) -> DataFrame:
        """Return steps, wall time and time per step of a variant's runs, in seconds."""
        import pandas as pd

        names = ["steps", "wall_seconds", "seconds_per_step"]
        rows = [[getattr(one, name) for name in names] for one in self.of(variant).values()]
        return pd.DataFrame(rows, columns=names, dtype=float)

    def title_of(self, name: str) -> str:
        """Return the title of a row."""
        return name if name in self.starts else self.study.title_of(name)

    def count(self) -> str:
        """Describe how many runs are complete."""
        planned = sum(self.planned(variant) for variant in self.study.variants)
        return f"{len(self.results)} of {planned} runs"

    def reading_notes(self) -> list[str]:
        """Return the notes that readers of results on this kind of data need."""
        kinds = dict.fromkeys(one.data for one in self.results)
        return list(dict.fromkeys(n for kind in kinds for n in reading_notes(self._sides, kind)))

    def notes(self) -> list[str]:
        """Return the notes on how to read the tables."""
        notes = [
            "Means ± sample standard deviation over seeds of the validation after the last step; "
            f'"{START}" is the validation before the first. Accuracy and consistency are shares of '
            "the validation prompts; consistency of correct answers is a share of the completions "
            "with a correct answer."
        ]
        others = self.other_starts()
        if others:
            titles = ", ".join(map(self.title_of, others))
            notes.append(f'The row "{START}" is not the start of: {titles}.')
        return [*notes, *self.reading_notes()]

    def as_json(self) -> dict[str, Any]:
        """Return everything that the tables show, with all digits."""
        study = self.study
        variants = {}
        for name, variant in study.variants.items():
            usual = self.times(name).median()
            variants[name] = {
                "title": study.title_of(name),
                "overrides": variant.overrides,
                "seeds": list(self.of(name)),
                "end": summary(self.ends(name)),
                "wall_seconds": known(usual["wall_seconds"]),
                "seconds_per_step": known(usual["seconds_per_step"]),
            }
        return {
            "title": study.title,
            "recipe": study.recipe,
            "overrides": study.overrides,
            "done": self.count(),
            **{row: summary(self.ends(row)) for row in self.starts},
            "variants": variants,
            "contrasts": [
                {
                    "left": one.left,
                    "right": one.right,
                    "about": one.about,
                    "differences": [
                        _difference_json(place, self.differences(one)[place])
                        for place in self.compared()
                    ],
                }
                for one in study.contrasts
            ],
            "notes": self.notes(),
        }


def _difference_json(place: Place, values: Any) -> dict[str, Any]:
    return {
        "level": place[0],
        "key": place[1],
        "mean": known(values.mean()),
        "std": known(values.std()),
        "positive": int((values > 0).sum()),
        "seeds": int(values.count()),
    }
