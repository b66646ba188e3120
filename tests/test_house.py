"""The house's rules: imports go down from folder to folder, files stay small."""

import ast
import subprocess
from pathlib import Path

import pytest
from sources import parsed

import nemo_care

PACKAGE = Path(nemo_care.__file__).parent
# Top down: a folder imports from folders below it only. `train` is the entry that torchrun starts.
ORDER = [
    "__main__", "train", "cli", "commands", "experiments", "reporting", "checks", "planning",
    "training", "evaluation", "scoring", "rollouts", "groups", "miniature", "models", "data",
    "checkpoints", "ranks", "megatron", "runs", "recipe", "objective", "files", "process", "errors",
]  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def place_of(module: str) -> int:
    """Place in the order of a module's folder; a larger one is further down."""
    return ORDER.index(module.split(".")[1])


def test_every_folder_has_one_place_in_the_order():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    inside = modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert inside - {"__init__"} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_never_go_back_up(file):
    module = ".".join(["nemo_care", *file.relative_to(PACKAGE).with_suffix("").parts])
    if module == "nemo_care.__init__":
        return
    for node in ast.walk(parsed(file)):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_care."):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("nemo_care.")]
        for name in names:
            assert place_of(name) >= place_of(module), f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_model_family_is_known_in_its_own_folder_only(file):
    """All else sees `Family`."""
    inside = file.relative_to(PACKAGE)
    if inside.is_relative_to("models/families"):
        return
    lines = [line for line in file.read_text().splitlines() if "qwen" in line.lower()]
    assert lines == []


def test_git_ignores_no_file_of_the_package():
    """Wheels, linters and `git add` leave out what .gitignore names."""
    if not (PACKAGE.parent / ".git").exists():
        pytest.skip("no checkout")
    command = ["git", "check-ignore", "--no-index", *map(str, FILES)]
    found = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, ""), found.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_small(file):
    assert len(file.read_text().splitlines()) <= 420


def _raw_output(tree: ast.AST) -> list[str]:
    """Calls that print without process/screen.py, which makes texts safe for a terminal."""
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
    tree = parsed(file)
    for node in ast.walk(tree):
        # Imports for annotations alone.
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    assert not _raw_output(tree), f"{file.relative_to(PACKAGE)}: use say or console of screen.py"
