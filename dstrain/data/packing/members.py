"""From what an item holds to the members of a sample: proved good, re-encoded if asked, and named."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dstrain.data.media.decode import load_rgb
from dstrain.data.media.encoded import decode_encoded
from dstrain.data.media.probe import probe
from dstrain.data.media.resolution import MULTIPLE
from dstrain.data.packing.items import Item, Piece
from dstrain.data.packing.reencode import FORMATS, Reencode
from dstrain.data.packing.writer import MAX_NAME
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards.names import Content

_SLUG_LENGTH = 60
_EXTENSIONS = {name: extension for extension, name in FORMATS.items()}
_SEEN = (Content.IMAGE, Content.VIDEO)
_MAIN = {"image": Content.IMAGE, "video": Content.VIDEO}  # columns whose members need no name before the extension


@dataclass(frozen=True, slots=True)
class Packed:
    """What goes into a shard: `members` by extension, in order."""

    key: str
    members: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the members."""
        return sum(map(len, self.members.values()))


def prepare(number: int, item: Item, reencode: Reencode | None) -> Packed:
    """Read an item, decode its pictures and probe its videos once; raises BadSample if one cannot be trained on."""
    label, parts = item.read()
    several = sum(part.content in _SEEN for part in parts) > 1
    members: dict[str, bytes] = {}
    for part in parts:
        try:
            extension, data = _member(part, reencode)
        except BadSample as error:
            raise BadSample(error.reason, f"{part.column}: {error}" if several else str(error)) from error
        if extension in members:
            raise BadSample(Reason.AMBIGUOUS, f"two members would be called {extension}")
        members[extension] = data
    return Packed(sample_key(number, label, members), members)


def _member(part: Piece, reencode: Reencode | None) -> tuple[str, bytes]:
    if part.content is Content.ENCODED:
        decode_encoded(part.data)
    if part.content not in _SEEN:
        return part.column, part.data
    content, kind, data = part.content, "", part.data
    if content is Content.VIDEO and not _is_picture(data):
        from dstrain.data.media.video import probe_video  # PyAV is loaded only where there are videos

        video = probe_video(data)
        kind, width, height = _container(data), video.width, video.height
    else:
        content, header = Content.IMAGE, probe(data)
        if reencode is None:
            load_rgb(data, header)
        else:
            data = reencode(data, header)
            header = probe(data)
        kind, (width, height) = _EXTENSIONS[header.format], header.size
    if min(width, height) < MULTIPLE:
        raise BadSample(Reason.IMAGE_TOO_SMALL, f"{width} x {height} pixels, a side under {MULTIPLE}")
    return kind if _MAIN.get(part.column) is content else f"{part.column}.{kind}", data


def _is_picture(data: bytes) -> bool:
    return data.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _container(data: bytes) -> str:
    """Return the extension that fits a video's first bytes (RFC 8794; ISO 14496-12; QuickTime file format)."""
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "webm" if b"webm" in data[:64] else "mkv"
    return "mp4" if data[4:8] == b"ftyp" and data[8:12] != b"qt  " else "mov"


def sample_key(number: int, label: str, members: Mapping[str, bytes]) -> str:
    """Name a sample so that keys are apart and in order, and every member's name fits a plain tar header."""
    start = f"{number:08d}"
    room = MAX_NAME - len(start) - len("-.") - max(len(extension.encode()) for extension in members)
    if room < 0:
        longest = max(members, key=len)
        raise BadSample(Reason.UNSAFE_NAME, f"the extension {longest:.40} is too long for a plain tar header")
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", label).strip("-")
    return f"{start}-{slug[-min(_SLUG_LENGTH, room) :]}" if slug and room else start
