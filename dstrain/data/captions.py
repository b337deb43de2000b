"""Captions from the bytes of a member."""

import json

from dstrain.data.reasons import BadSample, Reason

MAX_CAPTION_BYTES = 1 << 16  # of the member; text encoders cut at about 1,000 tokens
CAPTION_KINDS = ("txt", "json")  # in order of preference; the place in this tuple is what an index stores
_JSON_FIELDS = ("caption", "text", "prompt")


def caption_of(data: bytes, kind: str) -> str:
    """Return the caption in a member of kind "txt" or "json", without surrounding white space.

    JSON must be an object with a string under "caption", "text" or "prompt" (the first of them counts).
    Raises BadSample if there is none, or it is empty, too long or not UTF-8.
    """
    check_length(len(data))
    try:
        text = data.decode("utf-8-sig")
        if kind == "json":
            text = _from_json(text)
    except UnicodeDecodeError as error:
        raise BadSample(Reason.CAPTION_ENCODING, f"the caption is not UTF-8: {error.reason}") from error
    return clean(text)


def clean(text: str) -> str:
    """Strip white space and byte order marks; raises BadSample if nothing is left, or it is too long or not UTF-8."""
    text = text.replace("\ufeff", "").strip()
    if not text:
        raise BadSample(Reason.EMPTY_CAPTION, "the caption is empty")
    if "\0" in text:
        raise BadSample(Reason.CAPTION_ENCODING, "the caption has NUL characters (UTF-16?)")
    try:
        check_length(len(text.encode()))
    except UnicodeEncodeError as error:  # JSON can spell lone surrogates
        raise BadSample(Reason.CAPTION_ENCODING, f"the caption is not UTF-8: {error.reason}") from error
    return text


def check_length(size: int) -> None:
    """Raise BadSample if a caption of `size` bytes is too long to be read."""
    if size > MAX_CAPTION_BYTES:
        raise BadSample(Reason.CAPTION_TOO_LONG, f"{size} bytes of caption, more than {MAX_CAPTION_BYTES}")


def _from_json(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.NO_CAPTION, "the JSON cannot be parsed") from error
    fields = value if isinstance(value, dict) else {}
    caption = next((fields[name] for name in _JSON_FIELDS if name in fields), None)
    if not isinstance(caption, str):
        raise BadSample(Reason.NO_CAPTION, f"the JSON has no string under {', '.join(_JSON_FIELDS)}")
    return caption
