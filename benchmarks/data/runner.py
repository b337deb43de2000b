"""Measure one loader, each time in a process of its own: a fork of this one, which has imported what the loader needs
and done nothing else. Jobs come as lines of JSON on the standard input, results leave the same way.

    python benchmarks/data/runner.py LOADER
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peers
import psutil
import resume

_LIMIT_S = 180  # of one measurement
MODULES = {
    "dstrain": ("ours",),
    "bare": ("bare",),
    "webdataset": ("webdataset",),
    "litdata": ("litdata",),
    "streaming": ("streaming",),
    "energon": ("megatron.energon",),
    "tarfile": (),
}


def decoder(name: str) -> peers.Transform:
    if name == "dstrain":
        import ours

        return ours.decode_picture
    return {"none": peers.as_it_is, "pillow": peers.with_pillow}[name]


def touch(payload: Any) -> int:
    """Look at a sample: how large it is, its first and its last byte."""
    if isinstance(payload, bytes):
        return len(payload) + payload[0] + payload[-1]
    return payload.numel() + int(payload[0, 0, 0]) + int(payload[-1, -1, -1])


def cpu_seconds() -> tuple[float, float]:
    """Return the processor time of this process with its living children, and of the whole machine."""
    process, machine = psutil.Process(), psutil.cpu_times()
    mine = sum(sum(member.cpu_times()[:2]) for member in [process, *process.children(recursive=True)])
    return mine, machine.user + machine.nice + machine.system + machine.irq + machine.softirq + machine.steal


def rate(epochs: peers.Epochs, warmup: int, seconds: float) -> dict[str, float]:
    """Return samples a second once `warmup` samples are through.

    The clock runs from the first batch of an epoch to the last: what a loader does between epochs, which would weigh
    more here than in epochs of millions, is not counted. others_cores: what the rest of the machine did meanwhile.
    """
    seen = counted = touched = 0
    elapsed = cpu = busy = 0.0
    for epoch in epochs:
        start = now = 0.0
        before = (0.0, 0.0)
        for batch in epoch:
            touched += sum(touch(payload) + len(caption) for payload, caption in batch)
            seen += len(batch)
            now = time.perf_counter()
            if seen < warmup:
                continue
            if start:
                counted += len(batch)
                if elapsed + now - start >= seconds:
                    break
            else:
                before = cpu_seconds()
                start = now = time.perf_counter()
        if start:
            elapsed += now - start
            after = cpu_seconds()
            cpu, busy = cpu + after[0] - before[0], busy + after[1] - before[1]
        if elapsed >= seconds:
            break
    return {
        "samples_per_s": counted / elapsed,
        "cpu_ms": 1e3 * cpu / counted,
        "others_cores": max(0.0, busy - cpu) / elapsed,
        "samples": counted,
        "touched": touched,
    }


def measure(loader: str, job: dict[str, Any]) -> dict[str, float]:
    """Carry out one job; see data_loading.py for what is in it."""
    data = Path(job["data"])
    if job["case"] == "resume":
        if loader == "dstrain":
            import ours

            return ours.resume(data / f"large_{job['rows']}", job["part"])
        samples = job["rows"] if loader in resume.MANY else job["samples"]
        return resume.measure(loader, data, samples, job["part"])
    kind, extension, workers = job["kind"], job["extension"], job["workers"]
    if loader == "dstrain":
        import ours

        raw = job["decoder"] == "none"
        tars = data / "tar" / kind
        epochs = iter([ours.raw(tars, extension, workers) if raw else ours.decoded(tars, workers)])
    elif loader == "bare":
        import bare

        epochs = iter([bare.batches(data / "tar" / kind, workers)])
    else:
        epochs = peers.EPOCHS[loader](data, kind, extension, decoder(job["decoder"]), workers)
    return rate(epochs, job["warmup"], job["seconds"])


def answer(work: Callable[[], dict[str, float]], result: int) -> None:
    """Run in the fork: write the result of `work`, or the error, as JSON to the file descriptor `result`."""
    os.setsid()  # so that its workers can be ended with it
    signal.alarm(_LIMIT_S)
    try:
        text = json.dumps(work())
    except BaseException as error:
        traceback.print_exc()
        text = json.dumps({"error": f"{type(error).__name__}: {error}"})
    os.write(result, text.encode() + b"\n")
    sys.stderr.flush()


def serve(loader: str, jobs: Iterator[str]) -> None:
    result = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no result
    for name in MODULES[loader]:
        importlib.import_module(name)
    for line in jobs:
        pid = os.fork()
        if not pid:
            answer(partial(measure, loader, json.loads(line)), result)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):  # it may have left no workers
            os.killpg(pid, signal.SIGKILL)
        if status:
            os.write(result, json.dumps({"error": f"ended with status {status}"}).encode() + b"\n")


if __name__ == "__main__":
    serve(sys.argv[1], iter(sys.stdin.readline, ""))
