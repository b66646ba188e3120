"""The commands of the documentation are run with the tiny model, unless a rule says why not."""

import re
import shutil
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from documentation import PAGES, ROOT, blocks, modules, own_commands
from made_commands import world_overrides

# What a test can't run, and why. These commands are composed by test_documentation.py.
NOT_RUN = {
    r"^(train|evaluate|doctor|data check) (?!.*--cfg job).*--config-name grpo_care_": (
        "the weights of a big model, published data and GPUs"
    ),
    r"^study ": "hours: dozens of runs",
    r"rollout=vllm|rollout\.backend=vllm": "vLLM; see tests/vllm",
    r"\+precision=fp8|model\.backend=transformer_engine": "TransformerEngine on a GPU",
    r"trainer\.devices=8": "eight GPUs",
    r"^view .*--serve": "no end; see tests/reporting/test_view.py",
    r"^-m nemo_care\.checks\.node": "GPUs; see tests/checks/test_node_check.py",
    r"^-m (venv|pytest)": "not this package's",
}
# Ten seconds or more on two cores.
SLOW = re.compile(r"^(plan|doctor|data check) |trainer\.devices=2")
# A command that is only named has no arguments; `doctor` needs none.
NAMED = re.compile(r"(?!doctor$)[a-z ]+|-m [\w.]+")
# What the examples of the documentation stand for; `_small` sets the rest.
MEANT = {
    r"\bruns/(tiny_cpu|stand_in)$": "RUN",
    r"^RECIPE$": "mine",
    r"^12$": "2",
    r"^model\.hf_path=OUT$": "model.hf_path=CHECKPOINT",
    r"^(trainer\.max_steps|exp_manager\.name|data\.validation\.samples_per_level)=.*": "",
}


def _meant(word: str) -> str:
    for example, meant in MEANT.items():
        word = re.sub(example, meant, word)
    return word


def _documented() -> list[str]:
    """Each command once, as the words after `nemo-care`, or after `python` where it is a module."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        lines = [["-m", *words] for words in modules(text) if words[0] != "nemo_care.train"]
        for words in [*own_commands(text), *lines]:
            if not NAMED.fullmatch(" ".join(words)):
                found[" ".join(filter(None, map(_meant, words)))] = None
    return list(found)


def _reason(command: str) -> str | None:
    return next((why for rule, why in NOT_RUN.items() if re.search(rule, command)), None)


def _to_run() -> list[ParameterSet]:
    """The commands that can be run; of `train` and `evaluate` one each that is not slow."""
    marked, seen = [], set()
    for command in DOCUMENTED:
        if _reason(command) is None:
            name = command.partition(" ")[0]
            slow = bool(SLOW.search(command))
            if name in ("train", "evaluate") and "--cfg" not in command:
                slow = slow or name in seen
                seen.add(name)
            marked.append(pytest.param(command, marks=[pytest.mark.slow] * slow, id=command))
    return marked


DOCUMENTED = _documented()
RUN = _to_run()


def _small(world: Path) -> list[str]:
    """Overrides for seconds instead of minutes."""
    return [
        *("trainer.max_steps=2", "algorithm.prompts_per_step=2", "algorithm.group_size=2"),
        *("algorithm.groups_per_micro_batch=1", "data.validation.samples_per_level=2"),
        *world_overrides(world),
    ]


@pytest.fixture(scope="module")
def run(rank_server, world, tmp_path_factory) -> Path:
    """A run of two steps; the second was left out, because a gradient was not finite."""
    folder = tmp_path_factory.mktemp("documented")
    words = ["train", "--config-name", "tiny_cpu", *_small(world), "checkpoint.save_interval=1"]
    fault = {"kind": "nan_gradient", "rank": 0, "step": 2, "phase": "update"}
    place = f"exp_manager.explicit_log_dir={folder / 'run'}"
    rank_server.start(1, ["-m", "nemo_care", *words, place], fault).succeed()
    assert (folder / "run" / "bad_steps" / "step_000002.json").is_file()
    return folder / "run"


@pytest.fixture
def home(run, checkpoint, tmp_path) -> Path:
    """A working directory with what the documentation speaks of, at the size of the tiny model."""
    for name in ("RUN", "RUN2", "runs/scaling/one_node"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "CHECKPOINT").symlink_to(checkpoint)
    (tmp_path / "my_recipes").mkdir()
    (tmp_path / "my_recipes" / "mine.yaml").write_text("defaults: [tiny_cpu, _self_]\n")
    shown = blocks((ROOT / "docs" / "rewards.md").read_text())
    source = [block for block in shown if re.match("from nemo_care|def short_reasoning", block)]
    (tmp_path / "my_rewards.py").write_text("\n".join(source))
    return tmp_path


@pytest.mark.parametrize("command", RUN)
def test_documented_command_runs(command, home, world, rank_server):
    words = command.split()
    if "*" in words[-1]:
        words[-1:] = [str(path.relative_to(home)) for path in home.glob(words[-1])]
    if "mine" in words:
        words += ["--config-path", "my_recipes"]
    if {"mine", "tiny_cpu"} & set(words) and "--cfg" not in words:
        words += _small(world)
    program = [] if words[0] == "-m" else ["-m", "nemo_care"]
    done = rank_server.run([*program, *words], home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_the_tutorial_shows_what_a_missing_checkpoint_is_answered_with(tmp_path, rank_server):
    words = ["-m", "nemo_care", "train", "--config-name", "grpo_care_qwen2_5_vl_7b"]
    done = rank_server.run(words, tmp_path)
    assert done.returncode == 2
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    assert " ".join(done.stderr.split()) in " ".join(tutorial.split())


@pytest.mark.parametrize("rule", NOT_RUN)
def test_each_rule_leaves_out_a_command(rule):
    assert any(re.search(rule, command) for command in DOCUMENTED)


def test_new_commands_of_the_documentation_are_run():
    assert _reason("train --config-name tiny_cpu trainer.max_steps=3") is None
    assert _reason("evaluate --config-name mine evaluation.checkpoint=RUN") is None
    assert _reason("train --config-name grpo_care_qwen2_5_vl_7b --cfg job") is None
    assert {command.split()[0] for command in DOCUMENTED if _reason(command) is None} == {
        *("train", "evaluate", "report", "view", "export", "replay", "data", "doctor", "plan")
    }
