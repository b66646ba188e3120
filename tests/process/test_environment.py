"""Environment variables are declared in one place, and their page says what is declared."""

import re
from pathlib import Path

import pytest

import nemo_care
from nemo_care.process import environment

REPOSITORY = Path(nemo_care.__file__).parents[1]
DECLARED = {each.name for each in environment.VARIABLES}


def test_no_other_file_of_the_package_spells_a_variable():
    files = set((REPOSITORY / "nemo_care").rglob("*.py")) - {Path(environment.__file__)}
    assert len(files) > 100
    assert [str(file) for file in sorted(files) if "NEMO_CARE_" in file.read_text()] == []


def test_recipes_read_declared_variables_only():
    files = (REPOSITORY / "recipes").rglob("*.yaml")
    read = {name for file in files for name in re.findall(r"NEMO_CARE_\w+", file.read_text())}
    assert read
    assert read <= DECLARED


def test_the_page_is_what_the_module_writes():
    page = (REPOSITORY / "docs" / "environment.md").read_text()
    assert page == environment.page()
    assert set(re.findall(r"`(NEMO_CARE_\w+)`", page)) == DECLARED


@pytest.mark.parametrize(("given", "is_on"), [(None, False), ("0", False), ("1", True)])
def test_a_switch_is_on_at_1_only(monkeypatch, given, is_on):
    monkeypatch.delenv(environment.VERBOSE.name, raising=False)
    if given is not None:
        monkeypatch.setenv(environment.VERBOSE.name, given)
    assert environment.VERBOSE.is_on is is_on
    assert environment.VERBOSE.value == given
