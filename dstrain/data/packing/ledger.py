"""What a packing has done so far, kept beside its shards, so that the same command goes on where another ended.

OUT/pack.json says what is packed (a digest of the items, the options), which shards are whole, and which item comes
next; it is written anew after each shard. OUT/refused.jsonl has one line for each refused item.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dstrain.data.reasons import Reason, ranked
from dstrain.errors import DataError
from dstrain.storage import fsync_file, write_atomic

MANIFEST = "pack.json"
REFUSED = "refused.jsonl"
_VERSION = 1


@dataclass(frozen=True)
class Refused:
    """An item that was not packed."""

    name: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Entry:
    """A shard that is whole: items `first` to `next` - 1 are in it, or were refused."""

    name: str
    samples: int
    bytes: int
    first: int
    next: int


@dataclass
class PackReport:
    """What `pack` wrote and what it refused."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    refused: list[Refused] = field(default_factory=list)

    def summary(self) -> str:
        """Describe the outcome in one line."""
        size = sum(shard.stat().st_size for shard in self.shards)
        refused = f"; refused {len(self.refused)}: {ranked(r.reason for r in self.refused)}" if self.refused else ""
        return f"{self.samples} samples in {len(self.shards)} shards, {size / 1e6:.3g} MB{refused}"


class Ledger:
    """The state of the packing in one folder. Only the process that holds the folder's lock may have it."""

    def __init__(self, out: Path, source: str, items: int, digest: str, options: Mapping[str, Any]) -> None:
        """Begin, or go on.

        Raises DataError if the folder holds shards of another source, of other options or of no packing at all, or
        lacks shards that are said to be whole.
        """
        self._out = out
        self._items = items
        self._head = {"source": source, "items": items, "digest": digest, "options": dict(options)}
        self.entries: list[Entry] = []
        self._lines: list[str] = []  # of the manifest, one an entry
        self.refused: list[Refused] = []
        self.next = 0
        self.done = False
        self._listed, self._listed_bytes = 0, 0  # refusals in the file, and their bytes
        for part in (*out.glob(".shard-*.tar.part"), *out.glob(f".{MANIFEST}.*.part")):
            part.unlink()
        begun = (out / MANIFEST).exists()
        if begun:
            self._resume()
        self._check_tars(begun)
        if not begun:
            (out / REFUSED).unlink(missing_ok=True)
            self._save()

    def path(self) -> Path:
        """Return where the next shard goes."""
        return self._out / _shard_name(len(self.entries))

    def refuse(self, entry: Refused) -> None:
        """Take note of an item that is not packed; it is on disk after the next `add` or `finish`."""
        self.refused.append(entry)

    def add(self, path: Path, samples: int, following: int) -> None:
        """Take note of a shard that is whole; packing goes on with item `following`."""
        entry = Entry(path.name, samples, path.stat().st_size, self.next, following)
        self.entries.append(entry)
        self._lines.append(_line(entry))
        self.next = following
        self._save()

    def finish(self) -> None:
        """Take note that nothing is left to pack. Without a single shard, only the list of refusals stays."""
        self.next, self.done = self._items, True
        if self.entries:
            self._save()
        else:
            self._list_refusals()
            (self._out / MANIFEST).unlink()

    def report(self) -> PackReport:
        """Return what has been written and refused, in this and in earlier calls."""
        shards = [self._out / entry.name for entry in self.entries]
        return PackReport(shards, sum(entry.samples for entry in self.entries), list(self.refused))

    def _list_refusals(self) -> None:
        lines = "".join(_line(entry) + "\n" for entry in self.refused[self._listed :]).encode()
        if lines:
            with (self._out / REFUSED).open("ab") as f:
                f.write(lines)
            fsync_file(self._out / REFUSED)
            self._listed, self._listed_bytes = len(self.refused), self._listed_bytes + len(lines)

    def _save(self) -> None:
        self._list_refusals()
        state = {"next": self.next, "done": self.done, "refused_bytes": self._listed_bytes}
        head = json.dumps({"version": _VERSION, **self._head, **state}, indent=1)
        shards = ",\n  ".join(self._lines)
        write_atomic(self._out / MANIFEST, f'{head[:-2]},\n "shards": [\n  {shards}\n ]\n}}\n'.encode())

    def _resume(self) -> None:
        try:
            state = json.loads((self._out / MANIFEST).read_bytes())
            if state["version"] != _VERSION:
                raise ValueError(f"version {state['version']!r}")
            self._check_head({key: state[key] for key in self._head})
            self.entries = [Entry(**shard) for shard in state["shards"]]
            self._lines = list(map(_line, self.entries))
            self.next, self.done = state["next"], state["done"]
            self._check_order()
            self._listed_bytes = state["refused_bytes"]
            self.refused = _refusals(self._out / REFUSED, self._listed_bytes)
            self._listed = len(self.refused)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{self._out / MANIFEST} cannot be gone on from ({error}); give another folder, or remove this one"
            ) from error

    def _check_order(self) -> None:
        edges = [0, *(entry.next for entry in self.entries), self.next, self._items]
        names = [_shard_name(number) for number in range(len(self.entries))]
        if edges != sorted(edges) or [entry.first for entry in self.entries] != edges[: len(names)]:
            raise ValueError("its shards do not follow each other")
        if [entry.name for entry in self.entries] != names:
            raise ValueError("its shards have other names")

    def _check_head(self, then: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self._head))
        names = sorted({*then["options"], *now["options"]})
        changes = [(name, then["options"].get(name), now["options"].get(name)) for name in names]
        differ = [f"{name} was {old}, now {new}" for name, old, new in changes if old != new]
        if then["items"] != now["items"]:
            differ.append(f"{then['items']} items then, {now['items']} now")
        elif then["digest"] != now["digest"]:
            differ.append("names, sizes, captions or columns of the items have changed")
        if differ:
            raise DataError(
                f"{self._out} was begun from {then['source']} and this is not the same packing ({'; '.join(differ)}); "
                "give another folder, or remove this one"
            )

    def _check_tars(self, begun: bool) -> None:
        present = {path.name for path in self._out.glob("*.tar")}
        if present and not begun:
            raise DataError(f"{self._out} already holds shards; give an empty folder, or remove them first")
        for entry in self.entries:
            path = self._out / entry.name
            size = path.stat().st_size if path.exists() else None
            if size != entry.bytes:
                what = "is gone" if size is None else f"has {size} bytes and was written with {entry.bytes}"
                raise DataError(f"{path} {what}; bring it back, or remove {self._out} and pack again")
        # a shard that was whole when its packing was killed, and not in the manifest yet, is written once more
        known = {entry.name for entry in self.entries} | (set() if self.done else {self.path().name})
        if present - known:
            foreign = ", ".join(sorted(present - known)[:3])
            raise DataError(f"{self._out} holds tars of another origin ({foreign}); move them elsewhere")


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _line(entry: Entry | Refused) -> str:
    return json.dumps(asdict(entry))


def _refusals(path: Path, size: int) -> list[Refused]:
    """Read the first `size` bytes of the list of refusals, and cut off what a killed packing wrote after them."""
    if not size:
        path.unlink(missing_ok=True)
        return []
    with path.open("r+b") as f:
        lines = f.read(size)
        if f.read(1):
            f.truncate(size)
    if len(lines) < size:
        raise ValueError(f"{path.name} is shorter than it was")
    entries = [json.loads(line) for line in lines.splitlines()]
    return [Refused(entry["name"], Reason(entry["reason"]), entry["detail"]) for entry in entries]
