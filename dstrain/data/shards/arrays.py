"""The arrays of a shard's index: what is in them, what they say of whole columns, and whether they can be true."""

from dataclasses import dataclass

import numpy as np

from dstrain.data.media.captions import MAX_JSON_BYTES
from dstrain.data.media.containers import MAX_VIDEO_BYTES
from dstrain.data.media.encoded import MAX_ENCODED_BYTES
from dstrain.data.media.probe import MAX_IMAGE_BYTES, MAX_IMAGE_SIDE
from dstrain.data.shards.names import CAPTIONS, Content

MAX_COLUMNS = 256  # of a shard; more is a sign that dots in names were taken for extensions
_NONE = 1 << 62  # least of nothing; a column has at least one row

ROW = np.dtype(
    [
        ("first", "<u4"),  # the sample's members are parts[first : first + count]
        ("count", "<u4"),
        ("caption", "<i4"),  # the part with the caption, -1 if there is none
        ("caption_bytes", "<i4"),  # UTF-8 bytes of the longest caption in it
    ]
)
PART = np.dtype(
    [
        ("offset", "<i8"),  # bytes from the start of the tar
        ("size", "<i8"),
        ("digest", "<u8"),  # xxh3_64, checked at every read
        ("width", "<i4"),  # pixels, as the picture or video is meant to be seen, or was encoded; 0 for other members
        ("height", "<i4"),
        ("frames", "<i4"),  # 1 for pictures
        ("fps", "<f4"),  # of videos
        ("column", "<u2"),  # place in ShardIndex.columns
        ("kind", "<u2"),  # Content
        ("pad", "<u4"),
    ]
)


@dataclass(frozen=True)
class ColumnStats:
    """The rows of a shard that have a column: how many, and the extremes of their sizes (pixels; 0 if opaque)."""

    rows: int
    min_side: int
    min_pixels: int
    max_pixels: int
    min_frames: int
    max_frames: int


def column_stats(columns: tuple[str, ...], parts: np.ndarray) -> dict[str, ColumnStats]:
    """Describe each column; `parts` has dtype PART."""
    found = {}
    for number, name in enumerate(columns):
        mine = parts["column"] == number
        width, height, frames = (parts[side][mine].astype(np.int64) for side in ("width", "height", "frames"))
        short, pixels = np.minimum(width, height), width * height
        found[name] = ColumnStats(
            rows=len(frames),
            min_side=int(short.min(initial=_NONE)),
            min_pixels=int(pixels.min(initial=_NONE)),
            max_pixels=int(pixels.max(initial=0)),
            min_frames=int(frames.min(initial=_NONE)),
            max_frames=int(frames.max(initial=0)),
        )
    return found


def fault(rows: np.ndarray, parts: np.ndarray, columns: int, tar_size: int) -> str:
    """Say what in the rows and parts of a tar of `tar_size` bytes with so many columns cannot be; "" if all can."""
    return _row_fault(rows, parts) or _part_fault(parts, columns, tar_size) or _pair_fault(rows, parts)


def _row_fault(rows: np.ndarray, parts: np.ndarray) -> str:
    ends = np.cumsum(rows["count"], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if np.any(rows["count"] < 1) or np.any(rows["first"] != ends - rows["count"]) or total != len(parts):
        return "its rows do not share out its members"
    has = rows["caption_bytes"] > 0
    inside = (rows["caption"] >= rows["first"]) & (rows["caption"] < ends)
    if np.any(has & ~inside) or np.any((rows["caption"][~has] != -1) | (rows["caption_bytes"][~has] != 0)):
        return "a caption lies outside its row"
    return ""


def _part_fault(parts: np.ndarray, columns: int, tar_size: int) -> str:
    if np.any((parts["offset"] < 0) | (parts["size"] < 0) | (parts["offset"] > tar_size - parts["size"])):
        return "a member lies outside the shard"
    if np.any((parts["column"] >= columns) | (parts["kind"] > max(Content)) | (parts["pad"] != 0)):
        return "a member is of no kind"
    images, videos, encoded = (parts["kind"] == kind for kind in (Content.IMAGE, Content.VIDEO, Content.ENCODED))
    sized = images | videos | encoded
    sizes = np.stack([parts["width"], parts["height"], parts["frames"]])
    limits = np.where(sized, [[MAX_IMAGE_SIDE]] * 2 + [[(1 << 31) - 1]], 0)
    least = sized.astype(np.int32)
    if np.any((sizes < least) | (sizes > limits)) or np.any(parts["frames"][images] != 1):
        return "a picture or video has a size that cannot be"
    if np.any(parts["size"][images] > MAX_IMAGE_BYTES) or np.any(parts["size"][videos] > MAX_VIDEO_BYTES):
        return "a picture or video has more bytes than are read"
    if np.any(parts["size"][encoded] > MAX_ENCODED_BYTES):
        return "an encoded sample has more bytes than are read"
    if not np.all((parts["fps"] >= 0) & (parts["fps"] < 1e6)) or np.any(parts["fps"][~videos] != 0):
        return "a video has a frame rate that cannot be"
    return ""


def _pair_fault(rows: np.ndarray, parts: np.ndarray) -> str:
    captions = parts[rows["caption"][rows["caption_bytes"] > 0]]
    if not np.isin(captions["kind"], CAPTIONS).all() or np.any(captions["size"] > MAX_JSON_BYTES):
        return "a caption is not a text"
    places = np.repeat(np.arange(len(rows)), rows["count"]) * MAX_COLUMNS + parts["column"]
    return "" if len(np.unique(places)) == len(parts) else "a row has two members in one column"
