"""Files behind URLs: which URLs are taken, what a remote folder holds, and the bytes, all through fsspec.

The libraries raise errors of as many kinds as there are stores; all of them become `Unreachable` here, and no password,
token or signature that a URL carries gets into a message.
"""

import logging
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dstrain.errors import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "hf", "http", "https")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
_WEB = ("http", "https")
_CHUNK = 1 << 24  # bytes; 16 MiB keep a range request busy for far longer than its round trip
_PAUSES_S = (1.0, 4.0)  # before the second and the third try
_STALL_S = 60.0  # without a byte
_MAX_CAUSE = 300  # characters of a library's message

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::.*://)")  # "a::b://..." is how fsspec chains file systems
_CHAINED = re.compile(r"::[A-Za-z0-9+.-]*://")
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(https?://[^\s?#]*)[?#][^\s'\"<>]*")

T = TypeVar("T")


class Unreachable(DataError):
    """A remote file cannot be read.

    missing: it is not there, or not for who asks. passing: another try may help.
    """

    def __init__(self, message: str, missing: bool = False, passing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.passing = passing


def is_remote(location: str) -> bool:
    """Tell URLs (s3, gs, hf, http, https) from local paths. Raises DataError for a URL of any other kind."""
    match = _SCHEME.match(location)
    if match is None:
        return False
    scheme, mark = match.groups()
    if mark != "://" or _CHAINED.search(location):
        raise DataError(f"{masked(location)!r} chains file systems with '::'; give the plain URL of a tar file")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise DataError(f"{masked(location)!r} is not read: URLs begin with {known}; local paths have no scheme")
    return True


def list_remote(url: str) -> list[str]:
    """Return the URLs of the tar files in a remote folder, or that a glob matches, sorted; a tar file is itself.

    Raises DataError if there are none, or for a folder or glob of a web server, which has no listing.
    """
    assert is_remote(url)
    scheme, _, path = url.partition("://")
    if scheme in _WEB:
        parts = urlsplit(url)
        if set("*[") & set(parts.path) or not (parts.path.endswith(".tar") or parts.query):
            raise DataError(
                f"{masked(url)!r} is not one tar file, and web servers have no listing; name the shards by numbers, "
                "as in https://host/shard-{000000..000012}.tar"
            )
        return [url]
    magic = bool(set("*?[") & set(path))
    if path.endswith(".tar") and not magic:
        return [url]

    def listing() -> list[str]:
        with _explained(url):
            files, _ = _connect(url)
            files.invalidate_cache()  # a listing kept from before may lack what was uploaded since
            found = files.glob(path, detail=True).values() if magic else files.ls(path.rstrip("/"), detail=True)
            return [entry["name"].lstrip("/") for entry in found if entry["type"] == "file"]

    names = [name for name in retried(listing) if name.endswith(".tar") and not name.split("/")[-1].startswith(".")]
    if not names:
        raise DataError(f"{masked(url)!r} has no .tar files; check the address")
    return [f"{scheme}://{name}" for name in sorted(set(names))]


def size_of(url: str) -> int | None:
    """Return the size of a remote file in bytes, None if the server does not tell it. Raises Unreachable."""
    with _explained(url):
        files, path = _connect(url)
        size = files.info(path)["size"]
        return None if size is None else int(size)


def chunks(url: str) -> Generator[bytes, None, None]:
    """Yield the bytes of a remote file, at most 16 MiB at a time. Raises Unreachable."""
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"block_size": _CHUNK, "cache_type": "none"}  # one range after another
    if scheme == "hf":
        options = {"block_size": 0}  # one request for the whole file
    elif scheme in _WEB:
        options = {"block_size": 0, "size": 1}  # any size but None spares a request that asks for it
    with _explained(url):
        files, path = _connect(url)
        with files.open(path, "rb", **options) as file:
            while chunk := file.read(_CHUNK):
                yield chunk


def read_start(url: str, limit: int) -> bytes:
    """Return the bytes of a small remote file, or its first `limit + 1` if it is larger. Raises Unreachable."""
    data = bytearray()
    with closing(chunks(url)) as stream:
        while len(data) <= limit and (chunk := next(stream, b"")):
            data += chunk
    return bytes(data[: limit + 1])


def retried(action: Callable[[], T]) -> T:
    """Return what `action` does, trying up to three times while it fails for reasons that may pass."""
    for pause in _PAUSES_S:
        try:
            return action()
        except Unreachable as error:
            if not error.passing:
                raise
            log.warning("%s; trying again in %g s", error, pause)
            time.sleep(pause)
    return action()


def masked(text: str) -> str:
    """Return `text` with *** for what its URLs hold before the host, and for their query strings."""
    return _QUERY.sub(r"\1?***", _USER_INFO.sub("***@", text))


def _connect(url: str) -> "tuple[AbstractFileSystem, str]":
    """Return the file system of a URL, and the name of the file in it; fsspec keeps one for each process."""
    assert is_remote(url)
    scheme, _, path = url.partition("://")
    try:
        import fsspec

        if scheme == "hf":
            for name in ("httpx", "httpx2"):  # they log every request, with the signatures of where it is sent on to
                logging.getLogger(name).setLevel(logging.WARNING)
        if scheme not in _WEB:
            return fsspec.filesystem(scheme), path
        import aiohttp

        client = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_STALL_S),  # default: 5 min in all
            "trust_env": True,  # HTTPS_PROXY: compute nodes often have no other way out
            "read_bufsize": 1 << 20,
        }
        # A URL that is quoted already stays as it is: quoted otherwise, its signature would not hold.
        quoted = "%" in url
        headers = {"Accept-Encoding": "identity"}
        return fsspec.filesystem(scheme, client_kwargs=client, headers=headers, encoded=quoted), url
    except ImportError as error:
        raise DataError(
            f"{masked(url)} needs the package {_PACKAGES[scheme]} ({error}); pip install 'dstrain[remote]'"
        ) from None


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn whatever the libraries raise into Unreachable, without the traceback, which would hold the whole URL."""
    try:
        yield
    except DataError:
        raise
    except Exception as raised:
        error: BaseException = raised
        if isinstance(raised, FileNotFoundError) and raised.__cause__ is not None:
            error = raised.__cause__  # fsspec says "not found" when a server refuses to tell the size
        status = _status(error)
        missing = status in (401, 403, 404, 410) or (
            status is None and isinstance(raised, FileNotFoundError | PermissionError)
        )
        passing = not missing and (status is None or status >= 500 or status in (408, 425, 429))
        text = " ".join(masked(str(error).replace(url, masked(url))).split())[:_MAX_CAUSE]
        cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
        advice = "check the address and the credentials" if missing else "check the network"
        raise Unreachable(f"{masked(url)} cannot be read ({cause}); {advice}", missing, passing) from None


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of aiohttp, httpx, gcsfs or botocore carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None
