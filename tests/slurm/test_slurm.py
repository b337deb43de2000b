"""A real SLURM of three nodes on this host does to the demo what clusters do: `bash tests/run.sh -m slurm`.

As root on Debian. The first job on a machine compiles DeepSpeed's operators, which takes minutes on two cores.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
STEPS = 12
LIMIT_S = 600
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(2 * LIMIT_S),
    pytest.mark.skipif(os.geteuid() != 0, reason="starts SLURM's daemons, which takes root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    state = tmp_path_factory.mktemp("slurm")
    try:
        started = run("bash", CLUSTER, "start", state)
        os.environ["SLURM_CONF"] = started.stdout.strip().splitlines()[-1]
        yield state
    finally:
        run("bash", CLUSTER, "stop", state)
        os.environ.pop("SLURM_CONF", None)


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=ROOT, timeout=300, env={**os.environ, **env}
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class Job:
    """The demo on two nodes of one CPU task, in `tmp`/run."""

    def __init__(self, tmp: Path, *arguments: str, options: tuple[str, ...] = (), **env: str) -> None:
        self.run_dir, self.log = tmp / "a run", tmp / "job.log"
        node = ["--account=any", "--partition=main", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]
        recipe = ["--config=launch/recipes/demo.yaml", f"run_dir={self.run_dir}", f"train.steps={STEPS}"]
        small = ["batch.global_batch_size=8", "optimizer.warmup_steps=0", "tracking.wandb=off"]
        submit = ["sbatch", "--parsable", *node, *options, f"--output={self.log}", "launch/slurm/train.sbatch"]
        training = ["--ds_config=ds_configs/zero3_offload.json", *recipe, *small, *arguments]
        self.id = run(*submit, *training, **env).stdout.strip()

    def shown(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S*)", run("scontrol", "show", "job", self.id).stdout)[1]

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else "(no log)"

    def wait(self, what: str, done: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        while not done():
            state = self.shown("JobState")
            if time.monotonic() > end or (state in ENDED and not done()):
                run("scancel", self.id)
                raise AssertionError(f"{what} did not come: the job is {state}\n{self.text()}")
            time.sleep(0.3)

    def wait_for_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: len(self.records()) > step)

    def wait_for_requeue(self) -> None:
        """Until the job waits for its next run; which SLURM would put off by two minutes.

        Seconds are enough, but none are too few: a node refuses a job that begins in the second in which it was killed.
        """
        self.wait("the requeue", lambda: self.shown("Restarts") == "1" and self.shown("JobState") == "PENDING")
        run("scontrol", "update", f"JobId={self.id}", "StartTime=now+3")

    def wait_for_end(self) -> str:
        """Return the last state and exit code."""
        self.wait("the end", lambda: self.shown("JobState") in ENDED)
        return f"{self.shown('JobState')} {self.shown('ExitCode')}"

    def records(self) -> list[dict]:
        file = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def result(self) -> dict[str, str]:
        """Every step's loss, and the digest of every file of the last checkpoint: equal texts are equal bits."""
        assert [record["step"] for record in self.records()] == list(range(STEPS))
        manifest = json.loads((self.run_dir / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
        losses = {f"loss {record['step']}": float(record["loss"]).hex() for record in self.records()}
        return losses | {name: str(facts) for name, facts in manifest["files"].items()}


@pytest.fixture(scope="module")
def undisturbed(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("undisturbed"))
    assert job.wait_for_end() == "COMPLETED 0:0", job.text()
    return job


def test_two_nodes_train_the_demo_as_one_world(cluster: Path, undisturbed: Job) -> None:
    assert undisturbed.shown("NumNodes") == undisturbed.shown("NumTasks") == "2"
    for node in ("n1", "n2"):
        log = (cluster / f"slurmd.{node}.log").read_text()
        assert f"launch task StepId={undisturbed.id}.0" in log, f"{node} ran no task"
    assert len(undisturbed.result()) == STEPS + 2, "a file of each rank"
    assert "preflight: 2 nodes, 2 ranks, 0 GPUs a node: fit" in undisturbed.text()
    assert "2 ranks on cpu" in undisturbed.text()
    assert sorted(p.name for p in undisturbed.run_dir.glob(".*")) in ([], [".lock"]), "the job cleans up after itself"
    assert Path(f"/tmp/dstrain-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_sigusr1_saves_and_queues_the_job_again_with_the_same_bits(tmp_path: Path, undisturbed: Job) -> None:
    job = Job(tmp_path)
    job.wait_for_step(3)
    run("scancel", "--signal=USR1", job.id)
    job.wait_for_requeue()
    assert len(job.records()) < STEPS
    assert job.wait_for_end() == "COMPLETED 0:0", job.text()
    assert job.shown("Restarts") == "1" and job.text().count("queued again") == 1
    assert job.result() == undisturbed.result()


def test_a_preempted_job_comes_back_with_the_same_bits(tmp_path: Path, undisturbed: Job) -> None:
    job = Job(tmp_path)
    job.wait_for_step(3)
    run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job.wait_for_requeue()
    assert "DUE TO PREEMPTION" in job.text() and "queued again" not in job.text()
    assert len(list(job.run_dir.glob("checkpoints/step-*"))) == 1, "it saved when it was told"
    assert job.wait_for_end() == "COMPLETED 0:0", job.text()
    assert job.shown("Restarts") == "1"
    assert job.result() == undisturbed.result()


def test_a_bad_node_is_named_and_left_out(tmp_path: Path, undisturbed: Job) -> None:
    fault = {"at": "preflight", "do": "stop", "nth": 1, "rank": 1, "once": str(tmp_path / "happened")}
    job = Job(tmp_path, DSTRAIN_FAULTS=json.dumps([fault]), DSTRAIN_PREFLIGHT_SECONDS="20")
    job.wait_for_requeue()
    assert "preflight: bad: n2: rank 1 did not answer within 20 s" in job.text()
    assert job.shown("ExcNodeList") == "n2"
    assert job.wait_for_end() == "COMPLETED 0:0", job.text()
    assert job.shown("NodeList") == "n[1,3]"
    assert job.result() == undisturbed.result()


def test_a_stop_file_ends_the_job_for_good(tmp_path: Path, cluster: Path) -> None:
    job = Job(tmp_path)
    job.wait_for_step(2)
    (job.run_dir / "STOP").touch()
    assert job.wait_for_end() == "FAILED 75:0", job.text()
    assert job.shown("Restarts") == "0" and "a person stopped the run" in job.text()
    assert len(list(job.run_dir.glob("checkpoints/step-*"))) == 1


def test_a_time_limit_queues_the_job_again_but_scancel_ends_it(tmp_path: Path, cluster: Path) -> None:
    job = Job(tmp_path, "train.steps=5000", options=("--time=60", "--signal=USR1@60"))
    started = time.monotonic()
    job.wait_for_step(2)
    soon = int(time.monotonic() - started) // 60 + 2  # minutes, the least that SLURM counts in
    run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={soon}")
    job.wait_for_requeue()
    run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    saved = len(job.records())
    assert saved and (job.run_dir / f"checkpoints/step-{saved:08d}").is_dir(), job.text()
    job.wait_for_step(saved + 1)
    run("scancel", job.id)
    assert job.wait_for_end().startswith("CANCELLED"), job.text()
    time.sleep(5)
    assert job.shown("JobState") == "CANCELLED" and job.shown("Restarts") == "1", "a cancelled job came back"
    assert "ended by SLURM" in job.text()


def test_a_refused_recipe_ends_the_job_with_exit_code_2(tmp_path: Path, cluster: Path) -> None:
    job = Job(tmp_path, "train.stepps=6")
    assert job.wait_for_end() == "FAILED 2:0", job.text()
    assert job.shown("Restarts") == "0" and "did you mean 'steps'?" in job.text()
