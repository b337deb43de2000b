"""Run a function on real ranks: fresh processes, gloo, no launcher."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_ranks(world_size: int, target: str, tmp: Path, *args: Any, timeout: float = 560) -> list[Any]:
    """Call `module:function(*args)` of tests/dist on every rank; return the results by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    call = tmp / f"call-{port}.pkl"
    call.write_bytes(pickle.dumps((target, args)))
    procs = []
    for rank in range(world_size):
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
        log = (tmp / f"rank{rank}-{port}.log").open("wb")
        argv = [sys.executable, __file__, str(call), str(tmp / f"result{rank}-{port}.pkl")]
        procs.append(subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        codes = [p.wait(timeout) for p in procs]
    finally:
        for p in procs:
            p.kill()
    logs = "\n".join((tmp / f"rank{r}-{port}.log").read_text(errors="replace")[-4000:] for r in range(world_size))
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
    return [pickle.loads((tmp / f"result{r}-{port}.pkl").read_bytes()) for r in range(world_size)]


if __name__ == "__main__":
    target, args = pickle.loads(Path(sys.argv[1]).read_bytes())
    module, _, function = target.partition(":")
    result = getattr(__import__(module), function)(*args)
    Path(sys.argv[2]).write_bytes(pickle.dumps(result))
    from dstrain.engine import distributed

    distributed.stop(0, together=True)
