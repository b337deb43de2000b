"""The shell scripts, with pip, DeepSpeed and SLURM played by stubs that write down how they are called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/slurm/*.s*"), *ROOT.glob("tests/**/*.sh"), ROOT / ".ci/run"]
TOOLS = (
    "awk bash cat chmod cksum cp cut df dirname env find flock grep id ls mkdir mktemp rm sed sleep sort tr wc".split()
)

# A Python that can be told to be old or to lack its headers; it "makes" an environment by copying itself.
PYTHON = """#!/bin/bash
case "$*" in
    *version_info*) exit "${OLD_PYTHON:-0}" ;;
    *Python.h*) exit "${NO_HEADERS:-0}" ;;
    *ensurepip*) exit "${NO_VENV:-0}" ;;
    *cuda*) exit 0 ;;
    "-m pip --version") exit 0 ;;
    --version) echo "Python 3.12.0"; exit 0 ;;
    "-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
esac
echo "python $*" >>"$CALLS"
exit "${PYTHON_FAILS:-0}"
"""


@pytest.fixture
def machine(tmp_path: Path) -> "Machine":
    return Machine(tmp_path)


class Machine:
    """A checkout with the scripts, on a machine that has only what a test gives it."""

    def __init__(self, tmp: Path) -> None:
        self.repo, self.bin, self.calls = tmp / "repo", tmp / "bin", tmp / "calls"
        self.env = {"PATH": str(self.bin), "HOME": str(tmp), "CALLS": str(self.calls)}
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        for path in (*SCRIPTS, ROOT / "pyproject.toml"):
            target = self.repo / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        (self.repo / "launch/train.py").touch()
        self.stub("python3", PYTHON)
        self.stub("g++")
        self.stub("curl", "#!/bin/bash\nexit 22\n")

    def stub(self, name: str, text: str = '#!/bin/bash\necho "$(basename "$0") $*" >>"$CALLS"\n') -> None:
        path = self.bin / name
        path.write_text(text.replace('$(basename "$0")', name))
        path.chmod(0o755)

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of bash in the checkout; `self.called()` then tells what it started."""
        self.calls.write_text("")
        where = cwd or self.repo
        return subprocess.run(
            [str(self.bin / "bash"), *command], env={**self.env, **env}, cwd=where, capture_output=True, text=True
        )

    def set_up(self, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", 'set -euo pipefail; source launch/setup.sh; echo "$TORCH_EXTENSIONS_DIR"', **env)

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_are_bash_and_stop_at_errors(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = script.read_text()
    assert text.startswith(("#!/usr/bin/env bash\n", "#!/bin/bash\n"))
    assert "set -euo pipefail" in text or script.name in ("setup.sh", "run"), "a failed step must not be passed over"


def test_what_is_started_directly_is_executable() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_setup_installs_torch_first_and_does_nothing_the_second_time(machine: Machine) -> None:
    done = machine.set_up()
    venv = machine.repo / ".venv"
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(venv / "torch_extensions")
    assert machine.called() == [
        f"python -m venv --clear {venv}",
        "python -m pip --disable-pip-version-check -q install torch==2.13.0",
        f"python -m pip --disable-pip-version-check -q install -e {machine.repo}",
    ]
    done = machine.set_up()
    assert done.returncode == 0 and done.stderr == ""
    assert machine.called() == []


def test_setup_installs_again_what_has_changed(machine: Machine) -> None:
    def installed(**env: str) -> str:
        assert machine.set_up(**env).returncode == 0
        return machine.called()[-1].rpartition(" ")[2] if machine.called() else ""

    repo = machine.repo
    assert installed() == str(repo)
    assert installed(DSTRAIN_EXTRAS="test") == f"{repo}[test]"
    assert installed(DSTRAIN_EXTRAS="test") == ""
    assert installed() == "", "what was installed stays"
    assert installed(DSTRAIN_EXTRAS="dev test") == f"{repo}[test,dev]"
    with (repo / "pyproject.toml").open("a") as f:
        f.write("\n# a new dependency\n")
    assert installed() == f"{repo}[test,dev]"
    moved = repo.rename(repo.with_name("moved"))
    machine.repo = moved
    assert installed() == str(moved)
    assert machine.called()[0] == f"python -m venv --clear {moved / '.venv'}"


def test_setup_is_tried_again_after_a_failure(machine: Machine) -> None:
    done = machine.set_up(PYTHON_FAILS="1")
    assert done.returncode == 1 and "setup: not set up." in done.stderr
    assert machine.set_up().returncode == 0
    assert machine.called()[-1].endswith(f"install -e {machine.repo}")


@pytest.mark.parametrize(
    ("env", "curl", "index"),
    [
        ({}, 22, ""),
        ({}, 0, " --index-url https://download.pytorch.org/whl/cpu"),
        ({"DSTRAIN_BUILD": "gpu"}, 0, ""),
        ({"DSTRAIN_TORCH_INDEX": "https://example.org/cu126"}, 0, " --index-url https://example.org/cu126"),
    ],
)
def test_setup_takes_torch_from_where_it_should(machine: Machine, env: dict[str, str], curl: int, index: str) -> None:
    machine.stub("curl", f"#!/bin/bash\nexit {curl}\n")
    assert machine.set_up(**env).returncode == 0
    assert any(call.endswith(f"install torch==2.13.0{index}") for call in machine.called())


def test_a_machine_that_gets_a_gpu_gets_another_torch(machine: Machine) -> None:
    assert machine.set_up().returncode == 0
    machine.stub("nvidia-smi", "#!/bin/bash\n")
    assert machine.set_up().returncode == 0
    pip = "python -m pip --disable-pip-version-check -q"
    assert machine.called()[:2] == [f"{pip} uninstall -y torch", f"{pip} install torch==2.13.0"]


def test_setup_keeps_its_environment_out_of_a_path_with_a_space(machine: Machine) -> None:
    machine.repo = machine.repo.rename(machine.repo.with_name("my repo"))
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{machine.env['HOME']}/.cache/dstrain/venv-")
    assert machine.called()[-1].endswith(f"install -e {machine.repo}")
    assert machine.set_up().returncode == 0 and machine.called() == []


@pytest.mark.parametrize(
    ("env", "missing", "message"),
    [
        ({"OLD_PYTHON": "1"}, "", "no Python >= 3.11 is on the PATH"),
        ({}, "python3", "no Python >= 3.11 is on the PATH"),
        ({"DSTRAIN_PYTHON": "/no/python"}, "", "DSTRAIN_PYTHON=/no/python is not a Python >= 3.11"),
        ({"NO_VENV": "1"}, "", "apt install python3-venv"),
        ({"NO_HEADERS": "1"}, "", "apt install python3-dev"),
        ({}, "g++", "apt install g++"),
    ],
)
def test_setup_says_what_the_machine_lacks(machine: Machine, env: dict[str, str], missing: str, message: str) -> None:
    if missing:
        (machine.bin / missing).unlink()
    done = machine.set_up(**env)
    assert done.returncode == 1
    assert message in done.stderr and "not set up" in done.stderr
    assert machine.called() == [], "nothing is installed"


def test_setup_warns_of_a_full_disk(machine: Machine) -> None:
    (machine.bin / "df").unlink()
    machine.stub("df", "#!/bin/bash\necho head\necho 'disk 100 90 2097152 99% /'\n")
    done = machine.set_up()
    assert done.returncode == 0
    assert "2 GiB are free" in done.stderr


def test_setup_removes_only_locks_that_a_killed_build_left(machine: Machine) -> None:
    assert machine.set_up().returncode == 0
    folders = [machine.repo / ".venv/torch_extensions" / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    os.utime(folders[0] / "lock", (0, 0))
    assert machine.set_up().returncode == 0
    assert [(folder / "lock").exists() for folder in folders] == [False, True]


def with_environment(machine: Machine) -> Path:
    assert machine.set_up(DSTRAIN_EXTRAS="test dev").returncode == 0
    return machine.repo / ".venv/bin"


@pytest.mark.parametrize("failing", [False, True])
def test_demo_trains_then_evaluates_with_the_same_overrides(machine: Machine, failing: bool) -> None:
    with_environment(machine)
    machine.stub(
        "deepspeed", f'#!/bin/bash\nprintf "<%s>" deepspeed "$@" >>"$CALLS"; echo >>"$CALLS"\nexit {3 * failing}\n'
    )
    done = machine.run(str(machine.repo / "launch/demo.sh"), "run_dir=a b", "train.steps=2", cwd=machine.bin)
    assert done.returncode == 3 * failing, done.stderr
    trained, *evaluated = machine.called()
    assert trained == (
        "<deepspeed><launch/train.py><--ds_config><ds_configs/zero3_offload.json>"
        "<--config><launch/recipes/demo.yaml><run_dir=a b><train.steps=2>"
    )
    expected = "python launch/demo/evaluate.py --config launch/recipes/demo.yaml run_dir=a b train.steps=2"
    assert evaluated == ([] if failing else [expected])


@pytest.mark.parametrize("code", [0, 1, 5])
def test_run_passes_arguments_to_pytest_and_its_exit_code_on(machine: Machine, code: int) -> None:
    with_environment(machine)
    done = machine.run(str(machine.repo / "tests/run.sh"), "-k", "plan", cwd=machine.bin, PYTHON_FAILS=str(code))
    assert done.returncode == code
    assert machine.called() == ["python -m pytest -m not slurm and not soak -n logical --maxprocesses 4 -k plan"]


@pytest.mark.parametrize(("ruff", "tests", "code"), [(0, 0, 0), (1, 0, 1), (0, 5, 5), (1, 5, 5)])
def test_ci_runs_everything_and_fails_if_anything_does(machine: Machine, ruff: int, tests: int, code: int) -> None:
    with_environment(machine)
    machine.stub("ruff", f'#!/bin/bash\necho "ruff $*" >>"$CALLS"\nexit {ruff}\n')
    machine.stub("mypy")
    done = machine.run(str(machine.repo / ".ci/run"), cwd=machine.bin, PYTHON_FAILS=str(tests))
    assert done.returncode == code
    assert machine.called() == [
        "ruff format --check .",
        "ruff check .",
        "mypy ",
        "python -m pytest -m not slurm and not soak -n logical --maxprocesses 4",
    ]
    assert ("FAILED: ruff check ." in done.stdout) == bool(ruff)


SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
case "$*" in
    "show hostnames gpu[07-08]") printf "gpu07\\ngpu08\\n" ;;
    "show job 1234567")
        echo "JobState=COMPLETING Reason=${REASON:-None}"
        echo "ReqNodeList=(null) ExcNodeList=${EXCLUDED:-(null)}" ;;
    "requeue 1234567") exit "${NO_REQUEUE:-0}" ;;
esac
"""
SRUN = """#!/bin/bash
printf "<%s>" srun "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
    *preflight*)
        [ -z "${BAD:-}" ] || printf "$BAD" >"$RUN_DIR/.bad_nodes-1234567"
        exit "${PREFLIGHT:-0}" ;;
    *train.py*)
        for v in MASTER_ADDR MASTER_PORT DSTRAIN_CACHE SRUN_CPUS_PER_TASK OMP_NUM_THREADS DEEPSPEED_TIMEOUT; do
            echo "$v=${!v}"
        done
        [ -z "${SAVES:-}" ] || mkdir -p "$RUN_DIR/checkpoints/step-$RANDOM$RANDOM"
        [ -z "${HOLD:-}" ] || echo >"$DSTRAIN_HOLD_FILE"
        [ -z "${TERMINATED:-}" ] || kill -TERM "$PPID"
        exit "${CODE:-0}" ;;
esac
"""
RUN_DIR = '    *run_dir.py*) [ "${REFUSED:-0}" = 0 ] || exit "$REFUSED"; echo "$RUN_DIR"; exit 0 ;;\n'


class Submission:
    """The batch script, run as slurmd does: from a spool folder, with the submit folder in a variable."""

    def __init__(self, machine: Machine) -> None:
        assert machine.set_up(DSTRAIN_EXTRAS="test dev").returncode == 0
        python = machine.repo / ".venv/bin/python"
        python.write_text(PYTHON.replace("    --version)", RUN_DIR + "    --version)"))
        machine.stub("scontrol", SCONTROL)
        machine.stub("srun", SRUN)
        self.machine, self.spool, self.run_dir = machine, machine.bin.with_name("spool"), machine.bin.with_name("a run")
        self.spool.mkdir()
        self.script = shutil.copy(machine.repo / "launch/slurm/train.sbatch", self.spool / "slurm_script")

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        job = {
            "SLURM_SUBMIT_DIR": str(self.machine.repo),
            "SLURM_JOB_NODELIST": "gpu[07-08]",
            "SLURM_JOB_ID": "1234567",
            "SLURM_CPUS_PER_TASK": "6",
            "SLURM_GPUS_ON_NODE": "8",
            "RUN_DIR": str(self.run_dir),
        }
        return self.machine.run(str(self.script), *arguments, cwd=self.spool, **{**job, **env})

    def changes(self) -> list[str]:
        """What SLURM was asked to change."""
        return [call for call in self.machine.called() if call.startswith(("scontrol requeue", "scontrol update"))]


@pytest.fixture
def job(machine: Machine) -> Submission:
    return Submission(machine)


REQUEUE = "scontrol requeue 1234567"
EXCLUDE = "scontrol update JobId=1234567 ExcNodeList="


def test_sbatch_looks_at_the_nodes_and_trains_where_the_first_one_is(job: Submission) -> None:
    done = job.run("--config", "a b.yaml")
    assert done.returncode == 0, done.stderr
    env = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert env == {
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "19567",  # 15000 + 1234567 % 15000
        "DSTRAIN_CACHE": f"/tmp/dstrain-{os.getuid()}",
        "SRUN_CPUS_PER_TASK": "6",
        "OMP_NUM_THREADS": "6",
        "DEEPSPEED_TIMEOUT": "60",
    }
    preflight, train = [call for call in job.machine.called() if "srun" in call]
    srun = "<srun><--kill-on-bad-exit=0><--wait={}><--label><--distribution=block><bash><launch/slurm/task.sh>"
    assert preflight == (
        f"{srun.format(10)}<dstrain><preflight><--run_dir><{job.run_dir}><--gpus><8>"
        f"<--out><{job.run_dir}/.bad_nodes-1234567><--nodes><gpu07,gpu08><--timeout><120>"
    )
    assert train == f"{srun.format(60)}<python><launch/train.py><--config><a b.yaml>"
    assert job.changes() == [] and list(job.run_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("env", "code", "changes"),
    [
        ({"CODE": "0"}, 0, []),
        ({"CODE": "1"}, 1, []),
        ({"CODE": "2"}, 2, []),
        ({"CODE": "75"}, 75, [REQUEUE]),
        ({"CODE": "138"}, 138, [REQUEUE]),  # SIGUSR1 before Python was there to hear it
        ({"PREFLIGHT": "138"}, 138, [REQUEUE]),
        ({"CODE": "75", "HOLD": "yes"}, 75, []),
        ({"CODE": "75", "TERMINATED": "yes"}, 75, []),  # preempted or cancelled
        ({"CODE": "75", "TERMINATED": "yes", "REASON": "TimeLimit"}, 75, [REQUEUE]),
        ({"PREFLIGHT": "1"}, 1, []),
        ({"PREFLIGHT": "2"}, 2, []),
        ({"PREFLIGHT": "137", "BAD": "gpu08\\n"}, 1, [REQUEUE, f"{EXCLUDE}gpu08"]),
        ({"PREFLIGHT": "1", "BAD": "gpu08\\ngpu07\\n"}, 1, [REQUEUE, f"{EXCLUDE}gpu07,gpu08"]),
        ({"PREFLIGHT": "1", "BAD": "gpu08\\n", "EXCLUDED": "gpu[1-3]"}, 1, [REQUEUE, f"{EXCLUDE}gpu[1-3],gpu08"]),
        ({"PREFLIGHT": "1", "BAD": "gpu08\\n", "NO_REQUEUE": "1"}, 1, [REQUEUE]),
    ],
)  # fmt: skip
def test_sbatch_queues_itself_again_when_that_helps(
    job: Submission, env: dict[str, str], code: int, changes: list[str]
) -> None:
    done = job.run(**env)
    assert (done.returncode, job.changes()) == (code, changes), done.stderr
    trained = any("train.py" in call for call in job.machine.called() if "srun" in call)
    assert trained == ("PREFLIGHT" not in env), "no training after a preflight that failed"
    assert not (job.run_dir / ".bad_nodes-1234567").exists()


@pytest.mark.parametrize("env", [{"CODE": "75"}, {"PREFLIGHT": "1", "BAD": "gpu08\\n"}])
def test_sbatch_gives_up_after_four_starts_in_vain(job: Submission, env: dict[str, str]) -> None:
    for _ in range(2):
        for _ in range(3):
            job.run(**env)
            assert job.changes()[0] == REQUEUE
        done = job.run(**env)
        assert job.changes() == [] and done.returncode in (1, 75)
        assert "four starts in a row without a new checkpoint" in done.stderr


def test_sbatch_goes_on_for_ever_with_checkpoints(job: Submission) -> None:
    for _ in range(6):
        job.run(CODE="75", SAVES="yes")
        assert job.changes() == [REQUEUE]


def test_sbatch_refuses_another_folder_and_a_wrong_recipe(job: Submission) -> None:
    assert job.run(REFUSED="2").returncode == 2
    assert not any("srun" in call for call in job.machine.called())
    (job.machine.repo / "launch/train.py").unlink()
    done = job.run()
    assert done.returncode == 2 and "submit from the checkout" in done.stderr


def task(machine: Machine, cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {"DSTRAIN_CACHE": str(cache), "DSTRAIN_ENVIRONMENT": "e1"}
    return machine.run("launch/slurm/task.sh", *(command or ("env",)), **env)


def test_a_task_gets_a_cache_of_its_own_user(machine: Machine) -> None:
    cache = machine.bin.with_name("node") / "cache"
    done = task(machine, cache)
    assert done.returncode == 0, done.stderr
    assert f"TORCH_EXTENSIONS_DIR={cache}/e1/torch_extensions" in done.stdout
    assert f"TRITON_CACHE_DIR={cache}/e1/triton" in done.stdout
    assert cache.stat().st_mode & 0o777 == 0o700
    assert task(machine, cache, "bash", "-c", "exit 75").returncode == 75


@pytest.mark.parametrize("trick", ["link", "open", "file", "other", "parent"])
def test_a_task_takes_no_cache_that_others_can_write(machine: Machine, trick: str) -> None:
    parent = machine.bin.with_name("node")
    parent.mkdir(mode=0o755)
    cache = parent / "cache"
    if trick == "link":
        cache.symlink_to(machine.repo)
    elif trick == "file":
        cache.touch()
    else:
        cache.mkdir(mode=0o700)
        (parent if trick == "parent" else cache).chmod(0o777 if trick in ("open", "parent") else 0o700)
    if trick == "other":
        if os.getuid():
            pytest.skip("takes root")
        os.chown(cache, 12345, 12345)
    done = task(machine, cache)
    assert done.returncode == 2 and "name another folder of the node with DSTRAIN_CACHE" in done.stderr
    parent.chmod(0o1777)
    assert (task(machine, cache).returncode == 0) == (trick == "parent"), "sticky as /tmp is"


def test_locks_of_killed_builds_go_only_while_nobody_compiles(machine: Machine) -> None:
    cache = machine.bin.with_name("cache")
    lock = cache / "e1/torch_extensions/op/lock"
    lock.parent.mkdir(parents=True)
    cache.chmod(0o700)
    wait = [str(machine.bin / "bash"), "launch/slurm/task.sh", "bash", "-c", "echo here; read line"]
    env = {**machine.env, "DSTRAIN_CACHE": str(cache), "DSTRAIN_ENVIRONMENT": "e1"}
    lock.touch()
    with subprocess.Popen(
        wait, env=env, cwd=machine.repo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout.readline() == "here\n"
        assert not lock.exists(), "of a build that is not there any more"
        lock.touch()
        assert task(machine, cache).returncode == 0
        assert lock.exists(), "of a build that goes on"
        builder.communicate("done\n")
    assert task(machine, cache).returncode == 0
    assert not lock.exists()
