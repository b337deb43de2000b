"""The side of dstrain in the benchmark of the loaders, through what it offers to its users."""

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dstrain.data import Loader, Plan, open_dataset, sample
from dstrain.data.media.decode import decode
from dstrain.data.media.probe import probe
from dstrain.data.media.resolution import Resolution
from dstrain.data.order import SourceOrder
from dstrain.data.plan import WINDOW
from dstrain.data.reader import ShardReader
from dstrain.data.selection import Wanted
from dstrain.data.shards.catalog import open_index, open_indexes, sidecar_of
from dstrain.data.shards.index import dump, make
from dstrain.data.shards.keys import KeyTable

BATCH = 8
MAX_PIXELS = 512 * 512
RESOLUTION = Resolution(max_pixels=MAX_PIXELS)


def index(tars: Path) -> None:
    open_indexes(sorted(tars.glob("*.tar")), workers=2)


def target_size(width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) that every loader is to bring a picture to."""
    widths, heights = RESOLUTION.sizes(np.array([width]), np.array([height]))
    return int(widths[0]), int(heights[0])


def decode_picture(data: bytes) -> Tensor:
    """Decode and resize with the function that the loader uses: uint8 [3, H, W]."""
    return decode(data, target_size(*probe(data).size))


def raw(tars: Path, extension: str, workers: int) -> Iterator[list[tuple[bytes, str]]]:
    """Yield payloads with captions in the shuffled order of a plan."""
    indexes = open_indexes(sorted(tars.glob("*.tar")))
    column = "image" if extension == "jpg" else extension
    places = []
    for shard in indexes:
        payloads, captions = shard.parts[shard.part_of(column)], shard.parts[shard.part_of("txt")]
        fields = [part[name].tolist() for part in (payloads, captions) for name in ("offset", "size", "digest")]
        places += [(shard.path, row[:3], row[3:]) for row in zip(*fields)]
    rows = SourceOrder(np.array([shard.samples for shard in indexes]), seed=0, window=WINDOW)
    reader = ShardReader()

    def read(row: int) -> tuple[bytes, str]:
        path, payload, caption = places[row]
        return reader.read(path, *payload), reader.read(path, *caption).decode()

    def batch(first: int) -> list[tuple[bytes, str]]:
        return [read(row) for row in rows.rows(first, BATCH).tolist()]

    if workers == 0:
        for first in count(0, BATCH):
            for row in rows.rows(first, BATCH).tolist():
                yield [read(row)]
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(batch, number * BATCH) for number in range(2 * workers))
        for number in count(2 * workers):
            yield ahead.popleft().result()
            ahead.append(pool.submit(batch, number * BATCH))


def _loader(shards: list[str], workers: int) -> tuple[Loader, Plan]:
    dataset = open_dataset(shards, Wanted(RESOLUTION))
    plan = Plan(dataset, seed=0, global_batch_size=BATCH, tokens_per_pack=BATCH * dataset.max_tokens, world_size=1)
    return Loader(dataset, plan, rank=0, workers=workers), plan


def order(tars: Path) -> list[int]:
    """Return the rows of the first epoch in the order of `decoded`."""
    _, plan = _loader([str(tars)], workers=0)
    return [draw.row for step in range(plan.n // BATCH) for draw in plan.batch(step)]


def decoded(tars: Path, workers: int) -> Iterator[list[tuple[Tensor, str]]]:
    """Yield decoded pictures with captions, read ahead by `workers`."""
    reading, _ = _loader([str(tars)], workers)
    for step in count():
        for pack in reading.step(step):
            assert pack.error is None and not pack.bad
            yield [(one.image, one.caption) for one in pack.samples]


def make_large(picture: Path, folder: Path, samples: int, shards: int) -> None:
    """Make an index of `samples` rows that all are the one sample of a small tar, which every shard is a link to."""
    one = open_index(picture)
    rows = samples // shards
    parts, head = np.tile(one.parts[:2], rows), np.tile(one.rows[:1], rows)
    head["first"] = np.arange(rows) * 2
    head["caption"] = head["first"] + int(one.rows[0]["caption"])
    folder.mkdir(parents=True)
    for shard in range(shards):
        path = folder / f"{shard:06d}.tar"
        os.link(picture, path)
        keys = KeyTable.of(f"{shard:06d}{row:06d}" for row in range(rows))
        sidecar_of(path).write_bytes(dump(make(path, path.stat(), one.digest, one.columns, keys, head, parts, [])))


def resume(folder: Path, part: float) -> dict[str, Any]:
    """Start at a part of the first epoch; return seconds to open, to the first sample, and samples read in vain."""
    decodes = 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal decodes
        decodes += 1
        return decode(*args, **kwargs)

    sample.decode = counted
    start = time.perf_counter()
    reading, plan = _loader([str(folder)], workers=0)
    opened = time.perf_counter()
    pack = next(iter(reading.step(int(part * plan.n) // BATCH)))
    first = time.perf_counter()
    vain = decodes - len(pack.samples)
    return {"open_s": opened - start, "first_s": first - opened, "samples": plan.n, "in_vain": vain}
