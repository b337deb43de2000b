"""Run a function on real ranks: gloo, no launcher."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fork_server import fork

ROOT = Path(__file__).parents[2]


def run_ranks(
    world_size: int, target: str, tmp: Path, *args: Any, timeout: float = 560, fresh: bool = False
) -> list[Any]:
    """Call `module:function(*args)` of tests/dist on every rank; return the results by rank.

    The ranks are forked from a process that has imported everything; with `fresh` they are new ones, whose memory is
    their own.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    call = tmp / f"call-{port}.pkl"
    call.write_bytes(pickle.dumps((target, args)))
    ranks = [_Rank(rank, world_size, port, call, fresh) for rank in range(world_size)]
    end = time.monotonic() + timeout
    try:
        while any(rank.code() is None for rank in ranks) and time.monotonic() < end:
            time.sleep(0.02)
        codes = [rank.code() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    logs = "\n".join(rank.log.read_text(errors="replace")[-4000:] for rank in ranks)
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
    return [pickle.loads(rank.result.read_bytes()) for rank in ranks]


class _Rank:
    def __init__(self, rank: int, world_size: int, port: int, call: Path, fresh: bool) -> None:
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "dist"), str(ROOT)]),
            # As distributed.start has it, for tests without it: another ninja would compile DeepSpeed's ops anew.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions"))),
        }
        self.log = call.with_name(f"rank{rank}-{port}.log")
        self.result = call.with_name(f"result{rank}-{port}.pkl")
        self._code = call.with_name(f"code{rank}-{port}")
        self._process: subprocess.Popen[bytes] | None = None
        self.log.touch()
        files = [str(call), str(self.result)]
        if not fresh:
            self._pid = fork(env, self.log, self._code, call=files)
            return
        with self.log.open("wb") as log:
            argv = [sys.executable, __file__, *files]
            self._process = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    def code(self) -> int | None:
        """The exit code, or None while the rank is running."""
        if self._process:
            return self._process.poll()
        return int(self._code.read_text()) if self._code.exists() else None

    def kill(self) -> None:
        if self._process:
            self._process.kill()
        elif not self._code.exists():
            os.kill(self._pid, signal.SIGKILL)


def main(call: str, result: str) -> int:
    """On a rank: make the call of the first file, and write what it returns into the second."""
    target, args = pickle.loads(Path(call).read_bytes())
    module, _, function = target.partition(":")
    value = getattr(__import__(module), function)(*args)
    Path(result).write_bytes(pickle.dumps(value))
    from dstrain.engine import distributed

    distributed.stop(0, together=True)
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])
