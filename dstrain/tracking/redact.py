"""Take secrets out of what is shown to anyone: configs, checkpoints' manifests, log lines, tracebacks."""

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from dstrain.errors import printable

MASK = "***"
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of snake_case, camelCase and CAPITALS
_SECRET_ENDS = (
    *("token", "tokens", "key", "keys", "secret", "secrets", "password", "passwords", "passwd", "passphrase"),
    *("credential", "credentials", "authorization"),
)
_PLACES = ("file", "path", "dir")  # last words of names of variables that say where a secret is, not what it is
_SHORTEST_SECRET = 8  # shorter environment values ("1", "true") would mask half of the config
# What is masked in any text is the group `secret`.
_IN_TEXT = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"(?<=://)(?P<secret>[^/\s?#'\"]+)(?=@)",  # the user part of a URL
        r"[?&;#](?i:[\w.-]*(?:signature|token|secret|passw|credential|key|auth)[\w.-]*|sig)="
        r"(?P<secret>[^&;#\s\"'<>]+)",  # a signed URL's query
        r"(?i:(?:api|access|secret|private|auth|session|hub|hf)[_-]?(?:key|token)|password|passwd|passphrase|secret)"
        r"[\"']?\s*[=:]\s*[\"']?(?P<secret>[^\s\"',;&)}\]]+)",  # an assignment, as in a repr or a header
        r"\b[A-Z0-9_]+_(?:TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS)=[\"']?(?P<secret>[^\s\"']+)",  # a variable's
        r"(?i:bearer|basic)\s+(?P<secret>[\w.~+/-]{16,}=*)",
        r"\b(?P<secret>hf_\w{16,}|gh[pousr]_\w{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16})",  # tokens known by their form
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?P<secret>.*?)(?:-----END|\Z)",
    )
]


def redact(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return a plain copy of `config` (numbers, strings, lists, dicts) with `***` in place of secrets.

    A secret is the value of a key that is named like one (token, key, secret, password, credential), and in any text
    what `redact_text` finds. Counts of tokens stay.
    """
    planted = _planted(environ)

    def clean(name: str, value: Any) -> Any:
        is_count = isinstance(value, bool) or (isinstance(value, int | float) and "token" in name.lower())
        if value is not None and not is_count and _is_secret(name):
            return MASK
        if isinstance(value, Mapping):
            return {str(k): clean(str(k), v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean("", item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return _clean_text(str(value), planted)

    return {str(name): clean(str(name), value) for name, value in config.items()}


def redact_text(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return `text` with `***` in place of secrets.

    These are the values of environment variables that are named like secrets, the user parts and signatures of URLs,
    what is assigned to a name like api_key or password, private keys, and tokens known by their form.
    """
    return _clean_text(text, _planted(environ))


def mask_output() -> None:
    """Mask secrets in every log record of this process, whoever logs, and in the traceback of what ends it or a thread.

    Records are masked as they are made, since libraries bring handlers of their own. What a terminal would obey is
    written out.
    """
    make = logging.getLogRecordFactory()

    def masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # a message that does not fit its arguments, which logging would print both of
            message = f"{record.msg} {record.args}"
        record.msg, record.args = printable(redact_text(message), "\n\t"), ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redact_text("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        if record.stack_info:
            record.stack_info = redact_text(record.stack_info)
        return record

    def uncaught(kind: Any, error: Any, trace: Any) -> None:
        sys.stderr.write(redact_text("".join(traceback.format_exception(kind, error, trace))))

    logging.setLogRecordFactory(masked)
    sys.excepthook = uncaught
    threading.excepthook = lambda args: uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _is_secret(name: str) -> bool:
    return any(word.lower().endswith(_SECRET_ENDS) for word in _WORDS.findall(name))


def _planted(environ: Mapping[str, str]) -> list[str]:
    """Return the secrets of the environment as they may stand in a text, the longest first."""
    values = {
        value
        for name, value in environ.items()
        if len(value) >= _SHORTEST_SECRET and _is_secret(name) and not name.lower().endswith(_PLACES)
    }
    ways = (str, lambda v: quote(v, safe=""), lambda v: json.dumps(v)[1:-1], lambda v: repr(v)[1:-1])
    return sorted({way(value) for value in values for way in ways}, key=len, reverse=True)


def _clean_text(text: str, planted: list[str]) -> str:
    for secret in planted:
        text = text.replace(secret, MASK)
    for pattern in _IN_TEXT:
        text = pattern.sub(_hide, text)
    return text


def _hide(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in match.span("secret"))
    return f"{match[0][:start]}{MASK}{match[0][end:]}"
