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
# In place of the training command: says what it was asked for and ends as the test wants it.
FAKE_PYTHON = """#!/bin/bash
if [[ $2 == nemo_care.checks.node && -z ${{CHECKED:-}} ]]; then
    exec {python} "$@"
fi
if [[ $2 == nemo_care.checks.node ]]; then
    echo "${{VERDICT:-ok}}" > "$4/$SLURMD_NODENAME"
    exit 0
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
Submit = Callable[..., str]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[made_slurm.Cluster]:
    reason = made_slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    with made_slurm.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def submit(slurm: made_slurm.Cluster, tmp_path: Path) -> Submit:
    """Submits the script as a user would, on bare nodes without GPUs."""
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON.format(python=sys.executable))
    fake.chmod(0o755)

    def make(
        *overrides: str,
        script: Path = SCRIPT,
        options: tuple[str, ...] = (),
        python: str | Path = fake,
        **variables: str,
    ) -> str:
        usual = {
            **BARE,
            "NEMO_CARE_PYTHON": str(python),
            "NEMO_CARE_RUN_DIR": str(tmp_path / "run"),
            "WANDB_API_KEY": "a-secret-key",
            "SAVING": SAVING,
        }
        return slurm.submit(
            *("--nodes=2", "--time=30", f"--chdir={tmp_path}", f"--output={tmp_path}/log"),
            *(*options, str(script), *overrides),
            **usual | variables,
        )

    return make


def ended(job: dict[str, str]) -> tuple[str, str]:
    return job["JobState"], job["ExitCode"]


# ------------------------------------------------------------------ the scripts themselves


def step_of(tmp_path: Path, **variables: str) -> list[str]:
    """The words that start a step of a job of two nodes. Slurm is not started."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    job |= {"NEMO_CARE_PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    job |= {"NEMO_CARE_CONTAINER": "none", "NEMO_CARE_RECIPE": "tiny_cpu"}
    show = f". {CHECKOUT}/slurm/common.sh; command=train restart=0; overrides=(); check_settings; "
    done = subprocess.run(
        ["bash", "-c", show + 'echo "${launch[*]}"'],
        env=job | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
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


def test_node_count_overrides_environment_and_keys_reach_the_ranks(slurm, submit, tmp_path):
    job = slurm.wait(submit("trainer.max_steps=500", "trainer.seed=7"))
    log = (tmp_path / "log").read_text()
    assert ended(job) == ("COMPLETED", "0:0"), log
    asked = (
        f"-m nemo_care train --config-name tiny_cpu exp_manager.explicit_log_dir={tmp_path}/run "
        "trainer.max_steps=500 trainer.seed=7 trainer.num_nodes=2"
    )
    for place in (0, 1):
        assert f"node{place + 1}, task {place} of 2, to 127.0.0.1: {asked}" in log
    assert log.count("connections 1, key is here") == 2
    kept = tmp_path / f"run/slurm/{job['JobId']}/restart_0"
    assert "task 1 of 2" in (kept / "node_001_node2.out").read_text()
    everything = [log, *(file.read_text() for file in tmp_path.rglob("*") if file.is_file())]
    assert not any("a-secret-key" in text for text in everything)


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
def test_what_is_missing_is_named_before_anything_starts(
    slurm, submit, tmp_path, variables, overrides, message
):
    job = slurm.wait(submit(*overrides, **variables))
    assert ended(job) == ("FAILED", "2:0")
    assert message in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_is_asked_to_stop_goes_on_later(slurm, submit, tmp_path):
    rows = tmp_path / "run/evaluation/L1.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}\n{}\n")
    script = CHECKOUT / "slurm/evaluate.sh"
    number = submit("evaluation.judge=rule", script=script, SECONDS_TO_RUN="600")
    log = tmp_path / "log"
    while not log.exists() or log.read_text().count("evaluation.judge=rule") < 2:
        time.sleep(0.1)
    slurm.run("scancel", "--signal=USR1", "--batch", number)
    slurm.start_again(number, 1)
    slurm.run("scancel", number)
    assert "-m nemo_care evaluate --config-name tiny_cpu" in log.read_text()
    assert "requeued, to resume from: 2" in log.read_text()


def test_the_status_of_a_failed_run_becomes_the_job_s(slurm, submit, tmp_path):
    job = slurm.wait(submit(STATUS="2"))
    assert ended(job) == ("FAILED", "2:0")
    assert ": exit status 2" in (tmp_path / "log").read_text()


def test_restarts_without_a_newer_checkpoint_come_to_an_end(slurm, submit, tmp_path):
    number = submit(STATUS="75", NEMO_CARE_MAX_FRUITLESS_RESTARTS="2")
    slurm.start_again(number, 1)
    while slurm.job(number)["Restarts"] != "2":
        time.sleep(0.1)
    # The first restart was fruitless; now something has come of the second.
    (tmp_path / "run/checkpoints/step_000010").mkdir(parents=True)
    slurm.start_again(number, 2)
    slurm.start_again(number, 3)
    slurm.start_again(number, 4)
    job = slurm.wait(number)
    log = (tmp_path / "log").read_text()
    assert ended(job) == ("FAILED", "1:0"), log
    assert "2 restarts in a row without progress (newest: step_000010)" in log
    assert log.count("stopped; requeued") == 4


def test_a_job_that_is_cancelled_stays_so_though_the_run_has_saved(slurm, submit, tmp_path):
    number = submit("trainer.seed=7", SAVES="0")
    log = tmp_path / "log"
    while not log.exists() or log.read_text().count("ready") < 2:
        time.sleep(0.1)
    slurm.run("scancel", number)
    while not list(tmp_path.glob("run/slurm/*/restart_0/stopped_*")):
        time.sleep(0.1)
    job = slurm.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "requeued" not in log.read_text()


def test_a_preempted_run_may_take_its_time_to_save(slurm, submit, tmp_path):
    number = submit("trainer.seed=7", SAVES="4")
    log = tmp_path / "log"
    while not log.exists() or log.read_text().count("ready") < 2:
        time.sleep(0.1)
    slurm.run("scontrol", "requeue", number)
    slurm.start_again(number, 1)
    slurm.run("scancel", number)
    notes = sorted(path.name for path in tmp_path.glob("run/slurm/*/restart_0/stopped_*"))
    assert notes == ["stopped_0", "stopped_1"], log.read_text()


def test_a_stopped_run_that_may_not_be_requeued_says_so(slurm, submit, tmp_path):
    job = slurm.wait(submit(STATUS="75", NEMO_CARE_REQUEUE="0"))
    assert ended(job) == ("FAILED", "75:0")
    assert "submit the same command to resume" in (tmp_path / "log").read_text()


# ------------------------------------------------------------------ the preflight


def test_a_bad_node_is_named_and_dropped_where_there_is_a_spare(slurm, submit, tmp_path):
    with slurm.changed("node1", "unset NEMO_CARE_CPU"):
        job = slurm.wait(submit(NEMO_CARE_PREFLIGHT="1", NEMO_CARE_SPARE_NODES="1"))
    log = (tmp_path / "log").read_text()
    assert ended(job) == ("COMPLETED", "0:0"), log
    assert "preflight: node1 is left out: 0 usable GPUs, but trainer.devices=1" in log
    assert "node2, task 0 of 1, to 127.0.0.1: " in log
    assert "trainer.num_nodes=1" in log


def test_without_a_spare_a_bad_node_ends_the_job(slurm, submit, tmp_path):
    with slurm.changed("node2", "export VERDICT=broken"):
        job = slurm.wait(submit(NEMO_CARE_PREFLIGHT="1", CHECKED="1"))
    log = (tmp_path / "log").read_text()
    assert ended(job) == ("FAILED", "1:0"), log
    assert "preflight: node2 is left out: broken" in log
    assert "1 of 2 nodes are fit and 2 are needed" in log
    assert "task 0 of" not in log


def test_a_recipe_that_can_not_be_used_is_nobody_s_node(slurm, submit, tmp_path):
    job = slurm.wait(
        submit(NEMO_CARE_PREFLIGHT="1", CHECKED="1", VERDICT="recipe: unknown recipe key x")
    )
    assert ended(job) == ("FAILED", "2:0")
    assert "unknown recipe key x" in (tmp_path / "log").read_text()


# ------------------------------------------------------------------ training

STEPS = 10


@pytest.fixture(scope="module")
def small(world: Path) -> tuple[str, ...]:
    return (
        *(f"data.train.root={world}", "data.train.kind=jsonl", "data.validation.annotations=null"),
        *("algorithm.prompts_per_step=4", "checkpoint.export=false", f"trainer.max_steps={STEPS}"),
    )


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("timing/", "data/worker", "memory/")
    return [{key: line[key] for key in line if not key.startswith(timed)} for line in lines]


def wait_for_step(slurm: made_slurm.Cluster, number: str, run: Path, step: int) -> None:
    file = run / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not file.exists() or file.read_text().count("\n") < step:
        assert time.monotonic() < deadline
        assert slurm.job(number)["JobState"] == "RUNNING"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_on_two_nodes_goes_on_after_time_limit_and_preemption(slurm, submit, small, tmp_path):
    """One that nobody disturbs, and one that gets both signals in the middle of a step."""
    layout = (*small, "model.pipeline_model_parallel_size=2")
    first = submit(*layout, python=sys.executable, NEMO_CARE_RUN_DIR=f"{tmp_path}/whole")
    job = slurm.wait(first)
    assert ended(job) == ("COMPLETED", "0:0"), (tmp_path / "log").read_text()
    whole = metrics(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))

    run = tmp_path / "run"
    number = submit(*layout, python=sys.executable, options=(f"--output={tmp_path}/disturbed",))
    slurm.wait(number, "RUNNING")
    wait_for_step(slurm, number, run, 1)
    # What sbatch's --signal=B:USR1@300 does 300 seconds before the time limit.
    slurm.run("scancel", "--signal=USR1", "--batch", number)
    slurm.start_again(number, 1)
    done = len(metrics(run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    slurm.wait(number, "RUNNING")
    wait_for_step(slurm, number, run, done + 1)
    # What a preemption does.
    slurm.run("scontrol", "requeue", number)
    slurm.start_again(number, 2)
    again = len(metrics(run))
    assert done < again < STEPS
    assert (run / f"checkpoints/step_{again:06d}").is_dir()
    job = slurm.wait(number)
    log = (tmp_path / "disturbed").read_text()
    assert ended(job) == ("COMPLETED", "0:0"), log
    assert job["Restarts"] == "2"
    assert f"requeued, to resume from: step_{done:06d}" in log
    assert f"start 3, on node[1-2]; resumes from: step_{again:06d}" in log
    assert metrics(run) == whole
    assert len((run / "starts.jsonl").read_text().splitlines()) == 3


def test_a_failing_rank_ends_the_job_and_is_named(slurm, submit, small, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "import os\n"
        "def broken(completion, sample):\n"
        "    if os.environ['SLURM_PROCID'] == '1':\n"
        "        raise ValueError('broken on purpose')\n"
        "    return 0.0\n"
    )
    rewards = "algorithm.rewards=[accuracy,format,my_rewards.broken]"
    number = submit(*small, rewards, python=sys.executable)
    job = slurm.wait(number)
    log = (tmp_path / "log").read_text()
    assert ended(job) == ("FAILED", "1:0"), log
    assert "broken on purpose" in log
    assert "node2: exit status 1" in log
    assert "node2: task 1: Exited with exit code 1" in log
    assert "broken on purpose" in next(tmp_path.rglob("node_001_node2.err")).read_text()


@pytest.mark.slow
def test_two_ranks_on_each_of_two_nodes_stop_and_go_on(slurm, submit, small, tmp_path):
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    number = submit(*small, *layout, python=sys.executable)
    slurm.wait(number, "RUNNING")
    wait_for_step(slurm, number, tmp_path / "run", 1)
    slurm.run("scancel", "--signal=USR1", "--batch", number)
    slurm.start_again(number, 1)
    job = slurm.wait(number, seconds=300)
    log = (tmp_path / "log").read_text()
    assert ended(job) == ("COMPLETED", "0:0"), log
    assert len(metrics(tmp_path / "run")) == STEPS
    kept = tmp_path / f"run/slurm/{number}"
    for restart in (0, 1):
        files = [file.name for file in (kept / f"restart_{restart}").glob("rank_*.out")]
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
        assert ended(job) == ("COMPLETED", "0:0"), (tmp_path / f"log_{number}").read_text()
    runs = [tmp_path / "scaling" / nodes for nodes in ("1", "2")]
    assert [len(metrics(run)) for run in runs] == [STEPS, STEPS]
    command = [sys.executable, "-m", "nemo_care.cli", "report", "--scaling", *map(str, runs)]
    table = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "efficiency" in table


# ------------------------------------------------------------------ engines on nodes of their own

ENGINES = CHECKOUT / "slurm" / "train_72b_async.sh"


def test_engines_get_nodes_of_their_own_and_ranks_their_addresses(slurm, submit, tmp_path):
    number = submit(
        "trainer.seed=7", script=ENGINES, NEMO_CARE_ROLLOUT_NODES="1", SECONDS_TO_RUN="600"
    )
    outputs = [
        tmp_path / "log",
        tmp_path / f"run/slurm/{number}/restart_0/engines/node_001_node2.out",
        tmp_path / f"run/slurm/{number}/restart_0/engines/node_000_node1.out",
    ]
    deadline = time.monotonic() + 150
    while not all(file.exists() and ", task " in file.read_text() for file in outputs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.run("scancel", number)
    log, head, member = (file.read_text() for file in outputs)
    asked = (
        "-m nemo_care train --config-name tiny_cpu exp_manager.explicit_log_dir="
        f"{tmp_path}/run rollout.vllm.engines=1 rollout=vllm_async trainer.seed=7 "
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
    slurm.wait(number)


def test_the_preflight_includes_the_engines_nodes(slurm, submit, tmp_path):
    job = slurm.wait(
        submit(
            script=ENGINES,
            NEMO_CARE_ROLLOUT_NODES="1",
            NEMO_CARE_PREFLIGHT="1",
            CHECKED="1",
            VERDICT="broken",
        )
    )
    log = (tmp_path / "log").read_text()
    assert ended(job) == ("FAILED", "1:0"), log
    assert "preflight: node2 is left out: broken" in log
    assert "0 of 2 nodes are fit and 2 are needed" in log
    assert "engines on" not in log


def test_a_run_and_its_engines_are_stopped_and_go_on_together(slurm, submit, tmp_path):
    number = submit(script=ENGINES, NEMO_CARE_ROLLOUT_NODES="1", SAVES="0")
    log = tmp_path / "log"
    for start in (1, 2):
        deadline = time.monotonic() + 150
        while not log.exists() or log.read_text().count("ready") < start:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        slurm.run("scancel", "--signal=USR1", "--batch", number)
        if start == 1:
            slurm.start_again(number, 1)
    slurm.run("scancel", number)
    slurm.wait(number)
    text = log.read_text()
    assert text.count("engines on 1 nodes: node2") == 2
    for start in (0, 1):
        folder = tmp_path / f"run/slurm/{number}/restart_{start}/engines"
        notes = sorted(path.name for path in folder.glob("ready_*"))
        assert notes == ["ready_node1", "ready_node2"]
    stopped = tmp_path / f"run/slurm/{number}/restart_0/engines/node_001_node2.out"
    assert "-m ray.scripts.scripts stop --force" in stopped.read_text()
