"""Decoded samples in the order of the plan, read ahead by threads."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from dstrain.data.dataset import Dataset
from dstrain.data.decode import decode
from dstrain.data.plan import Draw, Plan
from dstrain.data.policy import Bad, BadSamples
from dstrain.data.reasons import BadSample, Reason, ranked
from dstrain.errors import ConfigError, DataError

_TRIES = 16  # rows that may fail one after another before the shards themselves are in doubt
_AHEAD = 8  # samples read ahead for each worker; a decoded picture of 1 Mpixel takes 3 MB


@dataclass
class Sample:
    """One decoded sample. `row` is the row that was decoded: another than planned if that one was bad."""

    key: str
    shard: str  # path
    row: int
    draw: int  # running number in the global order
    image: Tensor  # uint8 [3, H, W], H and W multiples of 16
    caption: str


@dataclass(frozen=True)
class _Fetched:
    draw: int
    sample: Sample | None  # None if every row that was tried is bad
    bad: list[Bad]


@dataclass(frozen=True)
class _Pack:
    step: int
    micro: int
    results: list[Callable[[], _Fetched]]


class Loader:
    """Reads and decodes what `plan` gives to `rank`.

    workers: threads that read ahead, 0 to decode when asked. Neither the order nor anything else depends on them.
    bad_sample: "skip" replaces a bad sample by another row, chosen by the bad row alone; "error" stops at the first.
    max_bad_samples: different bad rows that this rank may meet. quarantine: file to list them in, one JSON line each.
    wait_s: seconds that the caller has waited for samples so far.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        rank: int,
        *,
        workers: int = 2,
        bad_sample: Literal["skip", "error"] = "skip",
        max_bad_samples: int = 100,
        quarantine: Path | None = None,
    ) -> None:
        assert len(dataset) == plan.n, "the plan was made for another dataset"
        assert 0 <= rank < plan.world_size
        if bad_sample not in ("skip", "error"):
            raise ConfigError(f"bad_sample = {bad_sample!r} is not known; give 'skip' or 'error'")
        self.wait_s = 0.0
        self.bad = BadSamples(max_bad_samples, quarantine)
        self._dataset = dataset
        self._plan = plan
        self._rank = rank
        self._tries = _TRIES if bad_sample == "skip" else 1
        self._ahead = _AHEAD * workers
        self._threads = ThreadPoolExecutor(workers, "dstrain-loader") if workers else None
        self._queue: deque[_Pack] = deque()
        self._coming = self._packs(0)

    def step(self, step: int) -> Iterator[list[Sample]]:
        """Yield this rank's pack of each micro-step of `step`, the samples of a pack in the global order.

        Reading ahead expects step + 1 to be next; any other step is right too, but starts without a lead.
        Raises DataError by the policy for bad samples, the same for every number of workers.
        """
        if not self._queue or (self._queue[0].step, self._queue[0].micro) != (step, 0):
            self._queue.clear()
            self._coming = self._packs(step)
            self._fill()
        while self._queue[0].step == step:
            pack = self._queue.popleft()
            self._fill()
            yield self._collect(pack)

    def close(self) -> None:
        """Stop reading ahead and end the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _packs(self, first: int) -> Iterator[_Pack]:
        for step in itertools.count(first):
            for micro, packs in enumerate(self._plan.step(step)):
                yield _Pack(step, micro, [self._start(draw) for draw in packs[self._rank]])

    def _start(self, draw: Draw) -> Callable[[], _Fetched]:
        if self._threads is None:
            return partial(self._fetch, draw)
        return self._threads.submit(self._fetch, draw).result

    def _fill(self) -> None:
        """Put packs to work: always the next one, and more until enough samples are under way."""
        while not self._queue or sum(len(pack.results) for pack in self._queue) < self._ahead:
            self._queue.append(next(self._coming))

    def _collect(self, pack: _Pack) -> list[Sample]:
        """Wait for a pack, and count its bad samples here, in the order of the plan, not as threads meet them."""
        start = time.perf_counter()
        fetched = [result() for result in pack.results]
        self.wait_s += time.perf_counter() - start
        return [self._checked(item) for item in fetched]

    def _checked(self, item: _Fetched) -> Sample:
        for bad in item.bad:
            if self._tries == 1:
                raise DataError(
                    f"sample {bad.key!r} of shard {bad.shard} is bad ({bad.reason}: {bad.detail}); repair it or leave "
                    "it out of the shard, or set data.bad_samples to 'skip'"
                )
            self.bad.record(bad, item.draw)
        if item.sample is None:
            raise DataError(
                f"{len(item.bad)} samples one after another are bad ({ranked(bad.reason for bad in item.bad)}), the "
                f"last being {item.bad[-1].key!r} of {item.bad[-1].shard}{self.bad.where()}; check the shards"
            )
        return item.sample

    def _fetch(self, draw: Draw) -> _Fetched:
        bad: list[Bad] = []
        for row in itertools.islice(self._candidates(draw.row), self._tries):
            try:
                return _Fetched(draw.draw, self._read(row, draw.draw), bad)
            except BadSample as error:
                shard, key = str(self._dataset.shard(row)), self._dataset.keys[row]
                bad.append(Bad(shard, key, error.reason, str(error), row))
        return _Fetched(draw.draw, None, bad)

    def _read(self, row: int, draw: int) -> Sample:
        data, caption = self._dataset.read(row)
        image = decode(data, self._dataset.max_pixels)  # [3, H, W]
        if (image.shape[2], image.shape[1]) != self._dataset.image_size(row):
            raise BadSample(Reason.CHANGED, "the picture has another size than the index says")
        return Sample(self._dataset.keys[row], str(self._dataset.shard(row)), row, draw, image, caption)

    def _candidates(self, row: int) -> Iterator[int]:
        """Give the row itself, then the rows after it that cost no more, so that the pack keeps to its budget,
        then the rest: a function of the row alone, so the same on any rank and at any world size.
        """
        yield row
        tokens = self._dataset.tokens
        others = (row + np.arange(1, len(tokens))) % len(tokens)
        fits = tokens[others] <= tokens[row]
        yield from others[fits].tolist()
        yield from others[~fits].tolist()
