"""Starts ranks by forking a process that has imported everything, in a tenth of the processor time.

The server reads a line of JSON for each: {"env", "log", "code"}, and either the "argv" of launch/train.py or a "call",
two files as ranks.py takes them. It answers with the pid, and writes how the rank ended into the file `code`. A rank is
a process of its own, which may be killed, stopped and signalled as any other.
"""

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def _server() -> "subprocess.Popen[str]":
    """One for all runs of the tests; it ends when its input does, with this process."""
    from small_runs import environment

    return subprocess.Popen(
        [sys.executable, __file__],
        env=environment() | {"TORCH_COMPILE_DISABLE": "1"},  # DeepSpeed compiles Muon's update: a minute on a CPU
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def fork(env: Mapping[str, str], log: Path, code: Path, **what: Sequence[str]) -> int:
    """Start a rank with this environment; return its pid. `what` is argv or call; files are as above."""
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps({"env": dict(env), "log": str(log), "code": str(code), **what}) + "\n")
    return int(server.stdout.readline())


def main() -> None:
    spec = importlib.util.spec_from_file_location("train", ROOT / "launch/train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    import deepspeed  # noqa: F401

    import dstrain.trainer  # noqa: F401

    codes = {}
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.02)
        for pid in list(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                path = Path(codes.pop(pid))
                part = path.with_suffix(".part")
                part.write_text(str(os.waitstatus_to_exitcode(status)))
                part.replace(path)
        if ready:
            line = os.read(0, 1 << 20)  # one request at a time: the other side waits for its answer
            if not line:
                return
            order = json.loads(line)
            pid = os.fork()
            if not pid:
                run(train, order)
            codes[pid] = order["code"]
            print(pid, flush=True)


def run(train, order: dict) -> None:
    code = 70
    with contextlib.suppress(SystemExit):
        try:
            os.setsid()
            os.environ.clear()
            os.environ.update(order["env"])
            with Path(order["log"]).open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if "call" in order:
                import ranks

                code = ranks.main(*order["call"])
            else:
                code = train.main(order["argv"])
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
