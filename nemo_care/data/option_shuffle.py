"""A multiple-choice question with its options' texts at other letters."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace

from nemo_care.data.samples import Sample


def with_shuffled_options(sample: Sample) -> Sample:
    """The sample with every option's text at another letter, and the solution's letter with it.

    The texts move on by the same number of letters, which the sample's id decides, so that no text
    keeps its letter. Where the question itself lists the options (`... A left B right`, `A. left
    (B) right`), that listing changes too.

    The sample needs two options at least.
    """
    letters, texts = list(sample.options), list(sample.options.values())
    digest = hashlib.sha256(sample.sample_id.encode()).digest()
    shift = 1 + int.from_bytes(digest[:4]) % (len(letters) - 1)
    moved = dict(zip(letters, texts[shift:] + texts[:shift], strict=True))
    place = {letter: letters[number - shift] for number, letter in enumerate(letters)}
    return replace(
        sample,
        options=moved,
        solution=place.get(sample.solution, sample.solution),
        question=_with_listing(sample.question, sample.options, moved),
    )


def _with_listing(question: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The question with the new texts where it lists the old ones; as it is where it does not."""
    entries = [rf"(\(?{re.escape(letter)}[.):]?\s+){re.escape(old[letter])}" for letter in old]
    listing = re.search(r"(?<!\w)" + r"([\s,;]*)".join(entries) + r"(?!\w)", question)
    if listing is None:
        return question
    # The letters with what follows each, and between two entries the space between them.
    between = listing.groups()
    made = "".join(
        f"{between[2 * number]}{text}{between[2 * number + 1] if number + 1 < len(new) else ''}"
        for number, text in enumerate(new.values())
    )
    return question[: listing.start()] + made + question[listing.end() :]
