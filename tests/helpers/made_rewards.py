"""Rewards that distinguish the completions of some samples but not of others."""

import zlib

SIGNALS = {"3", "6", "7"}
"""The last digits of the samples whose groups have a signal."""


def told_apart(*, completion, sample):
    """Return a different number for each text if the sample is one of those."""
    return zlib.crc32(completion.encode()) % 997 / 997 * (sample.sample_id[-1] in SIGNALS)


def all_equal(*, completion, sample):
    """Return the same reward for all, so that no group has a signal."""
    return 1.0
