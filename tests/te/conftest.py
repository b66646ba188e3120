"""Skips these tests where pytest was not started with the plugin (`make test-te`)."""

import os
import sys

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A fake world can't be entered by a process that is a rank already.
    items.sort(key=lambda item: "ranks" in item.fixturenames)
    if "te_python_half" in sys.modules and "NEMO_CARE_TE" in os.environ:
        return
    skip = pytest.mark.skip(
        reason="the Python half of TransformerEngine is not there: make test-te"
    )
    for item in items:
        if "te" in item.keywords:
            item.add_marker(skip)
