"""The scripts in slurm/ under a real Slurm: two nodes, which are both this machine."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import made_slurm
import pytest

CHECKOUT = Path(__file__).parents[1]
SCRIPT = CHECKOUT / "slurm" / "train_72b.sh"
ENGINES = CHECKOUT / "slurm" / "train_72b_async.sh"
# In place of the training command: says what it was asked for and ends as the test wants it.
FAKE_PYTHON = """#!/bin/bash
if [[ $2 == nemo_care.checks.node ]]; then
    of_node=VERDICT_$SLURMD_NODENAME
    verdict=${{!of_node:-${{VERDICT:-}}}}
    if [[ -n $verdict ]]; then
        echo "$verdict" > "$4/$SLURMD_NODENAME"
        exit 0
    fi
    [[ $SLURMD_NODENAME != "${{NEEDS_GPUS:-}}" ]] || unset NEMO_CARE_CPU
    exec {python} "$@"
fi
echo "$SLURMD_NODENAME, task $SLURM_PROCID of $SLURM_STEP_NUM_TASKS, to $MASTER_ADDR: $*"
[[ $2 != ray.scripts.scripts ]] || exit 0
echo "connections ${{CUDA_DEVICE_MAX_CONNECTIONS}}, key ${{WANDB_API_KEY:+is here}}"
if [[ -n ${{SAVES:-}} ]]; then
    exec {python} -c "$SAVING"
fi
[[ -z ${{SECONDS_TO_RUN:-}} ]] || exec sleep "$SECONDS_TO_RUN"
exit "${{STATUS:-0}}"
"""
# A run that takes $SAVES seconds to save after it was asked to stop.
SAVING = """
import os, signal, sys, time
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
print("ready", flush=True)
while not asked:
    time.sleep(0.1)
end = time.monotonic() + float(os.environ["SAVES"])
while time.monotonic() < end:
    time.sleep(0.1)
sys.exit(75)
"""
# A tiny run on nodes without containers and GPUs.
BARE = {
    "NEMO_CARE_HOME": str(CHECKOUT),
    "NEMO_CARE_CONTAINER": "none",
    "NEMO_CARE_RECIPE": "tiny_cpu",
    "NEMO_CARE_CPU": "1",
    # This cluster has no GRES.
    "SBATCH_GPUS_PER_NODE": "0",
    "NEMO_CARE_PREFLIGHT": "0",
    "OMP_NUM_THREADS": "1",
}
STEPS = 10
BROKEN_REWARD = """
import os
def broken(completion, sample):
    if os.environ['SLURM_PROCID'] == '1':
        raise ValueError('broken on purpose')
    return 0.0
"""


def until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 150
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Job:
    """A job that is submitted as a user would, on bare nodes without GPUs."""

    def __init__(
        self,
        slurm: made_slurm.Cluster,
        folder: Path,
        *overrides: str,
        script: Path = SCRIPT,
        python: str | None = None,
        **variables: str,
    ) -> None:
        self.slurm, self.folder, self.run = slurm, folder, folder / "run"
        fake = folder / "python"
        fake.write_text(FAKE_PYTHON.format(python=sys.executable))
        fake.chmod(0o755)
        usual = {
            **BARE,
            "NEMO_CARE_PYTHON": python or str(fake),
            "NEMO_CARE_RUN_DIR": str(self.run),
            "WANDB_API_KEY": "a-secret-key",
            "SAVING": SAVING,
        }
        self.number = slurm.submit(
            *("--nodes=2", "--time=30", f"--chdir={folder}", f"--output={folder}/log"),
            *(str(script), *overrides),
            **usual | variables,
        )

    @property
    def log(self) -> str:
        """What it has printed so far."""
        file = self.folder / "log"
        return file.read_text() if file.exists() else ""

    def logs(self, restart: int = 0) -> Path:
        return self.run / f"slurm/{self.number}/restart_{restart}"

    def ended(self) -> tuple[str, str]:
        """Its state and exit status, when it has ended."""
        job = self.slurm.wait(self.number, seconds=300)
        return job["JobState"], job["ExitCode"]

    def signal(self) -> None:
        """Ask it to stop, as --signal=B:USR1@300 does 300 seconds before the time limit."""
        self.slurm.run("scancel", "--signal=USR1", "--batch", self.number)

    def cancel(self) -> None:
        self.slurm.run("scancel", self.number)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[made_slurm.Cluster]:
    reason = made_slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    with made_slurm.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def small(world: Path) -> tuple[str, ...]:
    return (
        *(f"data.train.root={world}", "data.train.kind=jsonl", "data.validation.annotations=null"),
        *("algorithm.prompts_per_step=4", "checkpoint.export=false", f"trainer.max_steps={STEPS}"),
    )


@pytest.fixture(scope="module")
def jobs(slurm, small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The jobs of most tests: submitted at once, because they wait more than they compute."""
    made: dict[str, Job] = {}

    def submit(name: str, *overrides: str, **settings) -> None:
        folder = tmp_path_factory.mktemp(name)
        (folder / "my_rewards.py").write_text(BROKEN_REWARD)
        made[name] = Job(slurm, folder, *overrides, **settings)

    preflight = {"NEMO_CARE_PREFLIGHT": "1"}
    engines = {"script": ENGINES, "NEMO_CARE_ROLLOUT_NODES": "1"}
    rewards = "algorithm.rewards=[accuracy,format,my_rewards.broken]"
    submit("failing_rank", *small, rewards, python=sys.executable)
    submit("spare", **preflight, NEMO_CARE_SPARE_NODES="1", NEEDS_GPUS="node1")
    submit("plain", "trainer.max_steps=500", "trainer.seed=7")
    evaluate = CHECKOUT / "slurm/evaluate.sh"
    submit("evaluation", "evaluation.judge=rule", script=evaluate, SECONDS_TO_RUN="600")
    submit("unusable", STATUS="2")
    submit("cancelled", "trainer.seed=7", SAVES="0")
    submit("preempted", "trainer.seed=7", SAVES="4")
    submit("not_requeued", STATUS="75", NEMO_CARE_REQUEUE="0")
    submit("no_spare", **preflight, VERDICT="ok", VERDICT_node2="broken")
    submit("bad_recipe", **preflight, VERDICT="recipe: unknown recipe key x")
    submit("engines", "trainer.seed=7", **engines, SECONDS_TO_RUN="600")
    submit("broken_engines", **engines, **preflight, VERDICT="broken")
    submit("stopped_engines", **engines, SAVES="0")
    return made


# ------------------------------------------------------------------ the scripts, without Slurm


def in_a_job(tmp_path: Path, commands: str, *arguments: str, **variables: str):
    """Run commands as in the batch job of two nodes."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    job |= {"SLURM_JOB_NODELIST": "node[1-2]", "NEMO_CARE_RUN_DIR": str(tmp_path / "run")}
    job |= {"NEMO_CARE_PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    job |= {"NEMO_CARE_CONTAINER": "none", "NEMO_CARE_RECIPE": "tiny_cpu"}
    return subprocess.run(
        ["bash", "-c", f". {CHECKOUT}/slurm/common.sh; {commands}", "job", *arguments],
        env=job | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def step_of(tmp_path: Path, **variables: str) -> list[str]:
    """The words that start a step of the job."""
    show = 'command=train restart=0; overrides=(); check_settings; echo "${launch[*]}"'
    done = in_a_job(tmp_path, show, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("gpus", "asked"), [("8", "--gres=gpu:8"), ("", "")])
def test_a_step_asks_for_the_gpus_of_its_job(tmp_path, gpus, asked):
    """Where devices are constrained it would get none. There are no GPUs."""
    words = step_of(tmp_path, SLURM_GPUS_ON_NODE=gpus)
    assert [word for word in words if word.startswith("--gres")] == asked.split()


def test_containers_of_ranks_and_of_ray_share_the_folder_of_its_sockets(tmp_path):
    image = {"NEMO_CARE_CONTAINER": "nemo.sqsh", "NEMO_CARE_MOUNTS": "/data:/data"}
    for nodes, shared in (("0", []), ("1", ["/tmp:/tmp"])):
        words = step_of(tmp_path, **image, NEMO_CARE_ROLLOUT_NODES=nodes)
        (mounts,) = [word for word in words if word.startswith("--container-mounts=")]
        assert mounts.split(",")[3:] == ["/data:/data", *shared]


def test_the_scripts_ask_for_gpus():
    scripts = ("train_7b", "train_32b", "train_72b", "train_72b_async", "train_qwen3_vl_235b")
    for script in (*scripts, "evaluate"):
        text = (CHECKOUT / "slurm" / f"{script}.sh").read_text()
        assert "\n#SBATCH --gpus-per-node=8\n" in text


def test_shellcheck_has_nothing_to_say():
    files = sorted(map(str, (CHECKOUT / "slurm").glob("*.sh")))
    try:
        done = subprocess.run(
            ["shellcheck", "-x", *files], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variables", "overrides", "message"),
    [
        ({"NEMO_CARE_CONTAINER": ""}, (), "NEMO_CARE_CONTAINER is not set"),
        ({"NEMO_CARE_CONTAINER": "nemo.sqsh"}, (), "NEMO_CARE_MOUNTS is not set"),
        ({"NEMO_CARE_SPARE_NODES": "2"}, (), "NEMO_CARE_SPARE_NODES=2 leaves none"),
        ({}, ("trainer.num_nodes=4",), "trainer.num_nodes=4: the job sets it"),
        ({"NEMO_CARE_ROLLOUT_NODES": "2"}, (), "NEMO_CARE_ROLLOUT_NODES=2 leaves none"),
        (
            {"NEMO_CARE_ROLLOUT_NODES": "1"},
            ("rollout.vllm.ray_address=a:1",),
            "rollout.vllm.ray_address=a:1: the job starts Ray",
        ),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(tmp_path, variables, overrides, message):
    done = in_a_job(tmp_path, 'run_job train "$@"', *overrides, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_restarts_without_a_newer_checkpoint_come_to_an_end(tmp_path):
    begin = "command=train; overrides=(); check_settings; mkdir -p $logs; count_fruitless_restarts"

    def start(restart: int) -> subprocess.CompletedProcess:
        limit = {"NEMO_CARE_MAX_FRUITLESS_RESTARTS": "2"}
        return in_a_job(tmp_path, f"restart={restart}; {begin}", **limit)

    assert [start(restart).returncode for restart in (0, 1)] == [0, 0]
    # The first restart was fruitless; now something has come of the second.
    (tmp_path / "run/checkpoints/step_000010").mkdir(parents=True)
    assert "start 3, on node[1-2]; resumes from: step_000010" in start(2).stdout
    assert start(3).returncode == 0
    last = start(4)
    assert last.returncode == 1
    assert "2 restarts in a row without progress (newest: step_000010)" in last.stderr


# ------------------------------------------------------------------ jobs


def test_node_count_overrides_environment_and_keys_reach_the_ranks(jobs):
    job = jobs["plain"]
    assert job.ended() == ("COMPLETED", "0:0"), job.log
    asked = (
        f"-m nemo_care train --config-name tiny_cpu exp_manager.explicit_log_dir={job.run} "
        "trainer.max_steps=500 trainer.seed=7 trainer.num_nodes=2"
    )
    for place in (0, 1):
        assert f"node{place + 1}, task {place} of 2, to 127.0.0.1: {asked}" in job.log
    assert job.log.count("connections 1, key is here") == 2
    assert "task 1 of 2" in (job.logs() / "node_001_node2.out").read_text()
    everything = [file.read_text() for file in job.folder.rglob("*") if file.is_file()]
    assert not any("a-secret-key" in text for text in everything)


def test_an_evaluation_that_is_asked_to_stop_goes_on_later(slurm, jobs):
    job = jobs["evaluation"]
    until(lambda: job.log.count("evaluation.judge=rule") == 2)
    rows = job.run / "evaluation/L1.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}\n{}\n")
    job.signal()
    slurm.start_again(job.number, 1)
    job.cancel()
    assert "-m nemo_care evaluate --config-name tiny_cpu" in job.log
    assert "requeued, to resume from: 2" in job.log


def test_the_status_of_a_failed_run_becomes_the_job_s(jobs):
    job = jobs["unusable"]
    assert job.ended() == ("FAILED", "2:0")
    assert ": exit status 2" in job.log


def test_a_job_that_is_cancelled_stays_so_though_the_run_has_saved(slurm, jobs):
    job = jobs["cancelled"]
    until(lambda: job.log.count("ready") == 2)
    job.cancel()
    until(lambda: list(job.logs().glob("stopped_*")))
    assert job.ended()[0] == "CANCELLED"
    assert slurm.job(job.number)["Restarts"] == "0"
    assert "requeued" not in job.log


def test_a_preempted_run_may_take_its_time_to_save(slurm, jobs):
    job = jobs["preempted"]
    until(lambda: job.log.count("ready") == 2)
    slurm.run("scontrol", "requeue", job.number)
    slurm.start_again(job.number, 1)
    job.cancel()
    notes = sorted(path.name for path in job.logs().glob("stopped_*"))
    assert notes == ["stopped_0", "stopped_1"], job.log


def test_a_stopped_run_that_may_not_be_requeued_says_so(jobs):
    job = jobs["not_requeued"]
    assert job.ended() == ("FAILED", "75:0")
    assert "submit the same command to resume" in job.log


# ------------------------------------------------------------------ the preflight


def test_without_a_spare_a_bad_node_ends_the_job(jobs):
    job = jobs["no_spare"]
    assert job.ended() == ("FAILED", "1:0"), job.log
    assert "preflight: node2 is left out: broken" in job.log
    assert "1 of 2 nodes are fit and 2 are needed" in job.log
    assert "task 0 of" not in job.log


def test_a_recipe_that_can_not_be_used_is_nobody_s_node(jobs):
    job = jobs["bad_recipe"]
    assert job.ended() == ("FAILED", "2:0")
    assert "unknown recipe key x" in job.log


def test_a_bad_node_is_named_and_dropped_where_there_is_a_spare(jobs):
    job = jobs["spare"]
    assert job.ended() == ("COMPLETED", "0:0"), job.log
    assert "preflight: node1 is left out: 0 usable GPUs, but trainer.devices=1" in job.log
    assert "node2, task 0 of 1, to 127.0.0.1: " in job.log
    assert "trainer.num_nodes=1" in job.log


# ------------------------------------------------------------------ engines on nodes of their own


def test_engines_get_nodes_of_their_own_and_ranks_their_addresses(jobs):
    job = jobs["engines"]
    outputs = [
        job.folder / "log",
        job.logs() / "engines/node_001_node2.out",
        job.logs() / "engines/node_000_node1.out",
    ]
    until(lambda: all(file.exists() and ", task " in file.read_text() for file in outputs))
    job.cancel()
    log, head, member = (file.read_text() for file in outputs)
    asked = (
        "-m nemo_care train --config-name tiny_cpu exp_manager.explicit_log_dir="
        f"{job.run} rollout.vllm.engines=1 rollout=vllm_async trainer.seed=7 "
        "rollout.vllm.ray_address=127.0.0.1:6379 trainer.num_nodes=1"
    )
    assert f"node1, task 0 of 1, to 127.0.0.1: {asked}" in log
    assert "node2, task 1 of 2" in head
    ours = "--head --include-dashboard=false --node-ip-address=127.0.0.1 --port=6379"
    assert f"-m ray.scripts.scripts start --disable-usage-stats {ours}" in head
    # Those that train take part, because a process uses Ray through its own node.
    joined = "start --disable-usage-stats --address=127.0.0.1:6379 --num-gpus=0"
    assert f"-m ray.scripts.scripts {joined}" in member
    assert "node2, task 0 of 1" not in log


def test_the_preflight_includes_the_engines_nodes(jobs):
    job = jobs["broken_engines"]
    assert job.ended() == ("FAILED", "1:0"), job.log
    assert "preflight: node2 is left out: broken" in job.log
    assert "0 of 2 nodes are fit and 2 are needed" in job.log
    assert "engines on" not in job.log


def test_a_run_and_its_engines_are_stopped_and_go_on_together(slurm, jobs):
    job = jobs["stopped_engines"]
    until(lambda: job.log.count("ready") == 1)
    job.signal()
    slurm.start_again(job.number, 1)
    until(lambda: job.log.count("ready") == 2)
    job.cancel()
    job.ended()
    assert job.log.count("engines on 1 nodes: node2") == 2
    for restart in (0, 1):
        notes = sorted(path.name for path in (job.logs(restart) / "engines").glob("ready_*"))
        assert notes == ["ready_node1", "ready_node2"]
    stopped = job.logs() / "engines/node_001_node2.out"
    assert "-m ray.scripts.scripts stop --force" in stopped.read_text()


# ------------------------------------------------------------------ training


def test_a_failing_rank_ends_the_job_and_is_named(jobs):
    job = jobs["failing_rank"]
    assert job.ended() == ("FAILED", "1:0"), job.log
    assert "broken on purpose" in job.log
    assert "node2: exit status 1" in job.log
    assert "node2: task 1: Exited with exit code 1" in job.log
    assert "broken on purpose" in (job.logs() / "node_001_node2.err").read_text()


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("timing/", "data/worker", "memory/")
    return [{key: line[key] for key in line if not key.startswith(timed)} for line in lines]


def wait_for_step(job: Job, step: int) -> None:
    job.slurm.wait(job.number, "RUNNING")
    file = job.run / "metrics.jsonl"
    until(lambda: file.exists() and file.read_text().count("\n") >= step)
    assert job.slurm.job(job.number)["JobState"] == "RUNNING"


@pytest.mark.slow
def test_a_run_on_two_nodes_goes_on_after_time_limit_and_preemption(slurm, small, tmp_path):
    """One that nobody disturbs, and one that gets both signals in the middle of a step."""
    layout = (*small, "model.pipeline_model_parallel_size=2")
    for name in ("whole", "disturbed"):
        (tmp_path / name).mkdir()
    first = Job(slurm, tmp_path / "whole", *layout, python=sys.executable)
    assert first.ended() == ("COMPLETED", "0:0"), first.log
    whole = metrics(first.run)
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))

    job = Job(slurm, tmp_path / "disturbed", *layout, python=sys.executable)
    wait_for_step(job, 1)
    job.signal()
    slurm.start_again(job.number, 1)
    done = len(metrics(job.run))
    assert [path.name for path in (job.run / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    wait_for_step(job, done + 1)
    # What a preemption does.
    slurm.run("scontrol", "requeue", job.number)
    slurm.start_again(job.number, 2)
    again = len(metrics(job.run))
    assert done < again < STEPS
    assert (job.run / f"checkpoints/step_{again:06d}").is_dir()
    assert job.ended() == ("COMPLETED", "0:0"), job.log
    assert slurm.job(job.number)["Restarts"] == "2"
    assert f"requeued, to resume from: step_{done:06d}" in job.log
    assert f"start 3, on node[1-2]; resumes from: step_{again:06d}" in job.log
    assert metrics(job.run) == whole
    assert len((job.run / "starts.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_two_ranks_on_each_of_two_nodes_stop_and_go_on(slurm, small, tmp_path):
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    job = Job(slurm, tmp_path, *small, *layout, python=sys.executable)
    wait_for_step(job, 1)
    job.signal()
    slurm.start_again(job.number, 1)
    assert job.ended() == ("COMPLETED", "0:0"), job.log
    assert len(metrics(job.run)) == STEPS
    for restart in (0, 1):
        files = [file.name for file in job.logs(restart).glob("rank_*.out")]
        assert sorted(files) == [f"rank_{rank:04d}.out" for rank in range(4)]


@pytest.mark.slow
def test_a_recipe_is_submitted_at_several_sizes_and_compared(slurm, small, tmp_path):
    printed = slurm.run(
        *("bash", str(CHECKOUT / "slurm" / "scaling.sh"), "1", "2", "--", "--time=30"),
        *(f"--output={tmp_path}/log_%j", "--", *small),
        **BARE,
        NEMO_CARE_PYTHON=sys.executable,
        NEMO_CARE_SCALING_DIR=str(tmp_path / "scaling"),
    )
    for number in re.findall(r"nodes: job (\d+),", printed):
        job = slurm.wait(number, seconds=300)
        log = (tmp_path / f"log_{number}").read_text()
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    runs = [tmp_path / "scaling" / nodes for nodes in ("1", "2")]
    assert [len(metrics(run)) for run in runs] == [STEPS, STEPS]
    command = [sys.executable, "-m", "nemo_care.cli", "report", "--scaling", *map(str, runs)]
    table = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "efficiency" in table
