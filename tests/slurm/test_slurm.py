"""The demo trains under a real SLURM of two nodes on this host: `bash tests/run.sh -m slurm`, as root on Debian."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
STEPS = 6
LIMIT_S = 1500  # a job compiles DeepSpeed's operators anew, which takes minutes on two cores

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


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def submit(log: Path, *arguments: str) -> str:
    """Submit two nodes of one CPU task, wait for the end, and return what scontrol says about the job."""
    options = ["--account=any", "--partition=main", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]
    done = run("sbatch", "--parsable", *options, f"--output={log}", "launch/slurm/train.sbatch", *arguments)
    job = done.stdout.strip()
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        shown = run("scontrol", "show", "job", job).stdout
        if re.search(r"JobState=(?!PENDING|CONFIGURING|RUNNING|COMPLETING)", shown):
            return shown
        time.sleep(1)
    run("scancel", job)
    raise AssertionError(f"job {job} did not end within {LIMIT_S} s\n{text(log)}")


def text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else "(no log)"


def test_two_nodes_train_the_demo_as_one_world(cluster: Path, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "job.log", tmp_path / "a run"
    shown = submit(
        log,
        "--ds_config=ds_configs/zero3_offload.json",
        "--config=launch/recipes/demo.yaml",
        f"run_dir={run_dir}",
        f"train.steps={STEPS}",
        "batch.global_batch_size=8",
        "optimizer.warmup_steps=0",
        "tracking.wandb=off",
    )
    assert "JobState=COMPLETED" in shown and "ExitCode=0:0" in shown, f"{shown}\n{text(log)}"
    assert "NumNodes=2" in shown and "NumTasks=2" in shown, shown

    job = re.search(r"JobId=(\d+)", shown)[1]
    for node in ("n1", "n2"):
        assert f"launch task StepId={job}.0" in (cluster / f"slurmd.{node}.log").read_text(), f"{node} ran no task"
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(STEPS))
    assert all(0 < r["loss"] < 10 for r in records)
    (manifest,) = (run_dir / "checkpoints").glob("step-*/manifest.json")
    assert json.loads(manifest.read_text())["world_size"] == 2
    assert "2 ranks on cpu" in text(log)
    assert not list(Path("/tmp").glob(f"dstrain-{job}-*")), "the job cleans up after itself"


def test_a_refused_recipe_ends_the_job_with_exit_code_2(cluster: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    shown = submit(log, "--ds_config=ds_configs/zero3.json", "--config=launch/recipes/demo.yaml", "train.stepps=6")
    assert "JobState=FAILED" in shown and "ExitCode=2:0" in shown, f"{shown}\n{text(log)}"
    assert "did you mean 'steps'?" in text(log)
