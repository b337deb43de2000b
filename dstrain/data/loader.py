"""Decoded samples in the order of the plan, read ahead by threads."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, count

import torch

from dstrain.data.dataset import Dataset
from dstrain.data.media.operators import Operators
from dstrain.data.plan import Draw, Plan
from dstrain.data.policy import Bad
from dstrain.data.reasons import BadSample, ranked
from dstrain.data.remote.urls import masked
from dstrain.data.sample import Expected, Sample, SampleReader
from dstrain.errors import DataError

log = logging.getLogger(__name__)

_TRIES = 16  # other rows that are tried for one draw before the shards themselves are in doubt
_AHEAD = 8  # samples read ahead for each worker; a decoded picture of 1 Mpixel takes 3 MB


@dataclass
class Pack:
    """What this rank computes in one micro-step.

    samples: in the global order. bad: what failed on the way and was replaced. error: why the pack cannot be computed;
    it is not raised here, so that the ranks can tell each other and stop together.
    """

    samples: list[Sample] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    error: DataError | None = None


@dataclass(frozen=True)
class _Fetched:
    sample: Sample | None
    bad: list[Bad]
    error: DataError | None = None


@dataclass(frozen=True)
class _Coming:
    step: int
    micro: int
    draws: list[Draw]
    futures: list[Future[list[_Fetched]]]  # of parts of the draws; none if they are fetched when asked for


class Loader:
    """Reads and decodes what `plan` gives to `rank`.

    operators: crop, flip and choice of caption, drawn for each draw from (seed, draw). background: RGB under alpha.
    workers: threads that read ahead, 0 to decode when asked. Neither the order nor anything else depends on them.
    replace: whether a bad sample is replaced by another, chosen by the bad row alone; otherwise it is an error.
    pin: put what is decoded into page-locked memory, from which a GPU copies without waiting.
    expected: what encoded samples must be; needed if the dataset holds such.
    wait_s: seconds that the caller has waited for samples so far, planning included.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        rank: int,
        *,
        operators: Operators | None = None,
        seed: int = 0,
        background: tuple[int, int, int] = (255, 255, 255),
        workers: int = 2,
        replace: bool = True,
        pin: bool = False,
        expected: Expected | None = None,
    ) -> None:
        assert len(dataset) == plan.n, "the plan was made for another dataset"
        assert 0 <= rank < plan.world_size
        self.wait_s = 0.0
        self._dataset, self._plan, self._rank = dataset, plan, rank
        self._read = SampleReader(
            dataset,
            operators=operators or Operators(),
            seed=seed,
            background=background,
            pin=pin,
            expected=expected,
        )
        self._tries = _TRIES if replace else 0
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, "dstrain-loader", torch.set_num_threads, (1,)) if workers else None
        self._fetcher = ThreadPoolExecutor(1, "dstrain-fetcher") if dataset.is_remote else None
        self._fetching: list[int] = []
        self._queue: deque[_Coming] = deque()
        self._coming = self._packs(0)

    def step(self, step: int) -> Iterator[Pack]:
        """Yield this rank's pack of each micro-step of `step`; the same for every number of workers.

        Reading ahead expects step + 1 to be next; any other step is right too, but starts without a lead.
        """
        if not self._queue or (self._queue[0].step, self._queue[0].micro) != (step, 0):
            self._queue.clear()
            self._coming = self._packs(step)
            self._fill()
        while self._queue[0].step == step:
            coming = self._queue.popleft()
            self._fill()
            yield self._collect(coming)

    def close(self) -> None:
        """Stop reading ahead and end the threads."""
        for pool in (self._threads, self._fetcher):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _packs(self, first: int) -> Iterator[_Coming]:
        for step in count(first):
            try:
                micros = self._plan.step(step)
            except DataError as error:  # a shard's index is damaged
                yield _Coming(step, 0, [], [_failed(error)])
                continue
            self._prefetch(step)
            for micro, packs in enumerate(micros):
                yield _Coming(step, micro, packs[self._rank], self._start(packs[self._rank]))

    def _prefetch(self, step: int) -> None:
        """Bring the shards of the window after this one near while it is read."""
        if self._fetcher is not None and (ahead := self._plan.shards_ahead(step)) != self._fetching:
            self._fetching = ahead
            self._fetcher.submit(self._dataset.prefetch, ahead)

    def _start(self, draws: list[Draw]) -> list[Future[list[_Fetched]]]:
        """Put a pack to work in parts, twice as many as there are threads: handing over takes time as well."""
        if self._threads is None:
            return []
        size = max(1, len(draws) // (2 * self._workers))
        return [self._threads.submit(self._fetch_all, draws[i : i + size]) for i in range(0, len(draws), size)]

    def _fill(self) -> None:
        """Put packs to work: always the next one, and more until enough samples are under way."""
        start = time.perf_counter()
        while not self._queue or sum(max(1, len(coming.draws)) for coming in self._queue) < _AHEAD * self._workers:
            self._queue.append(next(self._coming))
        self.wait_s += time.perf_counter() - start

    def _collect(self, coming: _Coming) -> Pack:
        """Wait for the samples of a pack, and list what was bad in the order of the plan, not as threads met it."""
        start = time.perf_counter()
        wait(coming.futures)  # woken once, not by every sample
        parts = [future.result() for future in coming.futures] or [self._fetch_all(coming.draws)]
        fetched = [item for part in parts for item in part]
        self.wait_s += time.perf_counter() - start
        return Pack(
            [item.sample for item in fetched if item.sample is not None],
            [bad for item in fetched for bad in item.bad],
            next((item.error for item in fetched if item.error is not None), None),
        )

    def _fetch_all(self, draws: list[Draw]) -> list[_Fetched]:
        return [self._fetch(draw) for draw in draws]

    def _fetch(self, draw: Draw) -> _Fetched:
        bad: list[Bad] = []
        try:
            for row in chain([draw.row], self._dataset.replacements(draw.row, self._tries)):
                try:
                    return _Fetched(self._read(row, draw.draw), bad)
                except BadSample as error:
                    shard, key = masked(self._dataset.shard(row)), self._dataset.key(row)
                    bad.append(Bad(draw.draw, shard, key, error.reason, str(error)))
        except DataError as error:
            return _Fetched(None, bad, error)
        except Exception as error:  # out of memory, say: the ranks are to stop together all the same
            log.exception("draw %d cannot be read", draw.draw)
            return _Fetched(None, bad, DataError(f"draw {draw.draw} cannot be read: {type(error).__name__}: {error}"))
        return _Fetched(None, bad, _none_left(bad))


def _failed(error: DataError) -> Future[list[_Fetched]]:
    future: Future[list[_Fetched]] = Future()
    future.set_result([_Fetched(None, [], error)])
    return future


def _none_left(bad: list[Bad]) -> DataError:
    last = bad[-1]
    if len(bad) == 1:
        return DataError(
            f"sample {last.key!r} of shard {last.shard} is bad ({last.reason}: {last.detail}); repair it or leave it "
            "out of the shard, or set data.bad_samples to 'skip'"
        )
    return DataError(
        f"{len(bad)} samples one after another are bad ({ranked(b.reason for b in bad)}), the last being {last.key!r} "
        f"of {last.shard}; check the shards with `dstrain verify`"
    )
