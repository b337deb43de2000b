"""Disks that are full or broken, run folders that are not to be had: old checkpoints stay, and it is said."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_plan import FaultPlan
from forks import Held, alone, digests, forked, names, save, start

from dstrain import faults
from dstrain.config import TrainConfig
from dstrain.engine import checkpoint, run_folder
from dstrain.engine.saver import Saver
from dstrain.errors import CheckpointError, TrainingHalted
from dstrain.saves import Saves

OLD = checkpoint.name(2)


@pytest.fixture
def run(tmp_path):
    alone(save, tmp_path / "run", 2)
    return tmp_path / "run"


def counted(run: Path, rank: int, world: int) -> int:
    save(run, 4, world, rank)
    return faults._visits["write"]


def try_to_save(run: Path, background: str, rank: int, world: int) -> tuple[str, list[str]]:
    """What a save says that meets a fault, and what is there then; the process goes on and saves again."""
    said = ""
    try:
        save(run, 4, world, rank, background=background)
    except CheckpointError as e:
        said = str(e)
    left = names(run)
    if world > 1:
        checkpoint.distributed.barrier()
    os.environ[faults.VARIABLE] = ""
    save(run, 6, world, rank, background=background)
    return said, left


@pytest.mark.parametrize(
    ("error", "background"),
    [("ENOSPC", "off"), ("EIO", "off"), ("EACCES", "off"), ("EDQUOT", "off"), ("ENOSPC", "on"), ("EIO", "on")],
)
def test_an_error_at_every_write(run, tmp_path, error, background):
    shutil.copytree(run, tmp_path / "count")
    [count] = forked(counted, tmp_path / "count", environment=FaultPlan().environment())
    old, failed = digests(run / "checkpoints" / OLD), 0
    assert count >= 15
    for nth in range(1, count + 1) if background == "off" else range(2, count + 1, 4):
        here = tmp_path / str(nth)
        shutil.copytree(run, here)
        plan = FaultPlan().fail_at_write(0, nth, error)
        [(said, left)] = forked(try_to_save, here, background, environment=plan.environment())
        assert OLD in left
        if OLD in names(here):  # if the new one was there but not known to be durable, it is the second by now
            assert digests(here / "checkpoints" / OLD) == old
        assert not any(".partial" in name for name in left), (nth, left)
        if said:
            failed += 1
            assert str(here / "checkpoints" / checkpoint.name(4)) in said
            assert os.strerror(getattr(errno, error)) in said
            assert "one takes 0." in said
            assert "MiB are free" in said
        else:
            assert checkpoint.name(4) in left, "silent, and not saved"
        assert alone(start, here) == 6 if nth % 4 == 2 else (here / "checkpoints" / checkpoint.name(6)).is_dir()
    assert failed >= (count - 2 if background == "off" else 3)


def test_an_error_on_one_rank_stops_the_save_of_all(run):
    for background in ("off", "on"):
        plan = FaultPlan().enospc_at_write(1, 2)
        results = forked(try_to_save, run, background, world=2, environment=plan.environment())
        assert len({said for said, _ in results}) == 1
        assert "rank 1: [Errno 28] No space left on device" in results[0][0]
        assert alone(start, run) == 6
        shutil.rmtree(run / "checkpoints" / checkpoint.name(6))


def limited(run: Path, rank: int, world: int) -> tuple[str, list[str]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        save(run, 4, world, rank)
    except CheckpointError as e:
        return str(e), names(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "", []


def test_a_limit_of_the_file_size(run):
    for said, left in forked(limited, run, world=2):
        assert "File too large" in said
        assert left == [OLD]
    assert alone(start, run) == 2


def test_a_full_file_system(tmp_path):
    """A real one of 1.5 MB; each rank sees room at first, then another process takes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        alone(save, disk / "run", 2)
        (disk / "others").write_bytes(bytes(1_200_000))
        [(said, left)] = forked(try_too_large, disk / "run")
        assert "No space left: it takes" in said and "MiB are free" in said, "seen before a byte is written"
        assert left == [OLD]
        [(said, left)] = forked(try_unchecked, disk / "run")
        assert "[Errno 28] No space left on device" in said, "met while it is written"
        assert left == [OLD]
        assert alone(start, disk / "run") == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def try_too_large(run: Path, rank: int, world: int) -> tuple[str, list[str]]:
    try:
        save(run, 4)
    except CheckpointError as e:
        return str(e), names(run)
    return "", []


def try_unchecked(run: Path, rank: int, world: int) -> tuple[str, list[str]]:
    shapes = {"w": torch.Size([1000, 1000])}
    saver = SaverUnchecked(Held(4, shapes=shapes), run / "checkpoints")
    try:
        saver.begin(4, {})
        saver.commit()
    except CheckpointError as e:
        return str(e), names(run)
    return "", []


class SaverUnchecked(Saver):
    """As if the room was taken after it was looked for."""

    def _check_space(self) -> None:
        pass


def as_nobody(work: Any, *args: Any) -> Any:
    os.setuid(65534)
    return work(*args)


@pytest.mark.skipif(os.geteuid() != 0, reason="other users' files are made by root")
def test_folders_that_belong_to_others(run):
    for folder in run.parents:
        if folder.name.startswith(("pytest-", "popen-", "test_")):  # pytest's own, for nobody else's eyes
            folder.chmod(0o755)
    run.chmod(0o755)
    (run / ".lock").touch(0o600)
    for work in (run_folder.check_writable, run_folder.occupy):
        with pytest.raises(CheckpointError, match=rf"run_dir {run} cannot be written: .*choose another run_dir"):
            alone(as_nobody, work, run)
    with pytest.raises(CheckpointError, match=r"not saved.*Permission denied"):
        alone(as_nobody, save, run, 4)
    (run / "checkpoints").chmod(0o700)
    with pytest.raises(CheckpointError, match="cannot be read"):
        alone(as_nobody, checkpoint.find, run / "checkpoints")
    (run / "checkpoints").chmod(0o755)
    assert names(run) == [OLD]


def test_a_run_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("x")
    begun = time.monotonic()
    for path in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(CheckpointError, match=rf"run_dir {path} cannot be written: .*; choose another run_dir"):
            run_folder.check_writable(path)
    assert time.monotonic() - begun < 3


def holding(run: Path) -> subprocess.Popen:
    code = "import sys, time; from pathlib import Path; from dstrain.storage import occupied\n"
    code += "with occupied(Path(sys.argv[1]), 'process 1234 on node7, SLURM job 99'): print(flush=True), time.sleep(99)"
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_run_folder_that_another_holds_until_it_is_killed(run):
    process = holding(run)
    try:
        begun = time.monotonic()
        for error in forked(lambda rank, world: run_folder.occupy(run), world=2):
            assert isinstance(error, CheckpointError)
            assert "in use by process 1234 on node7, SLURM job 99; wait for its end" in str(error)
        assert time.monotonic() - begun < 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (run / ".lock").exists()
    assert alone(start, run) == 2, "its lock file is no obstacle"


@pytest.mark.parametrize("kind", ["folder", "link", "bytes"])
def test_a_strange_lock_file(run, kind):
    (run / ".lock").unlink(missing_ok=True)
    if kind == "bytes":
        (run / ".lock").write_bytes(b"\xff\x00\x1b[31m")
        assert alone(start, run) == 2
        return
    (run / ".lock").mkdir() if kind == "folder" else (run / ".lock").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*\.lock"):
        alone(start, run)


def by_policy(run: Path, allowed: int, rank: int, world: int) -> list[str]:
    """Saves that fail, one after another, until the run ends; then what it was told."""
    config = TrainConfig(steps=99, failed_saves=allowed, async_save="off")
    saves = Saves(Held(4, rank, world), run / "checkpoints", config, None, lambda: None)
    said = []
    for step in range(10, 20):
        os.environ.update(
            FaultPlan().enospc_at_write(world - 1, None).environment() if step != 11 else {"DSTRAIN_FAULTS": ""}
        )
        try:
            saves.save(step, {})
        except TrainingHalted as e:
            return [*said, str(e)]
        said.append("failed" if step != 11 else "saved")
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_saves_that_fail_end_the_run_by_policy(tmp_path, world):
    for said in forked(by_policy, tmp_path / "run", 2, world=world):
        assert said[:-1] == ["failed", "saved", "failed", "failed"], said
        assert "step-00000014: not saved" in said[-1]
    for [said] in forked(by_policy, tmp_path / "other", 0, world=world):
        assert "No space left on device" in said
