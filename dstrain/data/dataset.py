"""The rows of all shards together: their sizes for the planner, their bytes for the loader."""

import hashlib
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from dstrain.data.media.captions import captions_of
from dstrain.data.plan import Part
from dstrain.data.reader import ShardGone, ShardReader
from dstrain.data.reasons import Reason, ranked
from dstrain.data.remote.cache import Cache
from dstrain.data.remote.urls import is_remote
from dstrain.data.selection import Selected, Wanted
from dstrain.data.shards.catalog import find_shards, open_indexes
from dstrain.data.shards.index import Excluded, ShardIndex
from dstrain.data.shards.names import ENCODED, Content
from dstrain.errors import ConfigError, DataError

_KEPT_ROWS = 1 << 20  # of the shards used last; they take about 200 bytes a row
_LISTED = 1000  # samples left out that are kept by name; the others are only counted
_FINE = 1 << 20  # weights are shares of this many draws


@dataclass(frozen=True)
class Source:
    """Shards that belong together. repeat: how often an epoch holds each sample. weight: share of all samples drawn."""

    shards: Sequence[str]
    repeat: float = 1.0
    weight: float | None = None


@dataclass(frozen=True)
class File:
    """A picture, video or encoded sample as it is stored, and the size that it is to have: pixels, and frames."""

    data: bytes
    content: Content
    width: int
    height: int
    frames: int


@dataclass(frozen=True)
class Raw:
    """One sample as it is stored: its files by column, and its captions to choose from."""

    key: str
    files: dict[str, File]
    captions: list[str]


@dataclass
class LeftOut:
    """The samples that are not used: how many for each reason, and the first of them by name."""

    counts: Counter[Reason] = field(default_factory=Counter)
    first: list[Excluded] = field(default_factory=list)


class Dataset:
    """Every usable sample of the shards, numbered by row: sources as given, shards in order, samples as in the tar.

    Only the totals of each index are read at first; the rows of a shard are looked at when one of them is used, or when
    the totals do not prove that all of them can be.
    parts: what the plan counts with. left_out: what is not used. digest: hex SHA-256 of which samples these are.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, Sequence[ShardIndex]]],
        wanted: Wanted | None = None,
        *,
        cache: Cache | None = None,
        urls: Mapping[Path, str] | None = None,
    ) -> None:
        self.wanted = wanted or Wanted()
        self.indexes = [index for _, indexes in sources for index in indexes]
        self.left_out = LeftOut()
        self._cache, self._urls = cache, urls or {}
        self._reader = ShardReader()
        self._lock = threading.Lock()
        self._selected: OrderedDict[int, Selected] = OrderedDict()
        self._kept = 0  # rows in them
        counts = np.array([self._count(index) for index in self.indexes], np.int64)
        self._ends = np.cumsum(counts)
        edges = np.cumsum([0, *(len(indexes) for _, indexes in sources)])
        counted = [counts[first:last] for first, last in pairwise(edges.tolist())]
        shares = _shares([source for source, _ in sources], [int(part.sum()) for part in counted])
        self.parts = [Part(part, share) for part, share in zip(counted, shares)]
        self.max_tokens = max((self.wanted.most_tokens(index) for index in self.indexes if index.samples), default=0)
        self.digest = self._digest(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Return what each row costs a pack, int64 [n]."""
        shards = np.searchsorted(self._ends, rows, side="right")
        tokens = np.empty(len(rows), np.int64)
        for number in np.unique(shards).tolist():
            mine = shards == number
            tokens[mine] = self._rows(number).tokens[rows[mine] - self._first(number)]
        return tokens

    def shard(self, row: int) -> str:
        """Return the path or URL of the shard that holds the row."""
        path = self.indexes[self._number(row)].path
        return self._urls.get(path, str(path))

    def key(self, row: int) -> str:
        """Return the key of the row's sample."""
        number = self._number(row)
        selected = self._rows(number)
        return selected.keys[int(selected.places[row - self._first(number)])]

    def read(self, row: int) -> Raw:
        """Read one sample. Safe to call from several threads.

        Raises BadSample if the bytes are not those that were indexed, DataError if the shard cannot be read.
        """
        number = self._number(row)
        index, selected, place = self.indexes[number], self._rows(number), row - self._first(number)
        files = {}
        for c, column in enumerate(self.wanted.columns):
            part = selected.parts[place, c]
            size = (int(target[place, c]) for target in (selected.widths, selected.heights, selected.frames))
            files[column] = File(self._bytes(index, part), Content(int(part["kind"])), *size)
        captions: list[str] = []
        if self.wanted.captioned:
            part = selected.captions[place]
            captions = captions_of(self._bytes(index, part), index.columns[int(part["column"])])
        return Raw(selected.keys[int(selected.places[place])], files, captions)

    def replacements(self, row: int, count: int) -> Iterator[int]:
        """Give up to `count` rows to take when `row` is bad: the next ones that cost no more.

        Half of the tries that are left go to each shard, from the row's own on, so that a shard that is bad as a whole
        is left behind. A function of the row alone, so the same on any rank and at any world size.
        """
        most = int(self.tokens(np.array([row]))[0])
        own = self._number(row)
        for turn in range(len(self._ends)):
            number = (own + turn) % len(self._ends)
            rows = self._first(number) + np.flatnonzero(self._rows(number).tokens <= most)
            if number == own:
                rows = np.concatenate([rows[rows > row], rows[rows < row]])
            rows = rows[: -(-count // 2)]
            yield from rows.tolist()
            count -= len(rows)
            if count <= 0:
                return

    @property
    def is_remote(self) -> bool:
        """Whether any shard has to be brought to this node."""
        return bool(self._urls)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Bring shards to this node, by number, if they are remote; what fails is left to who reads them."""
        with suppress(DataError):
            for number in shards:
                self._local(self.indexes[number])

    def summary(self) -> str:
        """Describe the dataset in one line for a log: samples, sizes, and what was left out."""
        out = self.left_out.counts
        left_out = f"; left out {out.total()}: {ranked(out)}" if out else ""
        size = sum(index.size for index in self.indexes)
        sources = f" of {len(self.parts)} sources" if len(self.parts) > 1 else ""
        amount = f"{size / 1e9:.3g} GB" if size > 1e9 else f"{size / 1e6:.3g} MB"
        held = f"{_counted(len(self), 'sample')} in {_counted(len(self.indexes), 'shard')}{sources} ({amount})"
        return f"{held}, none of more than {self.max_tokens} tokens{left_out}"

    def _number(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def _first(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _rows(self, number: int) -> Selected:
        with self._lock:
            selected = self._selected.get(number)
            if selected is not None:
                self._selected.move_to_end(number)
                return selected
        selected = self.wanted.select(self.indexes[number])  # two threads may do it at once: the same comes out
        with self._lock:
            if number not in self._selected:
                self._kept += len(selected)
            self._selected[number] = selected
            while len(self._selected) > 1 and self._kept > _KEPT_ROWS:
                self._kept -= len(self._selected.popitem(last=False)[1])
        return selected

    def _local(self, index: ShardIndex) -> Path:
        url = self._urls.get(index.path)
        if url is None:
            return index.path
        assert self._cache is not None
        return self._cache.fetch(index, url)

    def _bytes(self, index: ShardIndex, part: np.void) -> bytes:
        place = int(part["offset"]), int(part["size"]), int(part["digest"])
        try:
            return self._reader.read(self._local(index), *place)
        except ShardGone:
            if index.path not in self._urls:
                raise
            return self._reader.read(self._local(index), *place)  # evicted by another process; now it is used again

    def _count(self, index: ShardIndex) -> int:
        """Count the usable rows: by the totals of the index if they are enough, else row by row."""
        out = self.left_out
        out.counts.update(index.excluded_counts)
        if len(out.first) < _LISTED:
            out.first += index.excluded[: _LISTED - len(out.first)]
        if self.wanted.takes_all(index):
            return index.samples
        refused = self.wanted.left_out(index)
        out.counts.update(entry.reason for entry in refused)
        out.first += refused[: _LISTED - len(out.first)]
        return index.samples - len(refused)

    def _digest(self, counts: np.ndarray) -> str:
        shards = [[index.digest, count] for index, count in zip(self.indexes, counts.tolist())]
        parts = [[len(part.counts), part.share] for part in self.parts]
        wanted = [self.wanted.columns, self.wanted.captioned]
        return hashlib.sha256(json.dumps(["dstrain dataset 2", shards, parts, wanted]).encode()).hexdigest()


def open_dataset(
    sources: Sequence[str] | Mapping[str, Source],
    wanted: Wanted | None = None,
    *,
    cache: Cache | None = None,
    workers: int = 0,
    progress: bool = False,
    encoded: bool = False,
) -> Dataset:
    """Open tar files, folders of tar files, globs and URLs as one dataset, making the indexes that are missing.

    sources: shards, or several named sources. cache: where remote shards are kept. workers: processes that make
    indexes. encoded: want encoded samples, instead of what `wanted` says, if the shards hold such.
    Raises DataError if an entry names nothing, a shard is not a plain tar, a source has no usable sample, or only some
    shards are encoded; ConfigError for repeats and weights that do not go together.
    """
    named = sources if isinstance(sources, Mapping) else {"shards": Source(sources)}
    _check_weights(named)
    urls: dict[Path, str] = {}
    opened: list[tuple[Source, Sequence[ShardIndex]]] = []
    for source in named.values():
        found = find_shards(source.shards)
        remote = [location for location in found if is_remote(location)]
        if remote and cache is None:
            raise ConfigError(f"shard {remote[0]} is remote; give a folder for the cache (data.cache_dir)")
        local = iter(open_indexes([Path(f) for f in found if not is_remote(f)], workers=workers, progress=progress))
        fetched = iter(cache.open_indexes(remote) if cache is not None else [])
        indexes = [next(fetched if is_remote(location) else local) for location in found]
        urls |= {index.path: url for index, url in zip(indexes, found) if is_remote(url)}
        opened.append((source, indexes))
    if encoded:
        wanted = _as_held(wanted or Wanted(), [index for _, indexes in opened for index in indexes], urls)
    dataset = Dataset(opened, wanted, cache=cache, urls=urls)
    for name, part, (_, shards) in zip(named, dataset.parts, opened):
        if not part.counts.sum():
            out = dataset.left_out.counts
            reasons = f" (left out: {ranked(out)})" if out else ""
            of = f" of source {name!r}" if len(named) > 1 else ""
            columns = " and ".join(dataset.wanted.columns)
            sizes = ""
            if Reason.IMAGE_TOO_SMALL in out:
                sizes = "; data.min_pixels, width, height and upscale say what is too small"
            elif Reason.ENCODED_SIZE in out:
                sizes = "; data.max_pixels, width and height must be those that they were encoded with"
            kinds = " (png, jpg, webp)" if columns != ENCODED else ""
            raise DataError(
                f"no sample{of} can be used in {_counted(len(shards), 'shard')}, the first being {shards[0].path}"
                f"{reasons}; a sample is {columns}{kinds} and a caption (txt, json) with one key{sizes}"
            )
    return dataset


def _as_held(wanted: Wanted, indexes: Sequence[ShardIndex], urls: Mapping[Path, str]) -> Wanted:
    """Want encoded samples if the shards hold such; raises DataError if only some of them do."""
    held = [index for index in indexes if ENCODED in index.stats]
    if not held:
        return wanted
    rest = [index for index in indexes if index.samples and ENCODED not in index.stats]
    if rest:
        names = [urls.get(index.path, str(index.path)) for index in (held[0], rest[0])]
        raise DataError(
            f"shard {names[0]} holds encoded samples and {names[1]} holds none; train on one kind: encode the others "
            "too (`dstrain encode`), or leave them out"
        )
    return replace(wanted, columns=(ENCODED,))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _check_weights(sources: Mapping[str, Source]) -> None:
    weighted = [name for name, source in sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        rest = next(name for name in sources if name not in weighted)
        raise ConfigError(f"source {weighted[0]!r} has a weight and {rest!r} has none; give all of them one, or none")
    if len(sources) > 255:
        raise ConfigError(f"{len(sources)} sources are more than 255; put shards that belong together into one")
    for name, source in sources.items():
        if not source.repeat > 0 or (source.weight is not None and not source.weight > 0):
            raise ConfigError(f"source {name!r}: repeat and weight must be above 0; leave the source out instead")
        if source.weight is not None and source.repeat != 1:
            raise ConfigError(f"source {name!r} has both repeat and weight; one of them says how often it comes")


def _shares(sources: Sequence[Source], counts: Sequence[int]) -> list[int]:
    """Return how many of an epoch's draws come from each source."""
    total = sum(source.weight or 0.0 for source in sources)
    if total:
        return [max(1, round((source.weight or 0.0) / total * _FINE)) for source in sources]
    return [max(1, round(count * source.repeat)) for source, count in zip(sources, counts)]
