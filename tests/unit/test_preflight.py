"""Two real processes look at themselves and each other; a fault is planned on one, and its node must be named."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain.engine.health import memory_fault
from dstrain.engine.preflight import Report, clocks, judge

ROOT = Path(__file__).parents[2]
# Where preflight passes by faults.reach, from 1: the start, then the checks in their order, then what is done together.
START, DISKS, ARITHMETIC, MEETING, SUM = 1, 2, 4, 7, 8
MAIN = "import sys; from dstrain.cli import main; sys.exit(main(sys.argv[1:]))"
SKEW = "from dstrain.engine import preflight as p; import time; p.now = lambda: time.time() + SECONDS; "


def start(rank: int, tmp: Path, port: int, *arguments: str, skew: float = 0.0, **env: str) -> subprocess.Popen[str]:
    code = SKEW.replace("SECONDS", str(skew)) * bool(skew) + MAIN
    argv = ["preflight", f"--run_dir={tmp / 'run'}", "--nodes=n1,n2", f"--out={tmp / 'bad'}", *arguments]
    world = {
        "RANK": f"{rank}",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }
    cpu = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT,
        env={**os.environ, **world, **cpu, "SLURMD_NODENAME": f"n{rank + 1}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def outcome(tmp: Path, *processes: subprocess.Popen[str]) -> tuple[list[int], str, str]:
    """Exit codes, what was said, and the names of bad nodes."""
    try:
        said = "".join(process.communicate(timeout=60)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    bad = tmp / "bad"
    return [p.returncode for p in processes], said, bad.read_text() if bad.exists() else ""


def both(tmp: Path, *arguments: str, **env: str) -> tuple[list[int], str, str]:
    port = free_port()
    return outcome(tmp, *(start(rank, tmp, port, *arguments, **env) for rank in (0, 1)))


def fault(action: str, visit: int, **more: int) -> str:
    return json.dumps([{"at": "preflight", "do": action, "nth": visit, **more}])


def test_two_healthy_nodes_pass_in_seconds_without_deepspeed_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('deepspeed takes seconds to import')")
    started = time.monotonic()
    codes, said, bad = both(tmp_path, PYTHONPATH=str(tmp_path))
    assert codes == [0, 0], said
    assert "2 nodes, 2 ranks, 0 GPUs a node: fit" in said
    assert bad == "" and list((tmp_path / "run").iterdir()) == []
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("rank", "action", "visit", "reason"),
    [
        (1, "exit", START, "rank 1 did not answer within 6 s"),
        (1, "ENOSPC", DISKS, "disks: OSError: [Errno 28] No space left on device"),
        (0, "stop", ARITHMETIC, "arithmetic: no answer in time (its process is stopped)"),
        (1, "kill", ARITHMETIC, "arithmetic: the check died (-9)"),
        (1, "stop", MEETING, "meeting: no answer in time (its process is stopped)"),
        (0, "stop", SUM, "sum over all ranks: no answer in time (its process is stopped)"),
        (1, "stop", SUM, "sum over all ranks: no answer in time (its process is stopped)"),
        (1, "exit", SUM, "sum over all ranks: the check died (1)"),
    ],
)
def test_the_bad_node_is_named_with_the_reason(tmp_path: Path, rank: int, action: str, visit: int, reason: str) -> None:
    codes, said, bad = both(tmp_path, "--timeout=6", DSTRAIN_FAULTS=fault(action, visit, rank=rank))
    assert f"preflight: bad: n{rank + 1}: {reason}" in said
    assert said.count("bad:") == 1
    assert (codes, bad) == ([1, 1], f"n{rank + 1}\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_never_starts_is_named_within_the_timeout(tmp_path: Path, rank: int) -> None:
    started = time.monotonic()
    codes, said, bad = outcome(tmp_path, start(1 - rank, tmp_path, free_port(), "--timeout=4"))
    assert f"preflight: bad: n{rank + 1}: " in said
    assert (codes, bad) == ([1], f"n{rank + 1}\n")
    assert 4 < time.monotonic() - started < 40


def test_a_node_that_stops_answering_altogether_is_named(tmp_path: Path) -> None:
    port = free_port()
    slow = fault("sleep", ARITHMETIC, rank=1, seconds=60)
    first, second = (start(rank, tmp_path, port, "--timeout=8", DSTRAIN_FAULTS=slow) for rank in (0, 1))
    time.sleep(4)  # it imports torch and says its name meanwhile, or not: both are right
    second.send_signal(signal.SIGSTOP)
    codes, said, bad = outcome(tmp_path, first)
    second.kill()
    assert "bad: n2: rank 1 " in said and "answer" in said
    assert (codes, bad) == ([1], "n2\n")


def test_a_worker_does_not_outlive_the_process_that_watches_it(tmp_path: Path) -> None:
    first = start(0, tmp_path, free_port(), "--timeout=60")
    end, workers = time.monotonic() + 30, ""
    while not workers and time.monotonic() < end:
        time.sleep(0.05)
        workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text()
    time.sleep(2)  # it waits for the other node by now
    first.kill()
    first.communicate()
    while Path(f"/proc/{workers.split()[0]}").exists() and time.monotonic() < end + 15:
        time.sleep(0.05)
    assert not Path(f"/proc/{workers.split()[0]}").exists()


def test_what_is_wrong_on_all_nodes_is_no_fault_of_a_node(tmp_path: Path) -> None:
    codes, said, bad = both(tmp_path, "--gpus=2")
    assert "bad: n1: 0 GPUs instead of 2" in said and "bad: n2: 0 GPUs instead of 2" in said
    assert "all nodes are bad" in said
    assert (codes, bad) == ([2, 2], "")


def test_a_run_dir_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    codes, said, bad = both(tmp_path)
    assert f"bad: n1: {tmp_path / 'run'}: File exists" in said
    assert (codes, bad) == ([2, 2], "")


def test_a_node_that_sees_another_run_dir_is_named(tmp_path: Path) -> None:
    port = free_port()
    elsewhere = f"--run_dir={tmp_path / 'elsewhere'}"
    one, two = start(0, tmp_path, port, "--timeout=16"), start(1, tmp_path, port, elsewhere, "--timeout=16")
    codes, said, bad = outcome(tmp_path, one, two)
    assert "bad: n2: " in said and "elsewhere is not the folder that the first node sees" in said
    assert (codes, bad) == ([1, 1], "n2\n")


@pytest.mark.parametrize(
    ("skew", "code", "said"),
    [(0.2, 0, "fit"), (-5, 0, "warning: n2: its clock is 5.0 s behind"), (100, 1, "bad: n2: its clock is 100.")],
)
def test_clocks_are_compared_with_the_first_node(tmp_path: Path, skew: float, code: int, said: str) -> None:
    port = free_port()
    codes, text, bad = outcome(tmp_path, start(0, tmp_path, port), start(1, tmp_path, port, skew=skew))
    assert said.rstrip("0.") in text
    assert (codes, bad) == ([code] * 2, "n2\n" * code)


def test_the_launchers_variables_must_be_complete(tmp_path: Path) -> None:
    process = start(0, tmp_path, 0)
    process.kill()
    process.communicate()
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "preflight", f"--run_dir={tmp_path}"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "RANK is set but LOCAL_RANK is not" in done.stderr


def reports(*states: tuple[str, str] | tuple[str, str, str]) -> list[Report]:
    return [Report(f"n{i}", state, stage, *why) for i, (state, stage, *why) in enumerate(states)]


@pytest.mark.parametrize(
    ("states", "blamed"),
    [
        ([("ok", "memory errors")] * 3, []),
        ([("ok", "memory errors"), ("silent", "disks"), ("silent", "arithmetic")], ["n1", "n2"]),
        ([("waited", "meeting"), ("silent", "meeting"), ("waited", "meeting")], ["n1"]),
        ([("waited", "sum over all ranks"), ("silent", "meeting"), ("silent", "sum over all ranks")], ["n1"]),
        # NCCL gives no errors where it hangs, and then none is to blame, unless one does not even run.
        ([("silent", "sum over all GPUs")] * 3, [""]),
        ([("silent", "sum over all GPUs"), ("silent", "sum over all GPUs", "its process waits for a device")], ["n1"]),
        ([("waited", "sum over all GPUs", "unhandled system error")] * 2, [""]),
        ([("unfit", "meeting", "the check died (-9)"), ("waited", "meeting"), ("silent", "meeting")], ["n0"]),
        ([("absent", "", "never"), ("silent", "sum over all GPUs"), ("ok", "")], ["n0"]),
    ],
)
def test_who_waits_for_another_is_not_to_blame(states: list, blamed: list[str]) -> None:
    assert [finding.node for finding in judge(reports(*states))] == blamed


def test_nodes_with_fewer_gpus_than_the_others_are_bad() -> None:
    found = judge([Report("n0", "ok", gpus=8), Report("n1", "ok", gpus=7), Report("n2", "ok", gpus=8)])
    assert [(f.node, f.text) for f in found] == [("n1", "7 GPUs where others have 8")]


def test_small_differences_of_clocks_are_nothing() -> None:
    found = clocks([Report(f"n{i}", "ok", clock=c) for i, c in enumerate((0.0, -0.9, 1.1, -31.0))])
    assert [(f.node, f.bad) for f in found] == [("n2", False), ("n3", True)]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("0, No, No", ""),
        ("0, 0, 0", ""),
        ("[N/A], [N/A], [N/A]", ""),
        ("", ""),
        ("3, No, No", "has 3 uncorrected memory errors since its driver started"),
        ("0, Yes, No", "has memory rows to remap: it needs a reset"),
        ("0, 0, 1", "could not remap bad memory rows"),
    ],
)
def test_what_nvidia_smi_says_about_memory(said: str, fault: str) -> None:
    assert memory_fault(said + "\n") == fault
