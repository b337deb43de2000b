"""What a picture's bytes say about themselves, before any decoder is trusted with them.

Sizes and orientation come from our own reading of the headers, so that the planner and the decoder agree, limits hold
before memory is taken, and damage that decoders pass over (a PNG checksum, a cut JPEG) is seen when a shard is indexed.
"""

import struct
import zlib
from dataclasses import dataclass

from dstrain.data.reasons import BadSample, Reason

MAX_IMAGE_BYTES = 1 << 26  # 64 MiB
MAX_IMAGE_PIXELS = 1 << 26  # 8192 x 8192: about 200 MB as RGB
MAX_IMAGE_SIDE = 1 << 15
MAX_JPEG_SCANS = 100  # each goes over the whole picture; progressive encoders write about ten

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG frame headers; the three are tables
_DECODED_SOF = frozenset({0xC0, 0xC1, 0xC2})  # sequential and progressive with Huffman codes
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # JPEG markers without a length
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange width and height


@dataclass(frozen=True, slots=True)
class Header:
    """A picture's format ("PNG", "JPEG" or "WEBP"), stored size in pixels and EXIF orientation (1 to 8).

    components: of a JPEG, 4 if it is stored as the inks of CMYK; 3 for other formats.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    components: int = 3

    @property
    def turned(self) -> bool:
        """Whether the orientation exchanges width and height."""
        return self.orientation in _TURNED

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as the picture is meant to be seen."""
        return (self.height, self.width) if self.turned else (self.width, self.height)


def probe(data: bytes) -> Header:
    """Read the header of a PNG, JPEG or WEBP file.

    Raises BadSample for another format, damage that the file's structure shows, or a size over the limits.
    """
    check_bytes(len(data))
    try:
        header = _read(data)
    except (struct.error, IndexError) as error:
        raise _damaged("the header is cut off") from error
    if header.width < 1 or header.height < 1:
        raise _damaged(f"a picture of {header.width} x {header.height} pixels")
    if header.width * header.height > MAX_IMAGE_PIXELS or max(header.size) > MAX_IMAGE_SIDE:
        raise BadSample(
            Reason.IMAGE_TOO_LARGE,
            f"{header.width} x {header.height} pixels, more than {MAX_IMAGE_PIXELS} or a side over {MAX_IMAGE_SIDE}",
        )
    return header


def check_bytes(size: int) -> None:
    """Raise BadSample if a picture file of `size` bytes is too large to be read."""
    if size > MAX_IMAGE_BYTES:
        raise BadSample(Reason.IMAGE_TOO_LARGE, f"{size} bytes, more than {MAX_IMAGE_BYTES}")


def _read(data: bytes) -> Header:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    raise BadSample(Reason.IMAGE_FORMAT, "neither PNG, JPEG nor WEBP" if data else "an empty file")


def _damaged(what: str) -> BadSample:
    return BadSample(Reason.IMAGE_DAMAGED, what)


def _png(data: bytes) -> Header:
    """Walk the chunks (PNG specification, section 5), checking the CRC of each."""
    if data[8:16] != b"\0\0\0\rIHDR":
        raise _damaged("a PNG without its IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    view = memoryview(data)
    orientation, pixels, position = 1, False, 8
    while True:
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 8 + length
        (stated,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[position + 4 : end]) != stated:
            raise _damaged(f"the checksum of PNG chunk {kind!r} is wrong")
        if kind == b"eXIf":
            orientation = _orientation(data[position + 8 : end])
        pixels = pixels or kind == b"IDAT"
        position = end + 4
        if kind == b"IEND":
            break
    if not pixels:
        raise _damaged("a PNG without pixels")
    return Header("PNG", width, height, orientation)


def _jpeg(data: bytes) -> Header:
    """Walk the segments up to the first scan (ITU-T T.81, annex B)."""
    size: tuple[int, int] | None = None
    orientation, components, position = 0, 0, 2
    while True:
        if data[position] != 0xFF:
            raise _damaged("a JPEG segment does not start with a marker")
        while data[position] == 0xFF:  # any number of fill bytes may precede a marker
            position += 1
        marker = data[position]
        position += 1
        if marker in _BARE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if marker in _SOF:
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 2)
            if marker not in _DECODED_SOF or bits != 8:
                raise BadSample(Reason.IMAGE_FORMAT, f"a JPEG of a rare kind (marker {marker:02X}, {bits} bits)")
            size = (width, height)
        elif marker == 0xE1 and not orientation and data[position + 2 : position + 8] == b"Exif\0\0":
            orientation = _orientation(data[position + 8 : position + length])
        elif marker == 0xDA:
            break
        if length < 2 or marker == 0xD9:
            raise _damaged("a JPEG segment of impossible length, or a JPEG without pixels")
        position += length
    if size is None:
        raise _damaged("a JPEG without its frame header")
    if data.find(b"\xff\xd9", position) < 0:
        raise _damaged("the JPEG is cut off")
    if data.count(b"\xff\xda", position) > MAX_JPEG_SCANS:
        raise BadSample(Reason.IMAGE_TOO_LARGE, f"a JPEG of more than {MAX_JPEG_SCANS} scans")
    return Header("JPEG", *size, orientation or 1, components)


def _webp(data: bytes) -> Header:
    """Walk the RIFF chunks (WebP container specification)."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise _damaged("the WEBP is cut off")
    size: tuple[int, int] | None = None
    orientation, position = 1, 12
    while position + 8 <= end:
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        body = data[position + 8 : position + 8 + length]
        if len(body) < length:
            raise _damaged("the WEBP is cut off")
        if kind == b"VP8X":
            size = (1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"))
        elif kind == b"VP8 " and size is None and body[3:6] == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", body, 6)
            size = (width & 0x3FFF, height & 0x3FFF)
        elif kind == b"VP8L" and size is None and body[:1] == b"\x2f":
            bits = int.from_bytes(body[1:5], "little")
            size = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        elif kind == b"EXIF":
            orientation = _orientation(body.removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    if size is None:
        raise _damaged("a WEBP without pixels")
    return Header("WEBP", *size, orientation)


def _orientation(exif: bytes) -> int:
    """Find tag 0x0112 in the first directory of an EXIF block; 1 (upright) if there is none to be trusted."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
