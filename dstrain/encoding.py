"""`dstrain encode`: the samples of a recipe through the frozen encoders of its model, once, into shards of their own.

What training would see is kept bit for bit: latents and embeddings as the units make them, in the rows and shards of
the data, so that a run on the encoded shards draws the same samples and has the same losses, without any encoder. Each
shard appears when it is whole, and the ledger says which are, so the same call again goes on where another ended.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dstrain.config import Recipe
from dstrain.data.dataset import Dataset, Raw
from dstrain.data.media.encoded import decode_encoded, write_encoded
from dstrain.data.media.resolution import colour
from dstrain.data.packing.ledger import REFUSED, Ledger, PackReport, Refused
from dstrain.data.packing.members import Packed, sample_key
from dstrain.data.packing.pack import only_writer
from dstrain.data.packing.writer import MAX_NAME, ShardWriter
from dstrain.data.reasons import BadSample, ranked
from dstrain.data.sample import Sample, SampleReader
from dstrain.data.shards.names import ENCODED
from dstrain.errors import ConfigError, DataError
from dstrain.job import load_pipeline, make_operators, open_data, wanted_samples
from dstrain.pipelines.base import PIPELINES, Pipeline
from dstrain.pipelines.graph import UnitGraph

log = logging.getLogger(__name__)

_AHEAD = 4  # samples decoded ahead for each worker

Decoded = tuple[Raw, Sample] | Refused


def encode(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shard_samples: int = 0,
    progress: bool = False,
) -> list[PackReport]:
    """Encode the samples of the recipe's data into `out`, or `out`/NAME for each of its sources.

    device, dtype: of the encoders. shard_samples: most samples a shard; 0 makes one of each shard of the data.
    Samples that cannot be encoded are refused, and listed in refused.jsonl beside the shards.
    Raises ConfigError if the recipe draws at random what would be encoded, DataError if shards cannot be read or
    written or are encoded already, CheckpointError if the model folder is not usable.
    """
    family, data = PIPELINES.get(recipe.model.family), recipe.data
    operators = make_operators(data)
    operators.check_fixed()
    folders = [out / _safe(name) for name in data.sources] or [out]
    dataset = open_data(data, wanted_samples(data, family.columns()))
    if ENCODED in dataset.wanted.columns:
        raise DataError(f"shard {dataset.shard(0)} holds encoded samples already; name the shards of pictures")
    background = colour(data.background)
    pipeline = load_pipeline(family, recipe, device=device, dtype=dtype, load=())
    pipeline.check_fit()
    stamp = pipeline.stamp(dtype)
    options = {
        "encoders": stamp,
        "resolution": asdict(dataset.wanted.resolution),
        "background": background,
        "shard_samples": shard_samples,
    }
    read = SampleReader(dataset, operators=operators, seed=recipe.seed, background=background)
    loaded: Pipeline | None = None
    reports = []
    for folder, (name, ends) in zip(folders, _sources(dataset, recipe, shard_samples), strict=True):
        digest = hashlib.sha256(json.dumps([dataset.digest, name, ends]).encode()).hexdigest()
        with only_writer(folder, "encoding"):
            ledger = Ledger(folder, name, ends[-1] - ends[0], digest, options)
            if ledger.done:
                log.info("%s is encoded already; nothing is left to do", folder)
            else:
                loaded = loaded or load_pipeline(
                    family, recipe, device=device, dtype=dtype, load=(*pipeline.encoders, "tokenizer")
                )
                work = _Work(loaded, dataset, read, stamp, max(1, data.workers))
                _write(work, ends, ledger, progress)
        reports.append(ledger.report())
        if not reports[-1].samples:
            reasons = ranked(entry.reason for entry in reports[-1].refused)
            raise DataError(f"no sample of {name} can be encoded ({reasons}); all are in {folder / REFUSED}")
    return reports


def _safe(name: str) -> str:
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"data.sources: {name!r} cannot be the name of a folder of shards; rename the source")
    return name


def _sources(dataset: Dataset, recipe: Recipe, shard_samples: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the name of each source and the rows at which its shards begin, and the row after the last."""
    first = 0
    for name, part in zip(recipe.data.sources or ["the recipe's shards"], dataset.parts, strict=True):
        edges = first + np.cumsum([0, *part.counts.tolist()])
        first = int(edges[-1])
        yield (
            name,
            [
                *(row for a, b in pairwise(edges.tolist()) for row in range(a, b, shard_samples or max(1, b - a))),
                first,
            ],
        )


def _write(work: "_Work", ends: Sequence[int], ledger: Ledger, progress: bool) -> None:
    """Write the rows from the first of `ends` to the last, a shard for each stretch between two of them."""
    first, items = ends[0], ends[-1] - ends[0]
    if ledger.entries:
        log.info("going on after %s, at sample %d of %d", ledger.entries[-1].name, ledger.next, items)
    bar = tqdm(total=items, initial=ledger.next, unit="sample", disable=None if progress else True)
    edges = frozenset(ends)
    shard: ShardWriter | None = None
    try:
        with bar, closing(work.samples(range(first + ledger.next, ends[-1]))) as samples:
            for number, sample in enumerate(samples, ledger.next + 1):
                if isinstance(sample, Refused):
                    ledger.refuse(sample)
                else:
                    shard = shard or ShardWriter(ledger.path())
                    shard.add(sample.key, sample.members)
                if shard and first + number in edges:
                    shard.publish()
                    ledger.add(shard.path, shard.samples, number)
                    shard = None
                bar.update()
        ledger.finish()
    except BaseException:
        if shard:
            shard.discard()
        raise


class _Work:
    """Decodes rows ahead in threads, and encodes them one by one in order."""

    def __init__(self, pipeline: Pipeline, dataset: Dataset, read: SampleReader, stamp: str, workers: int) -> None:
        stored, _ = pipeline.graph.depends_on(set())
        self._pipeline, self._graph = pipeline, UnitGraph(stored, pipeline.graph.given)
        self._dataset, self._read, self._stamp, self._workers = dataset, read, stamp, workers

    def samples(self, rows: Sequence[int]) -> Generator[Packed | Refused, None, None]:
        """Yield the encoded samples of `rows`, in order."""
        pending: deque[Future[Decoded]] = deque()
        pool = ThreadPoolExecutor(self._workers, "dstrain-decoder", torch.set_num_threads, (1,))
        try:
            for row in rows:
                if len(pending) >= _AHEAD * self._workers:
                    yield self._encode(pending.popleft().result())
                pending.append(pool.submit(self._decode, row))
            while pending:
                yield self._encode(pending.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, row: int) -> Decoded:
        try:
            raw = self._dataset.read(row)
            return raw, self._read.decode(raw, row, draw=row)  # nothing of it is drawn
        except BadSample as error:
            return Refused(f"{self._dataset.shard(row)}: {self._dataset.key(row)}", error.reason, str(error))

    def _encode(self, decoded: Decoded) -> Packed | Refused:
        if isinstance(decoded, Refused):
            return decoded
        raw, sample = decoded
        batch = self._pipeline.batch([sample.columns], [sample.caption], [sample.draw])
        with torch.no_grad():
            values = self._graph.run(self._pipeline, batch, self._pipeline.using)
        data = write_encoded(
            {name: values[name][0] for name in self._pipeline.made},
            width=values["width"][0],
            height=values["height"][0],
            frames=1,
            stamp=self._stamp,
        )
        try:
            decode_encoded(data)  # what is not finite, or too large, is seen now
        except BadSample as error:
            return Refused(f"{sample.shard}: {sample.key}", error.reason, str(error))
        members = {ENCODED: data, **_caption(raw.captions)}
        fits = len(f"{raw.key}.{ENCODED}".encode()) <= MAX_NAME
        return Packed(raw.key if fits else sample_key(sample.row, raw.key, members), members)


def _caption(captions: list[str]) -> dict[str, bytes]:
    """All of them, though only the first is encoded: the plan counts with the longest."""
    if len(captions) == 1:
        return {"txt": captions[0].encode()}
    record: dict[str, Any] = {"caption": captions}
    return {"json": json.dumps(record, ensure_ascii=False).encode()}
