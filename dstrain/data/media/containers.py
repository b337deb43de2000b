"""What a video's container says about itself, before FFmpeg is trusted with it.

A file cut off is seen here, which demuxers pass over, and so are the tables by which a small file takes much memory. Of
MP4 and QuickTime only what leads to the first video track is left for FFmpeg to read: no sound, no metadata, no
reference to another file.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from dstrain.data.reasons import BadSample, Reason

MAX_VIDEO_BYTES = 1 << 30
MAX_VIDEO_FRAMES = 100_000
_MAX_EDITED_FRAMES = 1 << 21  # FFmpeg repeats a track's table of frames for each of its edits

_FIRST = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})  # QuickTime did without ftyp
_KEPT = {  # ISO/IEC 14496-12: the boxes inside each that lead to frames; b"" is the file
    b"": frozenset({b"ftyp", b"moov", b"mdat", b"moof"}),
    b"moov": frozenset({b"mvhd", b"trak", b"mvex"}),
    b"trak": frozenset({b"tkhd", b"edts", b"mdia"}),
    b"edts": frozenset({b"elst"}),
    b"mdia": frozenset({b"mdhd", b"hdlr", b"minf"}),
    b"minf": frozenset({b"vmhd", b"stbl"}),
    b"stbl": frozenset({b"stsd", b"stts", b"ctts", b"stss", b"stsc", b"stsz", b"stz2", b"stco", b"co64"}),
    b"mvex": frozenset({b"trex"}),
    b"moof": frozenset({b"mfhd", b"traf"}),
    b"traf": frozenset({b"tfhd", b"tfdt", b"trun"}),
}
_SETUP = frozenset({b"avcC", b"hvcC", b"vpcC", b"av1C", b"esds", b"glbl", b"colr", b"pasp", b"fiel"})
_VISUAL_ENTRY = 78  # bytes of a visual sample entry before the boxes in it
_FREE = b"free"

_EBML = b"\x1aE\xdf\xa3"
_SEGMENT, _CLUSTER, _CRC32, _VOID = 0x18538067, 0x1F43B675, 0xBF, 0xEC
_IN_SEGMENT = frozenset(  # seek head, info, tracks, cues, attachments, chapters, tags (RFC 9559)
    {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, _CLUSTER, _CRC32, _VOID}
)
_IN_CLUSTER = frozenset({0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0x5854, _CRC32, _VOID})  # time, blocks, places


def checked(data: bytes) -> tuple[str, io.BytesIO]:
    """Return FFmpeg's name of the container, "mov" or "matroska", and the file for its demuxer.

    Raises BadSample for another format, a file that is cut off or damaged in its structure, or too many frames.
    """
    if len(data) > MAX_VIDEO_BYTES:
        raise BadSample(Reason.VIDEO_TOO_LARGE, f"{len(data)} bytes, more than {MAX_VIDEO_BYTES}")
    try:
        if data.startswith(_EBML):
            _check_matroska(data)
            return "matroska", io.BytesIO(data)
        if data[4:8] in _FIRST:
            return "mov", _Boxes(data).cleaned()
    except struct.error as error:
        raise _damaged("a header is cut off") from error
    raise BadSample(Reason.VIDEO_FORMAT, "neither MP4, QuickTime, WebM nor Matroska" if data else "an empty file")


def _damaged(what: str) -> BadSample:
    return BadSample(Reason.VIDEO_DAMAGED, what)


@dataclass
class _Boxes:
    """The boxes of an MP4 or QuickTime file, while they are looked through."""

    data: bytes
    track: int | None = None  # of the first video
    frames: int = 0
    edits: int = 0
    dropped: list[int] = field(default_factory=list)  # where the types of boxes stand that are not left to FFmpeg

    def cleaned(self) -> io.BytesIO:
        """Return the file with every box that is not needed marked as free space."""
        self._look(b"", 0, len(self.data))
        if self.track is None:
            raise BadSample(Reason.VIDEO_FORMAT, "there is no video track")
        if self.frames > MAX_VIDEO_FRAMES or self.frames * max(self.edits, 1) > _MAX_EDITED_FRAMES:
            raise BadSample(
                Reason.VIDEO_TOO_LARGE, f"{self.frames} frames in {self.edits} edits, more than {MAX_VIDEO_FRAMES}"
            )
        file = io.BytesIO(self.data)
        for position in self.dropped:
            file.seek(position)
            file.write(_FREE)
        file.seek(0)
        return file

    def _look(self, parent: bytes, start: int, end: int) -> None:
        for kind, body, stop, name in self._boxes(start, end):
            if kind not in _KEPT[parent] or not self._is_ours(kind, body, stop):
                self.dropped.append(name)
            elif kind in _KEPT:
                self._look(kind, body, stop)
            elif kind == b"stsd":
                self._look_at_setup(body + 8, stop)
            elif kind in (b"stsz", b"stz2"):
                self.frames += self._number(body + 8)
            elif kind == b"trun":
                self.frames += self._number(body + 4)
            elif kind == b"elst":
                self.edits += self._number(body + 4)

    def _look_at_setup(self, start: int, end: int) -> None:
        for _, entry, entry_stop, _ in self._boxes(start, end):
            for kind, _, _, name in self._boxes(entry + _VISUAL_ENTRY, entry_stop):
                if kind not in _SETUP:
                    self.dropped.append(name)

    def _is_ours(self, kind: bytes, body: int, stop: int) -> bool:
        """Whether a box belongs to the first video track, or to none."""
        if kind == b"trak":
            if self.track is not None or self._handler(body, stop) != b"vide":
                return False
            self.track = self._track_of(b"tkhd", body, stop)
        elif kind == b"traf":
            return self._track_of(b"tfhd", body, stop) == self.track
        return True

    def _handler(self, start: int, end: int) -> bytes:
        for kind, body, stop, _ in self._boxes(start, end):
            if kind == b"mdia":
                return self._handler(body, stop)
            if kind == b"hdlr":
                return self.data[body + 8 : body + 12]
        return b""

    def _track_of(self, header: bytes, start: int, end: int) -> int:
        for kind, body, _, _ in self._boxes(start, end):
            if kind == header:
                wide = header == b"tkhd" and self.data[body] == 1
                return self._number(body + (4 if header == b"tfhd" else 20 if wide else 12))
        raise _damaged(f"a track without its {header.decode()}")

    def _number(self, position: int) -> int:
        (number,) = struct.unpack_from(">I", self.data, position)
        return int(number)

    def _boxes(self, start: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
        """Yield type, start of the content, end, and where the type stands, of each box between two places."""
        while start + 8 <= end:  # less than a header may be left over: QuickTime ends some lists by zeros
            size, kind = struct.unpack_from(">I4s", self.data, start)
            body = start + 8
            if size == 1:
                (size,) = struct.unpack_from(">Q", self.data, body)
                body += 8
            elif size == 0:  # up to the end
                size = end - start
            if not body - start <= size <= end - start:
                raise _damaged(f"box {kind!r} is cut off")
            yield kind, body, start + size, start + 4
            start += size


def _check_matroska(data: bytes) -> None:
    """Walk the elements down to blocks, checking checksums where there are any (RFC 8794, RFC 9559)."""
    _, body, size = _element(data, 0)
    if size is None:
        raise _damaged("a header without an end")
    position = body + size
    name, body, size = _element(data, position)
    if name != _SEGMENT:
        raise _damaged("a Matroska file without its segment")
    position, end = body, len(data) if size is None else body + size
    cluster_end: int | None = 0  # None: the cluster has no stated end, as in live streams
    while position < end:
        if position == cluster_end:
            cluster_end = 0
        name, body, size = _element(data, position)
        in_cluster = cluster_end != 0 and name in _IN_CLUSTER
        stop = end if size is None else body + size
        if stop > (cluster_end if in_cluster and cluster_end else end) or stop > len(data):
            raise _damaged("the file is cut off")
        if not in_cluster and (cluster_end or name not in _IN_SEGMENT):
            raise _damaged("an element is out of place")
        if data[body : body + 2] == b"\xbf\x84" and name in _IN_SEGMENT:  # a CRC-32 of what follows comes first
            (stated,) = struct.unpack_from("<I", data, body + 2)
            if zlib.crc32(memoryview(data)[body + 6 : stop]) != stated:
                raise _damaged("a checksum is wrong")
        if name == _CLUSTER:
            position, cluster_end = body, None if size is None else stop
        elif size is None:
            raise _damaged("an element without an end")
        else:
            position = stop


def _element(data: bytes, position: int) -> tuple[int, int, int | None]:
    """Return the name of the element at `position`, where its content starts, and the content's size, if stated."""
    if position + 2 > len(data):
        raise _damaged("the file is cut off")
    length = 9 - data[position].bit_length()
    name = int.from_bytes(data[position : position + length])
    position += length
    first = data[position : position + 1]
    if length > 4 or not first or not first[0]:
        raise _damaged("an element's header is impossible")
    length = 9 - first[0].bit_length()
    size = int.from_bytes(data[position : position + length]) & ((1 << 7 * length) - 1)
    return name, position + length, None if size == (1 << 7 * length) - 1 else size
