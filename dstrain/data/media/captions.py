"""Captions from the bytes of a member."""

import json
from typing import Any

from dstrain.data.reasons import BadSample, Reason

MAX_CAPTION_BYTES = 1 << 16  # text encoders cut at about 1,000 tokens
MAX_JSON_BYTES = 1 << 20  # of a member: several captions, and whatever else was noted about a picture
_JSON_FIELDS = ("caption", "text", "prompt")


def captions_of(data: bytes, kind: str) -> list[str]:
    """Return the captions in a member of kind "txt" (exactly one) or "json", each without surrounding white space.

    JSON must be an object with a string or a list of strings under "caption", "text" or "prompt" (the first of them
    that is there counts); empty entries of a list are passed over.
    Raises BadSample if there is none, or it is empty, too long or not UTF-8.
    """
    check_length(len(data), MAX_JSON_BYTES if kind == "json" else MAX_CAPTION_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(Reason.CAPTION_ENCODING, f"the caption is not UTF-8: {error.reason}") from error
    if kind != "json":
        return [clean(text)]
    return clean_all(_from_json(text))


def clean_all(texts: list[str]) -> list[str]:
    """Clean each text, passing over blank ones; raises BadSample as `clean` does, also if all are blank."""
    return [clean(text) for text in texts if not is_blank(text)] or [clean("")]


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


def check_length(size: int, limit: int = MAX_CAPTION_BYTES) -> None:
    """Raise BadSample if a caption (or a JSON member) of `size` bytes is too long to be read."""
    if size > limit:
        raise BadSample(Reason.CAPTION_TOO_LONG, f"{size} bytes of caption, more than {limit}")


def is_blank(text: str) -> bool:
    """Whether nothing can be seen in a text."""
    return not text.replace("\ufeff", "").strip()


def _from_json(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.NO_CAPTION, "the JSON cannot be parsed") from error
    fields = value if isinstance(value, dict) else {}
    caption = next((fields[name] for name in _JSON_FIELDS if name in fields), None)
    captions: list[Any] = caption if isinstance(caption, list) else [caption]
    if not all(isinstance(entry, str) for entry in captions):
        raise BadSample(Reason.NO_CAPTION, f"the JSON has no string or strings under {', '.join(_JSON_FIELDS)}")
    return captions
