"""Take secrets out of a config before it is shown to anyone."""

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_SECRET_NAME = re.compile(r"token(?!iz)|key|secret|passw|credential", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST_SECRET = 8  # shorter environment values ("1", "true") would mask half of the config


def redact(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return a plain copy of `config` (numbers, strings, lists, dicts) with `***` in place of secrets.

    A secret is the value of a key that is named like one (token, key, secret, password, credential), the user part
    of a URL, and any text that holds the value of an environment variable named like one. Counts of tokens stay.
    """
    planted = {value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET}

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): clean(str(k), v) for k, v in value.items()}
        is_count = "tokens" in name.lower() and isinstance(value, int | float)
        if value is not None and _SECRET_NAME.search(name) and not is_count:
            return MASK
        if isinstance(value, list | tuple):
            return [clean("", item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        text = _USER_INFO.sub(MASK, str(value))
        for secret in planted:
            text = text.replace(secret, MASK)
        return text

    return {str(name): clean(str(name), value) for name, value in config.items()}
