"""The page of all recipe keys."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_care.recipe.docs import blocks, page
from nemo_care.recipe.explain import all_keys
from nemo_care.recipe.schema import CHOICES, RANGES, Recipe

FILE = Path(__file__).parents[2] / "docs" / "recipe.md"
KEYS = {key.name: key for block in blocks() for key in block.keys}


def test_the_committed_page_is_the_generated_one():
    assert FILE.read_text() == page(), "run make docs"


def _is_block(schema: DictConfig, name: str) -> bool:
    return any(other.startswith(name + ".") for other in all_keys(schema))


def test_every_key_of_the_schema_is_on_the_page_and_has_a_text():
    schema = OmegaConf.structured(Recipe)
    # A block has keys of its own; a dictionary with names of the user's choice has none yet.
    leaves = {name for name in all_keys(schema) if not _is_block(schema, name)}
    assert {name for name in KEYS if "[]" not in name} == leaves
    assert [name for name, key in KEYS.items() if not key.text] == []
    assert [block.name for block in blocks() if not block.text] == []


def test_choices_and_ranges_name_keys_of_the_schema():
    assert {*CHOICES, *RANGES} <= KEYS.keys()


def test_a_key_is_shown_with_type_default_and_bounds():
    assert KEYS["trainer.max_steps"].default == "required"
    assert KEYS["rollout.top_p"].allowed == "1e-06 to 1"
    assert KEYS["algorithm.consistency.kind"].allowed == "group, accurate, dense, counterfactual"
    assert KEYS["model.sequence_parallel"].default == "`false`"
    assert KEYS["optimizer.decay_steps"].type == "int | null"
    assert KEYS["data.train.sources[].kind"].allowed == KEYS["data.train.kind"].allowed
    assert "| `optimizer.decay_steps` | `int \\| null` | `null` | at least 1 | " in page()
