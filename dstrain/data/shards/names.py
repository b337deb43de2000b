"""What the name of a member says: the sample that it belongs to, its column there, and how it is read.

As in WebDataset, the key is the path up to the first dot of its last part and the extension is the rest. Names are
labels: nothing is opened by them, and neither `~`, `$HOME` nor braces in them mean anything.
"""

from enum import IntEnum
from functools import lru_cache

IMAGE_KINDS = ("png", "jpg", "jpeg", "webp")
VIDEO_KINDS = ("mp4", "m4v", "mov", "webm", "mkv")
ENCODED = "encoded.safetensors"  # extension and column of what encoders made of a sample, see `media.encoded`
UNREAD_IMAGE_KINDS = frozenset("gif tif tiff bmp avif heic heif jp2 jxl svg psd ppm".split())
UNREAD_VIDEO_KINDS = frozenset("avi mpg mpeg wmv flv ogv 3gp".split())


class Content(IntEnum):
    """How a member is read; the number is what an index stores."""

    OPAQUE = 0  # bytes that are never looked into
    IMAGE = 1
    VIDEO = 2
    TXT = 3  # one caption
    JSON = 4  # an object with captions, perhaps
    ENCODED = 5  # tensors


CAPTIONS = (Content.TXT, Content.JSON)  # in order of preference


def split(name: str) -> tuple[str, str] | None:
    """Return (key, lower-cased extension) of a member; None if it belongs to no sample.

    Those are what WebDataset passes over too: names that start with "__" or have no extension; and hidden files in any
    folder, such as macOS leaves in archives, which WebDataset takes for samples of their own.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or not extension or name.startswith("__"):
        return None
    return folder + slash + stem, extension.lower()


@lru_cache(maxsize=1024)
def column_of(extension: str) -> tuple[str, Content]:
    """Return the column of a member with this extension, and how it is read.

    "png" is column "image", "mp4" column "video", "edit_image.0.png" column "edit_image.0"; others are named like the
    extension, and opaque unless it is "txt", "json" or "encoded.safetensors". Column "image" holds pictures only,
    "video" videos only: "image.mp4" and "video.png" are columns of their own.
    """
    name, _, last = extension.rpartition(".")
    content = Content.IMAGE if last in IMAGE_KINDS else Content.VIDEO if last in VIDEO_KINDS else Content.OPAQUE
    if content is not Content.OPAQUE:
        own = content.name.lower()
        return (extension if name in ("image", "video") and name != own else name or own), content
    known = {"txt": Content.TXT, "json": Content.JSON, ENCODED: Content.ENCODED}
    return extension, known.get(extension, Content.OPAQUE)


def is_safe(name: str) -> bool:
    """Whether a member's name stays inside the folder that a careless program would unpack it to."""
    return not name.startswith("/") and ".." not in name.split("/")
