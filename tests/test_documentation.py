"""The documentation: the links, files, tests, recipe keys and commands in it exist."""

import argparse
import ast
import fnmatch
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from documentation import PAGES, anchors, blocks, commands, inline_code, links, own_commands
from omegaconf import OmegaConf
from test_house import ORDER

from nemo_care import cli
from nemo_care.errors import InputError
from nemo_care.experiments.config import find_study, read_study
from nemo_care.recipe.compose import compose_recipe
from nemo_care.recipe.explain import all_keys, free_form_keys
from nemo_care.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FOLDERS = ("benchmarks", "docs", "examples", "nemo_care", "recipes", "slurm", "tests")
# Sources that the documentation names although they are not in this repository.
OTHERS = {"my_rewards.py", "grpo.py", "eval_bench.py"}
KEYS = set(all_keys(OmegaConf.structured(Recipe)))
# Dictionaries and lists, in which users choose the names.
OPEN_KEYS = {*free_form_keys(), "data.train.sources"}


@pytest.fixture(scope="session")
def files() -> set[str]:
    """The files and folders of the repository, each with a slash before it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    return {f"/{name}" for name in found} | {
        f"/{parent}/" for name in found for parent in Path(name).parents
    }


@pytest.fixture(scope="session")
def functions(files) -> dict[str, set[str]]:
    """The functions of each test file."""
    return {
        name: {
            node.name
            for node in ast.walk(ast.parse((ROOT / name[1:]).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        for name in files
        if name.startswith("/tests/") and fnmatch.fnmatch(name, "*/test_*.py")
    }


@each_page
def test_links_lead_to_files_and_headings(page):
    for link in links(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_in_the_table_of_contents():
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / link).resolve() for link in links(index.read_text())}
    assert [page.name for page in ROOT.glob("docs/*.md") if page not in {index, *listed}] == []


def test_the_table_of_folders_has_their_order():
    text = (ROOT / "CONTRIBUTING.md").read_text().split("| folder of `nemo_care/` |")[1]
    firsts = [line.split("|")[1] for line in text.split("\n\n")[0].splitlines() if "`" in line]
    named = [re.sub(r"/|\.py", "", name) for name in re.findall("`(.+?)`", " ".join(firsts))]
    assert ["__main__", *named] == ORDER


def _pattern(name: str) -> str | None:
    """What the path of a named file has to match; None where the name is that of no such file.

    Files are named from the root of the repository, from that of the package, or by their name
    alone; words in capital letters stand for any name.
    """
    if not re.fullmatch(r"[\w./*-]+", name) or name.rpartition("/")[2] in OTHERS:
        return None
    if name.partition("/")[0] not in FOLDERS or "/" not in name:
        if not name.endswith((".py", ".sh")):
            return None
        name = f"*/{name}"
    return "/" + re.sub(r"\b(?!README\b)[A-Z][A-Z_]*\b", "*", name)


@each_page
def test_named_files_exist(page, files):
    named = {word for code in inline_code(page.read_text()) for word in code.split()}
    patterns = {word: _pattern(word.partition("::")[0]) for word in named}
    assert [
        word
        for word, pattern in patterns.items()
        if pattern and not (fnmatch.filter(files, pattern) or f"{pattern}/" in files)
    ] == []


@each_page
def test_named_tests_exist(page, functions):
    every = set().union(*functions.values())
    for code in inline_code(page.read_text()):
        file, colons, function = code.partition("::")
        if colons and file:
            found = [name for name in functions if name.endswith(f"/{file}")]
            assert len(found) == 1, f"{code}: {len(found)} test files of that name"
            assert function in functions[found[0]], f"{code}: no such test"
        elif re.fullmatch(r"(::)?test_\w+", code):
            assert code.removeprefix("::") in every, f"{code}: no such test"


@each_page
def test_named_recipe_keys_exist(page):
    sections = {key.partition(".")[0] for key in KEYS}
    for code in inline_code(page.read_text()):
        found = re.fullmatch(r"(?P<key>[a-z_]+(\.[a-zA-Z0-9_]+)+)(=.*)?", code)
        if found is None or code.endswith((".py", ".json", ".safetensors")):
            continue
        parts = found["key"].split(".")
        if parts[0] in sections:
            paths = {".".join(parts[:count]) for count in range(1, len(parts))}
            assert found["key"] in KEYS or paths & OPEN_KEYS, f"{code}: no such key"


@each_page
def test_named_targets_of_make_exist(page):
    text = page.read_text()
    lines = [*inline_code(text), *"\n".join(blocks(text)).splitlines()]
    named = {
        word
        for line in lines
        if line.startswith("make ")
        for word in line.partition("#")[0].split()[1:]
        if not re.search(r"^-|[=\"]", word)
    }
    makefile = (ROOT / "Makefile").read_text()
    assert named <= set(re.findall(r"^([\w./-]+):", makefile, re.MULTILINE))


class _Parsed(BaseException):
    """A command has parsed its own options; `rest` are the other words of its line."""

    def __init__(self, options: argparse.Namespace, rest: list[str]):
        self.options, self.rest = options, rest


def _stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the parser of a `nemo-care` command raise `_Parsed` when it is done."""
    inside = 0

    def stopping(method: Callable) -> Callable:
        def parse(parser, *given, **named):
            nonlocal inside
            inside += 1  # parsers call their own methods, and those of their subcommands
            try:
                options, rest = method(parser, *given, **named)
            finally:
                inside -= 1
            if inside or not re.match("nemo-care (?!data$)", parser.prog):
                return options, rest
            raise _Parsed(options, rest)

        return parse

    for name in ("parse_known_args", "parse_known_intermixed_args"):
        method = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(method))


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> None:
    """The user's recipe of which the documentation speaks, and its choice of the group `data`."""
    folder = tmp_path / "my_recipes"
    (folder / "data").mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [grpo_care_qwen2_5_vl_7b, _self_]\n")
    shown = blocks((ROOT / "README.md").read_text())
    choice = next(block for block in shown if block.startswith("# @package _global_"))
    (folder / "data" / "mine.yaml").write_text(choice.split("\n\n")[0])
    monkeypatch.chdir(tmp_path)


def _compose(words: list[str]) -> None:
    """Compose and check the recipe of a command line."""
    words = ["mine" if word == "RECIPE" else word for word in words]
    if "mine" in words:
        words = ["--config-path", "my_recipes", *words]
    try:
        recipe = compose_recipe([word for word in words if word not in ("--cfg", "job")])
    except InputError as error:
        pytest.fail(f"{' '.join(words)}: {error}")
    assert recipe is not None


def _understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the words after `nemo-care` as the command does, and compose its recipes."""
    command, *arguments = words
    if command in ("train", "evaluate"):
        _compose(arguments)
        return
    with monkeypatch.context() as patched:
        _stop_after_parsing(patched)
        try:
            cli.main(words)
            pytest.fail(f"{words}: this command has no options")
        except _Parsed as parsed:
            options, rest = parsed.options, parsed.rest
        except SystemExit:
            pytest.fail(f"{words}: not understood")
    if command in ("plan", "doctor", "data"):
        _compose(rest) if rest else None
        return
    assert rest == [], f"{words}: not understood"
    if command == "study":
        read_study(find_study(options.config_name, options.config_path))
    if command == "compare":
        for name in options.recipes:
            _compose(["--config-name", name, *options.set])
    if command == "replay":
        _compose(["--config-name", "tiny_cpu", *options.overrides])


def test_commands_are_found_in_blocks_and_lines():
    found = [words for page in PAGES for words in own_commands(page.read_text())]
    assert ["replay", "RUN", "--step", "12"] in found
    assert ["train", "--config-name", "mine", "+precision=fp8"] in found
    assert {"train", "evaluate", "plan", "doctor", "data", "study", "export"} <= {
        words[0] for words in found if len(words) > 2
    }


@each_page
def test_commands_are_understood(page, recipes, monkeypatch):
    for words in own_commands(page.read_text()):
        assert words[0] in cli._COMMANDS
        # A command that is only named has no arguments.
        if not all(re.fullmatch("[a-z]+", word) for word in words):
            _understand(words, monkeypatch)


@each_page
def test_overrides_compose(page, recipes):
    """Those of batch scripts, and those that are shown without a command."""
    for words in commands(page.read_text()):
        name = "tiny_cpu"
        for script in [word for word in words if fnmatch.fnmatch(word, "slurm/train_*.sh")]:
            name = re.search(r"NEMO_CARE_RECIPE:-(\w+)", (ROOT / script).read_text())[1]
            words = words[words.index(script) + 1 :]
        words = [word for word in words if "..." not in word]
        if words and all(re.match(r"\+?[a-z_]+[\w.]*=", word) for word in words):
            _compose(["--config-name", name, *words])
