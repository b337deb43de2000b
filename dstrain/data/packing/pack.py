"""`dstrain pack`: pictures, videos and captions into tar shards with their indexes.

Items are read and proved good by threads and written in order by one, so the bytes do not depend on their number.
After each shard the manifest says where packing has come to (see `ledger`), so the same call again goes on from there.
"""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from dstrain.data.packing.items import Item
from dstrain.data.packing.ledger import REFUSED, Ledger, PackReport, Refused
from dstrain.data.packing.members import Packed, prepare
from dstrain.data.packing.reencode import Reencode
from dstrain.data.packing.sources import Items, find_items
from dstrain.data.packing.writer import ShardWriter
from dstrain.data.reasons import BadSample, ranked
from dstrain.errors import DataError
from dstrain.storage import locked

log = logging.getLogger(__name__)

LOCK = ".pack.lock"
MAX_WORKERS = 16
_ITEMS_AHEAD = 4  # in flight for each worker
_BYTES_AHEAD = 1 << 28  # of all items in flight
_SHOWN = 3  # refusals that are quoted when nothing can be packed


def pack(
    source: str | Path,
    out: Path,
    *,
    shard_bytes: int = 1 << 28,
    shard_samples: int = 10_000,
    columns: Sequence[str] | None = None,
    base: Path | None = None,
    reencode: Reencode | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> PackReport:
    """Pack a table, a folder or tars (see `find_items`) into `out/shard-000000.tar` and so on.

    A shard is closed before it would pass `shard_bytes` (of the finished tar) or `shard_samples`; a sample that is
    larger has one to itself. Pictures are stored byte for byte after they have been decoded once, unless `reencode`
    says otherwise; those that cannot be used are refused, listed in `out/refused.jsonl` and reported. The same input
    gives the same bytes, whatever `workers` (threads; all cores, at most 16, unless given) is.
    A shard appears under its name only when it is whole, and its index with it. If packing was interrupted, the same
    call goes on after the last whole shard; if it was finished, nothing is done. `progress` shows a bar on a terminal.
    Raises DataError if there is nothing to pack, `out` holds other shards or another packing, or cannot be written to.
    """
    workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    found = find_items(source, columns=columns, base=base, workers=workers, progress=progress)
    options = {
        "shard_bytes": shard_bytes,
        "shard_samples": shard_samples,
        "columns": columns and list(columns),
        "reencode": reencode and asdict(reencode),
    }
    with only_writer(out, "packing"):
        ledger = Ledger(out, str(source), len(found.items), found.digest, options)
        if ledger.done:
            log.info("%s is packed already; nothing is left to do", out)
        else:
            _write(found.items, ledger, shard_bytes, shard_samples, reencode, workers, progress)
    report = ledger.report()
    if not report.samples:
        reasons = ranked(entry.reason for entry in report.refused)
        first = "; ".join(f"{entry.name}: {entry.detail}" for entry in report.refused[:_SHOWN])
        raise DataError(
            f"none of the {len(found.items)} items of {source} can be packed ({reasons}), such as {first}; "
            f"all are in {out / REFUSED}"
        )
    return report


@contextmanager
def only_writer(out: Path, doing: str) -> Iterator[None]:
    """Make a folder of shards and keep other processes from writing to it; `doing` says what is done in messages.

    Raises DataError if another process is at it, or for an OSError of what is done inside.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK, wait=False):
            yield
    except BlockingIOError as error:
        raise DataError(f"another process is {doing} into {out}; wait for it, or give another folder") from error
    except OSError as error:
        raise DataError(
            f"shards cannot be written to {out}: {error.strerror or error}; when that is mended, the same command goes "
            "on, or give another folder"
        ) from error


def _write(
    items: Items,
    ledger: Ledger,
    shard_bytes: int,
    shard_samples: int,
    reencode: Reencode | None,
    workers: int,
    progress: bool,
) -> None:
    if ledger.entries:
        log.info("going on after %s, at item %d of %d", ledger.entries[-1].name, ledger.next, len(items))
    bar = tqdm(total=len(items), initial=ledger.next, unit="sample", disable=None if progress else True)
    shard: ShardWriter | None = None
    try:
        with bar, closing(_samples(items, ledger.next, reencode, workers)) as samples:
            for number, sample in enumerate(samples, ledger.next):
                if isinstance(sample, Refused):
                    ledger.refuse(sample)
                else:
                    sizes = map(len, sample.members.values())
                    if shard and (shard.samples >= shard_samples or not shard.has_room(sizes, shard_bytes)):
                        shard.publish()
                        ledger.add(shard.path, shard.samples, number)
                        shard = None
                    shard = shard or ShardWriter(ledger.path())
                    shard.add(sample.key, sample.members)
                bar.set_postfix(shards=len(ledger.entries), refused=len(ledger.refused), refresh=False)
                bar.update()
        if shard:
            shard.publish()
            ledger.add(shard.path, shard.samples, len(items))
        ledger.finish()
    except BaseException:
        if shard:
            shard.discard()
        raise


def _samples(
    items: Items, first: int, reencode: Reencode | None, workers: int
) -> Generator[Packed | Refused, None, None]:
    """Make the samples from item `first` on, in order, by threads (decoders release the interpreter's lock).

    At most four items a worker are in flight, and (but for one item that is larger) 256 MiB of files.
    """
    pending: deque[tuple[Future[Packed | Refused], int]] = deque()  # and the bytes expected
    pool = ThreadPoolExecutor(workers)
    try:
        for number in range(first, len(items)):
            item = items[number]
            size = item.size
            while pending and (len(pending) >= _ITEMS_AHEAD * workers or _held(pending) + size > _BYTES_AHEAD):
                yield pending.popleft()[0].result()
            pending.append((pool.submit(_sample, number, item, reencode), size))
        while pending:
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _held(pending: deque[tuple[Future[Packed | Refused], int]]) -> int:
    held = 0
    for future, expected in pending:
        made = future.result() if future.done() and not future.exception() else None
        held += max(expected, made.size) if isinstance(made, Packed) else expected
    return held


def _sample(number: int, item: Item, reencode: Reencode | None) -> Packed | Refused:
    try:
        return prepare(number, item, reencode)
    except BadSample as error:
        return Refused(item.name, error.reason, str(error))
