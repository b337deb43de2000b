"""Two "hosts" of this machine train the demo by `deepspeed --hostfile`, pdsh and ssh: `bash tests/run.sh -m slurm`.

As root on Debian; with a server of its own for ssh, at a port of its own and with keys that are thrown away.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = ("localhost", "127.0.0.1")  # two names, so that DeepSpeed takes them for two hosts

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="installs and starts a server for ssh, which takes root"),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start sshd; yields the variables with which pdsh reaches it, and its port."""
    if not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()):
        subprocess.run(["apt-get", "update", "-q"], check=True, capture_output=True)
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "pdsh", "openssh-server"]
        subprocess.run(install, check=True, capture_output=True)
    folder, port = tmp_path_factory.mktemp("ssh"), str(free_port())
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "ListenAddress": "127.0.0.1",
        "PidFile": "none",
        "PermitRootLogin": "yes",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    argv = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", port, *(f"-o{k}={v}" for k, v in options.items())]
    log = folder / "sshd.log"
    with log.open("w") as out, subprocess.Popen(argv, stderr=out) as server:
        try:
            end = time.monotonic() + 20
            while "Server listening" not in log.read_text():
                assert server.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            ours = f"-i {folder / 'user'} -oStrictHostKeyChecking=no -oUserKnownHostsFile=/dev/null -oLogLevel=ERROR -4"
            variables = folder / "deepspeed_env"  # what DeepSpeed exports on the hosts
            variables.write_text("OMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=lo\n")
            yield {"PDSH_SSH_ARGS_APPEND": ours, "DS_ENV_FILE": str(variables), "port": port}
        finally:
            server.terminate()


def start(ssh: dict[str, str], tmp: Path, *command: str) -> subprocess.Popen[str]:
    hostfile = tmp / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | ssh
    env["CUDA_VISIBLE_DEVICES"] = ""
    options = [f"--hostfile={hostfile}", "--no_ssh_check", "--ssh_port", ssh["port"]]
    options += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "deepspeed"), *options, *command],
        cwd=ROOT,
        env=env,
        stdout=(tmp / "log").open("a"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def training(tmp: Path, steps: int) -> list[str]:
    recipe = ["--config", "launch/recipes/demo.yaml", f"run_dir={tmp / 'run'}", f"train.steps={steps}"]
    small = ["batch.global_batch_size=8", "optimizer.warmup_steps=0", "tracking.wandb=off"]
    return ["launch/train.py", "--ds_config", "ds_configs/zero3_offload.json", *recipe, *small]


def steps(tmp: Path) -> list[int]:
    file = tmp / "run/metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(process: subprocess.Popen[str], tmp: Path, step: int) -> None:
    end = time.monotonic() + 300
    while len(steps(tmp)) <= step:
        assert process.poll() is None and time.monotonic() < end, (tmp / "log").read_text()
        time.sleep(0.2)


def test_preflight_and_training_on_two_hosts(ssh: dict[str, str], tmp_path: Path) -> None:
    alone = ["--no_python", "--no_local_rank", str(Path(sys.executable).parent / "dstrain"), "preflight"]
    process = start(ssh, tmp_path, *alone, "--run_dir", str(tmp_path / "run"))
    said = (tmp_path / "log").read_text
    assert process.wait(120) == 0, said()
    assert "2 ranks, 0 GPUs a node: fit" in said()

    assert start(ssh, tmp_path, *training(tmp_path, 4)).wait(400) == 0, said()
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert "2 ranks on cpu" in said() and all(f"\n{host}: " in said() for host in HOSTS)


def test_a_stop_file_ends_all_hosts_and_the_same_command_continues(ssh: dict[str, str], tmp_path: Path) -> None:
    process = start(ssh, tmp_path, *training(tmp_path, 500))
    wait_for_step(process, tmp_path, 2)
    (tmp_path / "run/STOP").touch()
    said = (tmp_path / "log").read_text
    assert process.wait(120) == 75, said()
    done = len(steps(tmp_path))
    assert (tmp_path / f"run/checkpoints/step-{done:08d}").is_dir()
    assert start(ssh, tmp_path, *training(tmp_path, done + 2)).wait(400) == 0, said()
    assert steps(tmp_path) == list(range(done + 2))


def test_sigterm_to_the_launcher_leaves_no_rank(ssh: dict[str, str], tmp_path: Path) -> None:
    process = start(ssh, tmp_path, *training(tmp_path, 500))
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 1
    wait_until_no_rank_is_there(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_ranks_whose_launcher_is_gone_train_on_and_obey_the_stop_file(
    ssh: dict[str, str], tmp_path: Path, number: int
) -> None:
    process = start(ssh, tmp_path, *training(tmp_path, 500))
    wait_for_step(process, tmp_path, 2)
    process.send_signal(number)
    assert process.wait(120) == -number
    end, before = time.monotonic() + 120, len(steps(tmp_path))
    while len(steps(tmp_path)) < before + 3:
        assert time.monotonic() < end, "the ranks do not go on"
        time.sleep(0.2)
    (tmp_path / "run/STOP").touch()
    wait_until_no_rank_is_there(tmp_path)
    assert (tmp_path / f"run/checkpoints/step-{len(steps(tmp_path)):08d}").is_dir(), (tmp_path / "log").read_text()


def wait_until_no_rank_is_there(tmp: Path) -> None:
    end = time.monotonic() + 120
    while ranks(tmp):
        assert time.monotonic() < end, "ranks are left"
        time.sleep(0.5)


def ranks(tmp: Path) -> list[int]:
    """Processes of this run that are there."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            command = (proc / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"run_dir={tmp / 'run'}" in command and "launch/train.py" in command:
            found.append(int(proc.name))
    return found
