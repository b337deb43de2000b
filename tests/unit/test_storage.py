"""Locks between processes, and between the threads of one."""

import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dstrain.storage import locked


def hold(path: Path, held: multiprocessing.synchronize.Event) -> None:
    with locked(path):
        held.set()
        time.sleep(60)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with locked(tmp_path / "lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and inside == 0


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(60)
    with pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(tmp_path / "lock", wait=False):
        pass


def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    """It inherits the descriptor, and with that the lock, until somebody unlocks it."""
    with locked(tmp_path / "lock"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
