"""Rewards that tell the completions of some samples apart and those of others not."""

import zlib

SIGNALS = {"3", "6", "7"}
"""Last digit of the samples whose groups have a signal."""


def told_apart(*, completion, sample):
    """A number of its own for each text, where the sample is one of those."""
    return zlib.crc32(completion.encode()) % 997 / 997 * (sample.sample_id[-1] in SIGNALS)


def all_equal(*, completion, sample):
    """No group has a signal."""
    return 1.0
