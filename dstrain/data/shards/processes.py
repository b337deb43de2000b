"""Work on many shards at once, in processes: reading headers and decoding is Python's work, and holds its lock."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from dstrain.errors import DataError

WORTH_BYTES = 1 << 26  # of shards, under which the start of processes takes longer than the work

T = TypeVar("T")


def each(
    function: Callable[[Path], T], paths: Sequence[Path], *, workers: int, label: str, progress: bool
) -> Iterator[T]:
    """Yield `function(path)` for each path, in order, from up to `workers` processes if the files are worth them.

    `progress` shows a bar if stderr is a terminal. The first error of the function is raised.
    Raises DataError if a process is killed.
    """
    workers = min(workers, len(paths))
    size = sum(path.stat().st_size for path in paths if path.exists()) if workers > 1 else 0
    hidden = None if progress and paths else True
    with tqdm(total=len(paths), desc=label, unit="shard", disable=hidden, dynamic_ncols=True) as bar:
        if size < WORTH_BYTES:
            for path in paths:
                yield function(path)
                bar.update()
            return
        context = get_context("forkserver")  # a fork of this process could inherit held locks of its threads
        context.set_forkserver_preload([function.__module__])
        with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                for result in pool.map(function, paths):
                    yield result
                    bar.update()
            except BrokenProcessPool as error:
                raise DataError(
                    f"a process was killed while {label} {len(paths)} shards; if memory ran out, take fewer workers"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
