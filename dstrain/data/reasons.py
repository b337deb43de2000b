"""Why a sample cannot be used: one vocabulary for packing, indexing, decoding and the quarantine file."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

from dstrain.errors import DataError


class Reason(StrEnum):
    """Code of a refusal, as reports and quarantine files show it."""

    NO_IMAGE = "no_image"  # a sample lacks a picture or video that the training wants
    NO_CAPTION = "no_caption"  # no caption member, or JSON without a caption string
    EMPTY_CAPTION = "empty_caption"
    CAPTION_ENCODING = "caption_encoding"  # not UTF-8, or with NUL characters
    CAPTION_TOO_LONG = "caption_too_long"
    AMBIGUOUS = "ambiguous"  # one key with two pictures, one member twice, or a key that comes again later
    UNSAFE_NAME = "unsafe_name"  # absolute, or leaves the folder by ".."
    NOT_A_FILE = "not_a_file"  # link, device, sparse file
    MISSING_FILE = "missing_file"
    IMAGE_FORMAT = "image_format"  # neither PNG, JPEG nor WEBP
    IMAGE_DAMAGED = "image_damaged"  # truncated, bad checksum, impossible header
    IMAGE_TOO_LARGE = "image_too_large"  # over the byte or pixel limit
    IMAGE_TOO_SMALL = "image_too_small"  # under the least size, or a side under 16 pixels after downscaling
    VIDEO_FORMAT = "video_format"  # not a container or codec that is read
    VIDEO_DAMAGED = "video_damaged"
    VIDEO_TOO_LARGE = "video_too_large"  # over the byte, pixel or frame limit
    VIDEO_TOO_SHORT = "video_too_short"
    ENCODED_DAMAGED = "encoded_damaged"  # no safetensors file of the form that `dstrain encode` writes, or not finite
    ENCODED_SIZE = "encoded_size"  # over the byte limit, or encoded at a size that the training does not take
    CHANGED = "changed"  # the bytes in the shard are no longer those that were indexed


class BadSample(DataError):
    """One sample cannot be used; `reason` is its code and the message says more."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def ranked(reasons: Iterable[Reason]) -> str:
    """Return the reasons with their counts, most frequent first: "no_caption 12, image_damaged 3"."""
    counts = sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in counts)
