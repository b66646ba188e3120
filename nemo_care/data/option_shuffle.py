"""Move the texts of a multiple-choice question's options to different letters."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace

from nemo_care.data.samples import Sample


def with_shuffled_options(sample: Sample) -> Sample:
    """Return the sample with every option's text at another letter, and its solution adapted.

    The texts are rotated by a number of letters that the sample's id decides, so that no text keeps
    its letter. If the question itself lists the options (`... A left B right`, `A. left
    (B) right`), that listing changes too.

    The sample needs at least two options.
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
    """Return the question with the new texts in its listing; unchanged if it has none."""
    entries = [rf"(\(?{re.escape(letter)}[.):]?\s+){re.escape(old[letter])}" for letter in old]
    listing = re.search(r"(?<!\w)" + r"([\s,;]*)".join(entries) + r"(?!\w)", question)
    if listing is None:
        return question
    # The letters with the separator after each, and the spaces between the entries.
    between = listing.groups()
    made = "".join(
        f"{between[2 * number]}{text}{between[2 * number + 1] if number + 1 < len(new) else ''}"
        for number, text in enumerate(new.values())
    )
    return question[: listing.start()] + made + question[listing.end() :]
