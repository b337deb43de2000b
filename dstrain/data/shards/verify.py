"""Everything that is wrong with a shard: every header, every byte that was indexed, every picture decoded in full."""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstrain.data.media.decode import load_rgb
from dstrain.data.media.encoded import decode_encoded
from dstrain.data.media.probe import probe
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards.catalog import sidecar_of
from dstrain.data.shards.index import ShardIndex, load
from dstrain.data.shards.keys import KeyLog
from dstrain.data.shards.names import Content, split
from dstrain.data.shards.processes import each
from dstrain.data.shards.scan import AGAIN, BESIDE, Part, caption_bytes, member_digest, read_part, shard_digest
from dstrain.data.shards.tar import Kind, Member, TarDamage, members, next_header, opened
from dstrain.errors import DataError

UNREADABLE = "unreadable"  # the file cannot be opened or read
TAR = "tar_damaged"  # a header, the end-of-archive marker, or what follows it
LOST = "member_lost"  # a member that was indexed has no header any more
INDEX = "index_damaged"
NO_INDEX = "no_index"  # nothing to compare the bytes with: altered captions, and some pictures, are not seen
STALE_INDEX = "index_stale"
_HARMLESS = {NO_INDEX, STALE_INDEX}


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a shard."""

    shard: str  # path
    offset: int  # byte of the tar where the damaged member's data, or the damaged place, begins
    member: str  # its name; "" where none is known
    reason: str  # a Reason, or one of the words of this module
    detail: str

    @property
    def harmless(self) -> bool:
        """Whether it is no damage, but less certainty: there is no index, or a stale one, to compare with."""
        return self.reason in _HARMLESS

    def __str__(self) -> str:
        member = f"member {self.member}: " if self.member else ""
        return f"{self.shard}, byte {self.offset}: {member}{self.reason} ({self.detail})"


def verify(path: Path) -> list[Damage]:
    """Find every damage of the shard at `path`, in the order of the tar as far as there is one.

    Each member's bytes are compared with a fresh index, if there is one beside the shard. After a damaged header it
    goes on at the next sound one. Nothing is written, and no damage is raised as an error.
    """
    check = _Check(path)
    try:
        with opened(path) as fd:
            check.run(fd)
    except DataError as error:
        check.report(0, "", UNREADABLE, str(error))
    return check.found


def verify_all(paths: Sequence[Path], *, workers: int, progress: bool) -> Iterator[list[Damage]]:
    """Yield what `verify` finds in each shard, in order, from `workers` processes."""
    return each(verify, paths, workers=workers, label="verifying", progress=progress)


class _Check:
    """The verification of one shard."""

    def __init__(self, path: Path) -> None:
        self.found: list[Damage] = []
        self._path = path
        self._members = 0
        self._index: ShardIndex | None = None
        self._offsets = self._sizes = self._digests = np.empty(0, np.int64)  # of indexed members, by offset
        self._met = np.empty(0, bool)
        self._keys, self._firsts = KeyLog(), array("q")  # of each sample; where it begins
        self._key: str | None = None
        self._columns: set[str] = set()
        self._json: tuple[Member, Part] | None = None

    def report(self, offset: int, member: str, reason: str, detail: str) -> None:
        self.found.append(Damage(str(self._path), offset, member[:200], str(reason), detail))

    def run(self, fd: int) -> None:
        self._compare_with_index(fd)
        for member in self._walk(fd):
            self._members += 1
            self._member(fd, member)
        self._end_of_sample()
        if not self._members:
            self.report(0, "", TAR, "it has no members")
        self._repeats()
        self._lost()
        changed = {TAR, LOST, Reason.CHANGED} & {damage.reason for damage in self.found}
        if self._index is not None and not changed and shard_digest(fd) != self._index.digest:
            detail = "bytes changed since it was indexed, outside of the indexed members: in headers or between members"
            self.report(0, "", Reason.CHANGED, detail)

    def _compare_with_index(self, fd: int) -> None:
        sidecar, tar = sidecar_of(self._path), os.fstat(fd)
        index = load(sidecar, self._path)
        if index is None:
            there = sidecar.exists()
            what = f"{sidecar.name} cannot be used" if there else "there is none beside it"
            self.report(0, "", INDEX if there else NO_INDEX, f"{what}; `dstrain index` makes one")
        elif (index.size, index.mtime_ns) != (tar.st_size, tar.st_mtime_ns):
            what = f"it is of a file of {index.size} bytes"
            if index.size == tar.st_size:
                same = shard_digest(fd) == index.digest
                what = f"it is of another time, and of {'these' if same else 'other'} bytes"
            self.report(0, "", STALE_INDEX, f"{what}; `dstrain index` makes it anew")
        else:
            self._index = index
            try:
                parts = index.parts[np.argsort(index.parts["offset"], kind="stable")]
            except DataError as error:
                self.report(0, "", INDEX, str(error))
                return
            self._offsets, self._sizes, self._digests = (parts[name].copy() for name in ("offset", "size", "digest"))
            self._met = np.zeros(len(parts), bool)

    def _walk(self, fd: int) -> Iterator[Member]:
        position: int | None = 0
        while position is not None:
            try:
                yield from members(fd, self._path, position)
                return
            except TarDamage as error:
                position = next_header(fd, error.resume)
                end = os.fstat(fd).st_size if position is None else position
                lost = f"; bytes {error.position} to {end} cannot be read" if error.position < end else ""
                self.report(error.position, "", TAR, error.what + lost)

    def _member(self, fd: int, member: Member) -> None:
        named = None if member.kind is Kind.FOLDER else split(member.name)
        if named is None:
            return
        key, extension = named
        if key != self._key:
            self._end_of_sample()
            self._key = key
            self._keys.append(key)
            self._firsts.append(member.offset)
        digest, reason, detail = None, None, ""
        try:
            part = read_part(fd, member, extension)
            digest = part.digest
            self._content(member, part)
        except BadSample as error:
            reason, detail = error.reason, str(error)
        if member.kind is Kind.FILE and self._is_changed(fd, member, digest):
            reason, detail = Reason.CHANGED, f"other bytes than were indexed; {detail}".removesuffix("; ")
        if reason is not None:
            self.report(member.offset, member.name, reason, detail)

    def _content(self, member: Member, part: Part) -> None:
        """Look into one member; raises BadSample."""
        if part.column in self._columns:
            raise BadSample(Reason.AMBIGUOUS, f"a second member for column {part.column:.200}")
        self._columns.add(part.column)
        if part.content is Content.TXT:
            caption_bytes(part)
        elif part.content is Content.JSON:
            self._json = (member, part)
        elif part.content is Content.IMAGE:
            assert part.data is not None
            load_rgb(part.data, probe(part.data))
        elif part.content is Content.ENCODED:
            assert part.data is not None
            decode_encoded(part.data)
        elif part.content is Content.VIDEO:
            from dstrain.data.media.video import decode_video

            assert part.data is not None
            for start in (0.0, 1 - 2**-20):  # the first frame and the last
                decode_video(part.data, (part.width, part.height), frames=1, fps=0, start=start)

    def _is_changed(self, fd: int, member: Member, digest: int | None) -> bool:
        place = int(np.searchsorted(self._offsets, member.offset))
        if place == len(self._offsets) or self._offsets[place] != member.offset:
            return False
        self._met[place] = True
        digest = member_digest(fd, member) if digest is None else digest
        return self._sizes[place] != member.size or int(self._digests[place]) != digest

    def _end_of_sample(self) -> None:
        if self._json is not None and "txt" not in self._columns:  # else it is not the caption
            member, part = self._json
            try:
                caption_bytes(part)
            except BadSample as error:
                self.report(member.offset, member.name, error.reason, str(error))
        self._json = None
        self._columns.clear()

    def _repeats(self) -> None:
        keys = self._keys.table()
        again, beside = self._keys.repeated()
        for place in np.flatnonzero(again | beside).tolist():
            self.report(self._firsts[place], keys[place], Reason.AMBIGUOUS, AGAIN if again[place] else BESIDE)

    def _lost(self) -> None:
        if self._index is None or self._met.all():
            return
        parts, rows, keys = self._index.parts, self._index.rows, self._index.keys
        lost = np.isin(parts["offset"], self._offsets[~self._met])
        for number in np.flatnonzero(lost).tolist():
            key = keys[int(np.searchsorted(rows["first"], number, side="right")) - 1]
            column = self._index.columns[int(parts["column"][number])]
            what = f"its header is gone, with {column} of {parts['size'][number]} bytes"
            self.report(int(parts["offset"][number]), key, LOST, what)
