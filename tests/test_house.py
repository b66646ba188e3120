"""The house's rules: imports go down the floors, files stay small."""

import ast
from pathlib import Path

import pytest

import nemo_care

PACKAGE = Path(nemo_care.__file__).parent
FLOORS = {
    "errors": 1, "config": 1, "data_config": 1, "model_config": 1, "evaluation_config": 1,
    "rollout_config": 1, "vllm_config": 1, "templates": 1, "value_checks": 1, "os_errors": 1,
    "objective": 1, "json_lines": 1, "run_files": 1, "run_directory": 1, "run_lock": 1,
    "quiet": 1, "ending": 1, "screen": 1, "tensor_files": 1,
    "parallel": 2,
    "data": 3,
    "models": 4,
    "rollouts": 5, "scoring": 5,
    "algorithms": 6, "evaluation": 6,
    "cli": 7, "start": 7, "train": 7, "evaluate": 7, "export": 7, "model_source": 7,
    "node_check": 7, "origin": 7,
    "preflight": 7, "recipes": 7, "recipe_errors": 7, "recipe_arguments": 7, "recipe_docs": 7,
    "experiment": 7,
    "reporting": 7, "study": 7, "data_check": 7, "replay": 7, "doctor": 7,
    # Beside the house too: it runs what all floors have, without memory.
    "planning": 7,
    # Beside the house: it makes data and a checkpoint, and uses what it needs.
    "miniature": 7,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(module: str) -> int:
    parts = module.split(".")
    return FLOORS[parts[1]] if len(parts) > 1 else 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(file):
    module = ".".join(["nemo_care", *file.relative_to(PACKAGE).with_suffix("").parts])
    if module == "nemo_care.__init__":
        return
    floor = floor_of(module)
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_care"):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("nemo_care")]
        for name in names:
            assert floor_of(name) <= floor, f"{module} imports {name} from a floor above"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_small(file):
    assert len(file.read_text().splitlines()) <= 420


def _raw_output(tree: ast.AST) -> list[str]:
    """Calls that print without nemo_care/screen.py, which makes texts safe for a terminal."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
            found += ["rich.console.Console" for name in node.names if name.name == "Console"]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        writes = called in ("sys.stdout.write", "sys.stderr.write", "tqdm.write") or (
            called in ("sys.stdout.writelines", "sys.stderr.writelines", "traceback.print_exc")
        )
        safe = bool(node.args) and ast.unparse(node.args[0]).startswith(("printable(", "one_line("))
        if called == "print" or (writes and not safe):
            found.append(called)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_output_goes_through_the_module_that_makes_it_harmless(file):
    if file.name == "screen.py":
        return
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        # Imports for annotations alone.
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    assert not _raw_output(tree), f"{file.relative_to(PACKAGE)}: use say or console of screen.py"
