"""What the results of a study say: means over seeds and differences paired by seed."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nemo_care.experiments.config import START, Contrast, Study
from nemo_care.experiments.results import Result
from nemo_care.reporting.tables import (
    level_names,
    level_number,
    mean_and_spread,
    reading_notes,
    summary_by_level,
)
from nemo_care.runs.reader import Levels

Place = tuple[str, str]
"""Level and key of a number of a validation."""


@dataclass(frozen=True)
class Difference:
    """A difference of two variants in one number, seed by seed."""

    values: list[float]

    @property
    def positive(self) -> int:
        """In how many seeds the left one has more."""
        return sum(value > 0 for value in self.values)


@dataclass(frozen=True)
class Findings:
    """A study and the runs of it that are done."""

    study: Study
    results: Sequence[Result]

    @cached_property
    def levels(self) -> list[str]:
        """The validation's levels."""
        return level_names(*(side for one in self.results for side in (one.start, one.end)))

    def places(self, key: str, levels: Iterable[str]) -> list[Place]:
        """Where one number stands at these levels, as far as anything has it."""
        sides = [side for one in self.results for side in (one.start, one.end)]
        return [
            (level, key)
            for level in dict.fromkeys(levels)
            if not all(math.isnan(level_number(side, level, key)) for side in sides)
        ]

    def of(self, variant: str) -> dict[int, Result]:
        """The runs of a variant by seed, in the study's order."""
        done = {one.seed: one for one in self.results if one.variant == variant}
        return {seed: done[seed] for seed in self.study.seeds_of(variant) if seed in done}

    def ends(self, name: str) -> dict[int, Levels | None]:
        """The last validations of a variant by seed; those before training for "start"."""
        if name == START:
            return self.starts
        return {seed: one.end for seed, one in self.of(name).items()}

    def planned(self, name: str) -> int:
        """How many seeds a row has in the end."""
        variants = self.study.variants if name == START else [name]
        return len({seed for variant in variants for seed in self.study.seeds_of(variant)})

    @cached_property
    def starts(self) -> dict[int, Levels | None]:
        """Validation before the first step by seed: of the first variant that has the seed."""
        starts: dict[int, Levels | None] = {}
        for variant in self.study.variants:
            for seed, one in self.of(variant).items():
                if one.start:
                    starts.setdefault(seed, one.start)
        return dict(sorted(starts.items()))

    def other_starts(self) -> list[str]:
        """Variants that did not start where the row "start" says."""
        return [
            variant
            for variant in self.study.variants
            if any(one.start != self.starts.get(seed) for seed, one in self.of(variant).items())
        ]

    def difference(self, contrast: Contrast, place: Place) -> Difference:
        """Left minus right, of the seeds that both have."""
        left, right = self.ends(contrast.left), self.ends(contrast.right)
        values = [
            level_number(left[seed], *place) - level_number(right[seed], *place)
            for seed in left
            if seed in right
        ]
        return Difference([value for value in values if not math.isnan(value)])

    def title_of(self, name: str) -> str:
        """What a row is called."""
        return START if name == START else self.study.title_of(name)

    def count(self) -> str:
        """How much of the study is done."""
        planned = sum(self.planned(variant) for variant in self.study.variants)
        return f"{len(self.results)} of {planned} runs"

    def notes(self) -> list[str]:
        """How to read the tables."""
        notes = [
            "Means ± sample standard deviation over seeds of the validation after the last step; "
            f'"{START}" is the validation before the first. Accuracy and consistency are shares of '
            "the validation prompts; consistency of the right ones is that of the completions "
            "whose answer is right."
        ]
        others = self.other_starts()
        if others:
            titles = ", ".join(map(self.title_of, others))
            notes.append(f'The row "{START}" is not the start of: {titles}.')
        sides = [side for one in self.results for side in (one.start, one.end)]
        for kind in dict.fromkeys(one.data for one in self.results):
            notes += reading_notes(sides, kind)
        return list(dict.fromkeys(notes))

    def as_json(self, keys: Sequence[str], contrasted: Sequence[Place]) -> dict[str, Any]:
        """All that the tables show, with all digits."""
        study = self.study
        return {
            "title": study.title,
            "recipe": study.recipe,
            "overrides": study.overrides,
            "done": self.count(),
            START: summary_by_level(list(self.starts.values()), keys),
            "variants": {
                name: {
                    "title": study.title_of(name),
                    "overrides": variant.overrides,
                    "seeds": list(self.of(name)),
                    "end": summary_by_level(list(self.ends(name).values()), keys),
                    "wall_seconds": median(one.wall_seconds for one in self.of(name).values()),
                    "seconds_per_step": median(
                        one.seconds_per_step for one in self.of(name).values()
                    ),
                }
                for name, variant in study.variants.items()
            },
            "contrasts": [
                {
                    "left": one.left,
                    "right": one.right,
                    "about": one.about,
                    "differences": [
                        _difference_json(place, self.difference(one, place)) for place in contrasted
                    ],
                }
                for one in study.contrasts
            ],
            "notes": self.notes(),
        }


def median(values: Iterable[float | None]) -> float | None:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _difference_json(place: Place, difference: Difference) -> dict[str, Any]:
    mean, spread = mean_and_spread(difference.values)
    return {
        "level": place[0],
        "key": place[1],
        "mean": None if math.isnan(mean) else mean,
        "std": None if math.isnan(spread) else spread,
        "positive": difference.positive,
        "seeds": len(difference.values),
    }
