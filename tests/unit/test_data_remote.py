"""Remote shards through fsspec and the node's cache, against a real web server on this host that can fail."""

import inspect
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import xxhash
from data_samples import sample_members, write_tar
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from dstrain.data.remote import bounded
from dstrain.data.remote import urls as remote
from dstrain.data.remote.bounded import BoundedFolder
from dstrain.data.remote.cache import Cache
from dstrain.data.remote.urls import is_remote, list_remote, masked, retried
from dstrain.data.shards.catalog import SIDECAR, open_index
from dstrain.errors import DataError
from dstrain.storage import locked

BIG = 1 << 40
fork = multiprocessing.get_context("fork")


class Web(ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `faults[path]` says how the next GETs of it fail, `pace` slows them down."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, list] = defaultdict(list)
        self.asked: Counter[tuple[str, str]] = Counter()
        self.requests: list[tuple[str, Message]] = []  # target, headers
        self.pace = 0.0
        self.sent = 0
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, path: str) -> int:
        return self.asked["GET", path]

    def handle_error(self, request, address) -> None:
        pass  # clients hang up in several tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.active += 1
            self.server.most_active = max(self.server.active, self.server.most_active)
        try:
            self.answer("GET")
        finally:
            with self.server.lock:
                self.server.active -= 1

    def answer(self, method: str) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.asked[method, path] += 1
            self.server.requests.append((self.path, self.headers))
            faults = self.server.faults[path if method == "GET" else f"{method} {path}"]
            fault = faults.pop(0) if faults else ""
        data = self.server.files.get(path)
        if isinstance(fault, int) or data is None:
            self.send_error(fault or 404)
            return
        if fault == "garble":
            data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
        self.send_response(200)
        if fault in ("unsized", "endless"):
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if method == "HEAD":
            return
        if fault in ("cut", "unsized"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
        elif fault == "endless":
            with suppress(OSError):
                while self.server.sent < 1 << 30:
                    self.server.sent += self.wfile.write(bytes(1 << 16))
        elif fault == "half":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(30)
        else:
            for start in range(0, len(data), 1 << 13):
                self.wfile.write(data[start : start + (1 << 13)])
                if self.server.pace:
                    self.wfile.flush()
                    time.sleep(self.server.pace)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "_PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(bounded, "_GRACE_S", 0.05)
    monkeypatch.setattr(bounded, "_POLL_S", 0.01)


@pytest.fixture
def s3(monkeypatch) -> MemoryFileSystem:
    monkeypatch.setitem(_registry, "s3", MemoryFileSystem)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return MemoryFileSystem()


def tar_and_index(folder: Path, name: str, count: int = 3, first: int = 0) -> tuple[bytes, bytes]:
    folder.mkdir(exist_ok=True)
    path = write_tar(folder / name, sample_members(count, first=first))
    open_index(path)
    return path.read_bytes(), path.with_name(name + SIDECAR).read_bytes()


def serve(web: Web, folder: Path, count: int) -> list[str]:
    """Put shards of different content, and their indexes, on the server; returns their URLs."""
    for number in range(count):
        tar, index = tar_and_index(folder, f"s-{number}.tar", first=number * 10)
        web.files |= {f"/s-{number}.tar": tar, f"/s-{number}.tar.index": index}
    return [f"{web.url}/s-{number}.tar" for number in range(count)]


def content(web: Web, url: str) -> bytes:
    return web.files[url.removeprefix(web.url)]


def age(*folders: Path, seconds: float = 100.0) -> None:
    then = time.time() - seconds
    for folder in folders:
        for path in folder.iterdir():
            os.utime(path, (then, then))


def parts(folder: Path) -> list[Path]:
    return [path for path in (folder / "shards").iterdir() if path.name.startswith(".")]


# Which locations are taken


@pytest.mark.parametrize("url", ["s3://b/x.tar", "gs://b/x", "hf://datasets/u/r/x.tar", "http://h/x", "https://h/x"])
def test_urls_are_remote(url):
    assert is_remote(url)


@pytest.mark.parametrize("path", ["x.tar", "/data/x.tar", "a::b.tar", "../x", "C:/x.tar", "data/s3://x", ""])
def test_paths_are_local(path):
    assert not is_remote(path)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/x.tar", "file:///etc/passwd", "memory://x.tar", "S3://b/x.tar", "local://x", "github://o:r@/x",
        "simplecache::s3://b/x.tar", "filecache::http://h/x", "zip://x.tar::s3://b/x.zip", "s3://b/x.zip::zip://x.tar",
        "http::s3://b/x", "tar://x::file:///etc/passwd",
    ],
)  # fmt: skip
def test_other_schemes_and_chains_are_refused(url):
    with pytest.raises(DataError, match=r"URLs begin with s3://, gs://, hf://, http://, https://|the plain URL"):
        is_remote(url)


def test_a_refusal_does_not_repeat_a_password():
    with pytest.raises(DataError) as caught:
        is_remote("ftp://me:secret@h/x.tar")
    assert "secret" not in str(caught.value) and "***@h/x.tar" in str(caught.value)


def test_masked_leaves_what_is_no_secret():
    assert masked("https://u:p@ss@h:1/a@b.tar?token=x#y is bad") == "https://***@h:1/a@b.tar?*** is bad"
    assert masked("s3://bucket/shard-??.tar") == "s3://bucket/shard-??.tar"
    assert masked("hf://datasets/u/r@main/x.tar") == "hf://datasets/u/r@main/x.tar"


# Listing


def test_a_folder_and_a_glob_of_a_bucket_are_listed(s3):
    for name in ("b.tar", "a.tar", "a.tar.index", ".hidden.tar", "notes.txt", "deep/c.tar"):
        s3.pipe(f"/bucket/data/{name}", b"x")
    assert list_remote("s3://bucket/data") == ["s3://bucket/data/a.tar", "s3://bucket/data/b.tar"]
    assert list_remote("s3://bucket/data/") == ["s3://bucket/data/a.tar", "s3://bucket/data/b.tar"]
    assert list_remote("s3://bucket/data/[b-z].*") == ["s3://bucket/data/b.tar"]
    assert list_remote("s3://bucket/**/?.tar") == [f"s3://bucket/data/{name}.tar" for name in ("a", "b", "deep/c")]
    assert list_remote("s3://bucket/any.tar") == ["s3://bucket/any.tar"]


@pytest.mark.parametrize("url", ["s3://bucket/none", "s3://bucket/empty", "s3://bucket/*.tar"])
def test_nothing_found_is_an_error(s3, url):
    s3.pipe("/bucket/empty/notes.txt", b"x")
    with pytest.raises(DataError, match="check the address"):
        list_remote(url)


@pytest.mark.parametrize("path", ["/data/", "/data", "/data/*.tar", "/s-[0-9].tar", "/"])
def test_web_servers_are_not_listed(web, path):
    with pytest.raises(DataError, match=r"\{000000\.\.000012\}"):
        list_remote(web.url + path)
    assert not web.requests


def test_one_file_of_a_web_server_is_itself():
    for url in ("http://[::1]:8/x.tar", "https://h/x.tar?sig=1", "https://h/get?id=1"):
        assert list_remote(url) == [url]


@pytest.mark.parametrize(
    ("url", "package"), [("s3://b/", "s3fs"), ("gs://b/", "gcsfs"), ("hf://d/", "huggingface_hub")]
)
def test_a_missing_package_is_named(monkeypatch, url, package):
    monkeypatch.delitem(_registry, url.partition(":")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package}.*pip install 'dstrain\[remote\]'"):
        list_remote(url)


def test_a_missing_aiohttp_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(DataError, match=r"aiohttp.*pip install 'dstrain\[remote\]'"):
        Cache(tmp_path, BIG).open_index("https://h/x.tar")


def test_the_hub_has_what_is_called():
    from huggingface_hub import HfFileSystem
    from huggingface_hub.hf_file_system import HfFileSystemStreamFile

    assert "hf" in HfFileSystem.protocol
    inspect.signature(HfFileSystem.ls).bind(None, "datasets/u/r", detail=True)
    inspect.signature(HfFileSystem.glob).bind(None, "datasets/u/r/*.tar", detail=True)
    inspect.signature(HfFileSystem.info).bind(None, "datasets/u/r/x.tar")
    inspect.signature(HfFileSystem.invalidate_cache).bind(None)
    inspect.signature(HfFileSystem._open).bind(None, "datasets/u/r/x.tar", mode="rb", block_size=0)
    assert inspect.signature(HfFileSystemStreamFile).parameters["block_size"].default == 0


def test_the_hubs_client_does_not_log_signed_urls(monkeypatch, caplog):
    monkeypatch.setitem(_registry, "hf", MemoryFileSystem)
    caplog.set_level(logging.INFO)
    with pytest.raises(DataError, match="check the address"):
        list_remote("hf://datasets/u/r")
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).info("HTTP Request: GET https://cdn/x?Signature=t0psecret")
    assert "t0psecret" not in caplog.text


# Indexes


def test_an_index_comes_without_its_shard(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    index = Cache(tmp_path / "cache", BIG).open_index(url)
    local = open_index(tmp_path / "src" / "s-0.tar")
    assert (index.size, index.digest, index.samples) == (local.size, local.digest, 3)
    assert list(index.keys) == list(local.keys) and index.parts.tobytes() == local.parts.tobytes()
    assert index.path.parent == tmp_path / "cache" / "shards" and not index.path.exists()
    assert index.path.name.endswith("-s-0.tar")
    assert web.gets("/s-0.tar") == 0 and web.gets("/s-0.tar.index") == 1


def test_ranks_that_start_together_ask_once_and_a_later_start_asks_again(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    Cache(tmp_path / "cache", BIG).open_index(url)
    Cache(tmp_path / "cache", BIG).open_index(url)
    assert web.gets("/s-0.tar.index") == 1
    age(tmp_path / "cache" / "indexes")
    Cache(tmp_path / "cache", BIG).open_index(url)
    Cache(tmp_path / "cache", BIG).open_index(url)
    assert web.gets("/s-0.tar.index") == 2


def test_many_indexes_come_in_order_and_at_once(web, tmp_path):
    urls = serve(web, tmp_path / "src", 12)
    web.pace = 0.02
    indexes = Cache(tmp_path / "cache", BIG).open_indexes(urls, threads=6)
    assert [index.keys[0] for index in indexes] == [f"{number * 10:04d}" for number in range(12)]
    assert 3 <= web.most_active <= 6


def test_one_index_that_fails_fails_them_all(web, tmp_path):
    urls = serve(web, tmp_path / "src", 3)
    with pytest.raises(DataError, match=r"/none\.tar cannot be read"):
        Cache(tmp_path / "cache", BIG).open_indexes([*urls, f"{web.url}/none.tar"])


@pytest.mark.parametrize("status", [404, 403, 401, 410])
def test_a_shard_without_an_index_is_fetched_and_indexed_once(web, tmp_path, status):
    (url,) = serve(web, tmp_path / "src", 1)
    web.faults["/s-0.tar.index"] = [status] * 2
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    assert index.digest == xxhash.xxh3_128_hexdigest(content(web, url)) and index.samples == 3
    assert store.fetch(index, url).read_bytes() == content(web, url)
    age(tmp_path / "cache" / "indexes")
    again = Cache(tmp_path / "cache", BIG).open_index(url)
    assert (again.path, again.digest) == (index.path, index.digest)
    assert web.gets("/s-0.tar") == 1 and web.gets("/s-0.tar.index") == 2
    assert not parts(tmp_path / "cache")


def test_a_shard_without_an_index_that_changed_size_is_indexed_again(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    del web.files["/s-0.tar.index"]
    store = Cache(tmp_path / "cache", BIG)
    assert store.open_index(url).samples == 3
    web.files["/s-0.tar"] = tar_and_index(tmp_path / "src", "other.tar", count=7)[0]
    age(tmp_path / "cache" / "indexes")
    assert store.open_index(url).samples == 7


def test_an_index_that_goes_and_comes_back_is_used_again(web, tmp_path, caplog):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    store.open_index(url)
    sidecar = web.files.pop("/s-0.tar.index")
    age(tmp_path / "cache" / "indexes")
    assert store.open_index(url).samples == 3
    web.files["/s-0.tar.index"] = sidecar
    age(tmp_path / "cache" / "indexes")
    assert store.open_index(url).samples == 3
    assert not caplog.records and not list((tmp_path / "cache" / "indexes").glob("*.here.index"))


def test_an_index_without_end_is_not_listened_to(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    web.faults["/s-0.tar.index"] = ["endless"]
    assert Cache(tmp_path / "cache", BIG).open_index(url).digest == xxhash.xxh3_128_hexdigest(content(web, url))
    assert web.sent < 1 << 27


def test_a_server_that_does_not_tell_sizes(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    web.faults["HEAD /s-0.tar"] = ["unsized"] * 3
    web.faults["/s-0.tar"] = ["unsized"]  # asked for the size alone
    index = Cache(tmp_path / "cache", BIG).open_index(url)
    assert Cache(tmp_path / "cache", BIG).fetch(index, url).read_bytes() == content(web, url)
    del web.files["/s-0.tar.index"]
    web.faults["/s-0.tar"] = ["unsized"]
    with pytest.raises(DataError, match=r"does not tell how large it is.*dstrain index"):
        Cache(tmp_path / "other", BIG).open_index(url)


def test_a_server_that_is_busy_when_asked_for_a_size_is_asked_again(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    web.faults["HEAD /s-0.tar"] = [503, 503]
    web.faults["/s-0.tar"] = [503, 503]
    assert Cache(tmp_path / "cache", BIG).open_index(url).samples == 3


def forged(sidecar: bytes, **fields: object) -> bytes:
    """Change the header of a sidecar, with a checksum that holds."""
    length = int.from_bytes(sidecar[16:20], "little")
    header = json.loads(sidecar[32 : 32 + length]) | fields
    text = json.dumps(header).encode().ljust(length)
    assert len(text) == length
    return sidecar[:24] + xxhash.xxh3_64(text).intdigest().to_bytes(8, "little") + text + sidecar[32 + length :]


def wrong_sidecars(folder: Path, right: bytes) -> dict[str, bytes]:
    other = tar_and_index(folder, "other.tar", count=5)[1]
    return {
        "of another shard": other,
        "a page": b"<html>not found</html>",
        "empty": b"",
        "cut": right[:-64],
        "damaged": right[:-20] + bytes([right[-20] ^ 1]) + right[-19:],
        "a path for a digest": forged(right, digest="../../../../../../tmp/" + "x" * 10),
        "huge": right + bytes(2 << 20),
    }


@pytest.mark.parametrize(
    "kind", ["of another shard", "a page", "empty", "cut", "damaged", "a path for a digest", "huge"]
)
def test_a_sidecar_that_does_not_belong_is_not_believed(web, tmp_path, caplog, kind):
    (url,) = serve(web, tmp_path / "src", 1)
    right = web.files["/s-0.tar.index"]
    web.files["/s-0.tar.index"] = wrong_sidecars(tmp_path / "src", right)[kind]
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    assert index.digest == xxhash.xxh3_128_hexdigest(content(web, url))
    assert list(index.keys) == ["0000", "0001", "0002"]
    assert store.fetch(index, url).read_bytes() == content(web, url)
    assert f"{url}.index does not belong to {url} " in caplog.text
    age(tmp_path / "cache" / "indexes")
    assert store.open_index(url).digest == index.digest
    assert web.gets("/s-0.tar") == 1
    web.files["/s-0.tar.index"] = right  # repaired
    caplog.clear()
    age(tmp_path / "cache" / "indexes")
    assert store.open_index(url).digest == index.digest
    assert not caplog.records and not list((tmp_path / "cache" / "indexes").glob("*.here.index"))


def test_a_shard_that_is_not_a_tar_is_named_by_its_url(web, tmp_path):
    web.files["/s-0.tar"] = b"<html>" * 1000
    with pytest.raises(DataError, match=rf"^{web.url}/s-0.tar is not a tar file"):
        Cache(tmp_path / "cache", BIG).open_index(f"{web.url}/s-0.tar")
    assert not list((tmp_path / "cache" / "shards").iterdir())


def test_a_query_stays_behind_the_name(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    signed = url + "?sig=a%2Fb%3D&id=7"
    index = store.open_index(signed)
    store.fetch(index, signed)
    assert {target for target, _ in web.requests} == {
        "/s-0.tar?sig=a%2Fb%3D&id=7",
        "/s-0.tar.index?sig=a%2Fb%3D&id=7",
    }
    assert index.path.name.endswith("-s-0.tar")


# Fetching


def test_a_shard_is_fetched_once(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    path = store.fetch(index, url)
    assert path == index.path and path.read_bytes() == content(web, url)
    assert Cache(tmp_path / "cache", BIG).fetch(index, url) == path
    assert web.gets("/s-0.tar") == 1 and not parts(tmp_path / "cache")
    path.unlink()  # evicted by another job
    assert store.fetch(index, url).read_bytes() == content(web, url)
    path.write_bytes(b"cut")  # by a crash of the node
    assert store.fetch(index, url).read_bytes() == content(web, url)
    assert web.gets("/s-0.tar") == 3


@pytest.mark.parametrize("faults", [["cut"], [500, 503], ["cut", 429], ["garble"], ["unsized"], [500, "garble", 500]])
def test_faults_that_pass_are_got_over(web, tmp_path, faults):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    web.faults["/s-0.tar"] = list(faults)
    assert store.fetch(index, url).read_bytes() == content(web, url)
    assert web.gets("/s-0.tar") == len(faults) + 1 and not parts(tmp_path / "cache")


@pytest.mark.parametrize(
    ("faults", "gets", "says"),
    [
        ([500] * 9, 3, "500"),
        (["cut"] * 9, 3, "PayloadError"),
        ([404] * 9, 1, "check the address"),
        ([403] * 9, 1, "credentials"),
        (["garble"] * 9, 2, "is not what its index describes: its xxh3_128 is"),
        (["unsized"] * 9, 2, "is not what its index describes: it does not have"),
        (["endless"] * 9, 2, "is not what its index describes: it does not have"),
    ],
)
def test_faults_that_stay_are_errors(web, tmp_path, faults, gets, says):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    web.faults["/s-0.tar"] = list(faults)
    with pytest.raises(DataError, match=says) as caught:
        store.fetch(index, url)
    assert url in str(caught.value)
    assert web.gets("/s-0.tar") == gets and not parts(tmp_path / "cache")
    assert web.sent < 1 << 27  # who sends without end is not listened to


def test_a_server_that_is_gone_is_an_error(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    gone = url.replace(str(web.server_port), "1")
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1/s-0.tar cannot be read .*check the network"):
        store.fetch(index, gone)


def test_a_server_that_stalls_is_asked_again(web, tmp_path, monkeypatch):
    (url,) = serve(web, tmp_path / "src", 1)
    monkeypatch.setattr(remote, "_STALL_S", 0.3)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    web.faults["/s-0.tar"] = ["half"]
    start = time.monotonic()
    assert store.fetch(index, url).read_bytes() == content(web, url)
    assert time.monotonic() - start < 10


def test_shards_are_asked_for_as_they_are(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    store.fetch(store.open_index(url), url)
    assert {headers["Accept-Encoding"] for _, headers in web.requests} == {"identity"}


def test_an_error_that_passes_is_tried_three_times_with_pauses():
    calls = []

    def action() -> None:
        calls.append(time.monotonic())
        raise remote.Unreachable("no", passing=True)

    with pytest.raises(remote.Unreachable):
        retried(action)
    assert len(calls) == 3 and calls[2] - calls[1] >= 0.02


def test_a_wrong_digest_leads_to_a_new_index_at_the_next_start(web, tmp_path, caplog):
    (url,) = serve(web, tmp_path / "src", 1)
    web.files["/s-0.tar.index"] = forged(web.files["/s-0.tar.index"], digest="0" * 32)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)  # nothing shows yet
    assert not caplog.records
    with pytest.raises(DataError, match=r"s-0.tar is not what its index describes.*start again"):
        store.fetch(index, url)
    age(tmp_path / "cache" / "indexes")
    index = store.open_index(url)
    assert f"{url}.index does not belong to {url} " in caplog.text
    assert index.digest == xxhash.xxh3_128_hexdigest(content(web, url))
    assert store.fetch(index, url).read_bytes() == content(web, url)
    assert web.gets("/s-0.tar") == 2  # those of the mismatch


def test_a_changed_shard_never_stands_for_the_old_one(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    old, old_data = store.open_index(url), content(web, url)
    store.fetch(old, url)
    new_data, web.files["/s-0.tar.index"] = tar_and_index(tmp_path / "src", "new.tar", first=50)
    web.files["/s-0.tar"] = new_data
    assert len(new_data) == len(old_data) and new_data != old_data
    age(tmp_path / "cache" / "indexes")
    new = store.open_index(url)
    assert new.path != old.path and list(new.keys) == ["0050", "0051", "0052"]
    assert store.fetch(new, url).read_bytes() == new_data
    assert store.fetch(old, url).read_bytes() == old_data  # a run that goes on keeps what it has
    old.path.unlink()
    with pytest.raises(DataError, match="is not what its index describes"):
        store.fetch(old, url)
    assert store.open_index(url).digest == new.digest  # and does not spoil the index of others
    assert not list((tmp_path / "cache" / "indexes").glob("*.here.index"))


def test_secrets_of_a_url_stay_out_of_messages_and_logs(web, tmp_path, caplog):
    (url,) = serve(web, tmp_path / "src", 1)
    secret = url.replace("http://", "http://me:pa55word@") + "?token=t0psecret&x=%2F"
    caplog.set_level(logging.INFO)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(secret)
    assert web.requests[0][1]["Authorization"].startswith("Basic ")
    texts = []
    for faults in ([500] * 3, ["cut"] * 3, [404], ["garble"] * 2):
        web.faults["/s-0.tar"] = faults
        with pytest.raises(DataError) as caught:
            store.fetch(index, secret)
        texts += traceback.format_exception(caught.value)
    del web.files["/s-0.tar.index"], web.files["/s-0.tar"]
    age(tmp_path / "cache" / "indexes")
    for name in ("s-0.tar", "none.tar", "*"):
        with pytest.raises(DataError) as caught:
            store.open_indexes(list_remote(secret.replace("s-0.tar", name)))
        texts += traceback.format_exception(caught.value)
    text = "".join(texts) + caplog.text
    assert "***@127.0.0.1" in text and "/s-0.tar?***" in text
    assert "pa55word" not in text and "t0psecret" not in text


def test_a_bucket_end_to_end(s3, tmp_path):
    tar, sidecar = tar_and_index(tmp_path / "src", "a.tar")
    s3.pipe("/bucket/a.tar", tar)
    s3.pipe("/bucket/a.tar.index", sidecar)
    s3.pipe("/bucket/b.tar", tar_and_index(tmp_path / "src", "b.tar", first=10)[0])
    store = Cache(tmp_path / "cache", BIG)
    urls = list_remote("s3://bucket")
    indexes = store.open_indexes(urls)
    assert [index.keys[0] for index in indexes] == ["0000", "0010"]
    assert store.fetch(indexes[0], urls[0]).read_bytes() == tar
    with pytest.raises(DataError, match=r"s3://bucket/c.tar cannot be read .*check the address"):
        store.open_index("s3://bucket/c.tar")


# The bound


def test_the_least_recently_used_go_first(web, tmp_path):
    urls = serve(web, tmp_path / "src", 3)
    store = Cache(tmp_path / "cache", 2 * len(content(web, urls[0])) + 100)
    a, b, c = (store.open_index(url) for url in urls)
    store.fetch(a, urls[0])
    store.fetch(b, urls[1])
    os.utime(a.path, (1000, 1000))
    os.utime(b.path, (2000, 2000))
    store.fetch(a, urls[0])  # used again
    assert a.path.stat().st_mtime > 1e9
    with b.path.open("rb") as held:
        store.fetch(c, urls[2])
        assert (a.path.exists(), b.path.exists(), c.path.exists()) == (True, False, True)
        assert held.read() == content(web, urls[1])  # who reads it can read on
    used = time.time() - 30
    os.utime(a.path, (used, used))
    store.fetch(a, urls[0])
    assert abs(a.path.stat().st_mtime - used) < 1  # use is noted once a minute, not at every read


def test_no_more_go_than_must(tmp_path):
    (tmp_path / "locks").mkdir()
    (tmp_path / "shards").mkdir()
    folder = BoundedFolder(tmp_path / "shards", tmp_path / "locks", 100)
    for name, used in zip("abcdefghij", (5, 9, 1, 8, 2, 7, 3, 10, 6, 4)):
        (folder.folder / name).write_bytes(bytes(10))
        os.utime(folder.folder / name, (used, used))
    with folder.alone("new"), folder.part("new", 35, "it") as part:
        assert sorted(path.name for path in folder.folder.iterdir() if path != part) == list("abdfhi")
        os.utime(part, (1, 1))
        folder.publish(part, folder.folder / "new")
    assert time.time() - (folder.folder / "new").stat().st_mtime < 10  # not the next to go


def test_a_shard_larger_than_the_limit_is_an_error(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    size = len(content(web, url))
    store = Cache(tmp_path / "cache", size - 1)
    with pytest.raises(DataError, match=rf"s-0.tar has {size:,} bytes, .* {size - 1:,}; .*data\.cache_gb"):
        store.fetch(store.open_index(url), url)
    del web.files["/s-0.tar.index"]
    age(tmp_path / "cache" / "indexes")
    for path in (tmp_path / "cache" / "indexes").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"data\.cache_gb"):
        store.open_index(url)
    assert web.gets("/s-0.tar") == 0


def test_jobs_with_different_limits_share_a_folder(web, tmp_path):
    urls = serve(web, tmp_path / "src", 4)
    size = max(len(content(web, url)) for url in urls)
    large, small = Cache(tmp_path / "cache", 4 * size), Cache(tmp_path / "cache", size)
    indexes = large.open_indexes(urls)
    for index, url in zip(indexes[:3], urls):
        large.fetch(index, url)
    assert small.fetch(indexes[0], urls[0]) and all(index.path.exists() for index in indexes[:3])
    assert small.fetch(indexes[3], urls[3]).read_bytes() == content(web, urls[3])
    assert [index.path.exists() for index in indexes] == [False, False, False, True]
    assert large.fetch(indexes[0], urls[0]).read_bytes() == content(web, urls[0])


def test_a_full_disk_is_named_and_nothing_is_thrown_out_for_nothing(web, tmp_path, monkeypatch):
    urls = serve(web, tmp_path / "src", 2)
    store = Cache(tmp_path / "cache", BIG)
    a, b = store.open_indexes(urls)
    store.fetch(a, urls[0])
    age(tmp_path / "cache" / "shards")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=-a.size))
    with pytest.raises(
        DataError, match=rf"cache/shards has .* free, and .*/s-1.tar needs {b.size:,};.*data\.cache_dir"
    ):
        store.fetch(b, urls[1])
    assert a.path.exists() and web.gets("/s-1.tar") == 0
    evicted = []  # a disk that other things have filled: the cache gives way
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False, real=Path.unlink: _unlink(path, evicted, real))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=BIG if a.path in evicted else 0))
    assert store.fetch(b, urls[1]).exists() and not a.path.exists()


def _unlink(path: Path, gone: list[Path], real) -> None:
    gone.append(path)
    real(path, missing_ok=True)


def _fetch_under_file_limit(folder: Path, index, url: str, results) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        Cache(folder, BIG).fetch(index, url)
    except DataError as error:
        results.put(str(error))


def test_a_disk_that_takes_no_more_is_an_error(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    index = Cache(tmp_path / "cache", BIG).open_index(url)
    results = fork.Queue()
    process = fork.Process(target=_fetch_under_file_limit, args=(tmp_path / "cache", index, url, results))
    process.start()
    message = results.get(timeout=10)
    process.join()
    assert f"{tmp_path / 'cache'} cannot be used (File too large)" in message and "data.cache_dir" in message
    assert not list((tmp_path / "cache" / "shards").iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file/cache cannot be used .*data\.cache_dir"):
        Cache(tmp_path / "file" / "cache", BIG)


def test_parts_of_the_dead_go_and_those_of_the_living_count(tmp_path):
    (tmp_path / "locks").mkdir()
    (tmp_path / "shards").mkdir()
    folder = BoundedFolder(tmp_path / "shards", tmp_path / "locks", 100)
    (folder.folder / ".dead.part").write_bytes(bytes(90))
    (folder.folder / ".mine.part").write_bytes(bytes(90))  # of a process that died at the same shard
    with locked(folder.locks / "living"), folder.alone("mine"):
        (folder.folder / ".living.part").write_bytes(bytes(40))
        with folder.part("mine", 60, "it") as part:
            assert part.stat().st_size == 60
            assert sorted(path.name for path in folder.folder.iterdir()) == [".living.part", ".mine.part"]
    assert [path.name for path in folder.folder.iterdir()] == [".living.part"]


def test_nothing_is_renamed_while_someone_counts(tmp_path):
    (tmp_path / "locks").mkdir()
    (tmp_path / "shards").mkdir()
    folder = BoundedFolder(tmp_path / "shards", tmp_path / "locks", 100)
    with folder.alone("x"), folder.part("x", 60, "it") as part:
        rename = threading.Thread(target=folder.publish, args=(part, folder.folder / "x"))
        with folder.alone("room"):
            rename.start()
            rename.join(0.1)
            assert part.exists()
        rename.join(10)
        assert (folder.folder / "x").exists()


# Several processes


def _in_processes(count: int, target, *args: object) -> list[object]:
    results = fork.Queue()
    processes = [
        fork.Process(target=_report, args=(results, target, number, *args), daemon=True) for number in range(count)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    return found


def _report(results, target, *args: object) -> None:
    try:
        results.put(target(*args))
    except BaseException:
        results.put(traceback.format_exc())


def _fetch_all(number: int, folder: Path, limit: int, urls: list[str], rounds: int = 1) -> list[str]:
    store = Cache(folder, limit)
    order = urls * rounds
    random.Random(number).shuffle(order)
    digests = {}
    for url in order:
        index = store.open_index(url)
        while True:
            try:
                digests[url] = xxhash.xxh3_64_hexdigest(store.fetch(index, url).read_bytes())
                break
            except FileNotFoundError:  # evicted before it was opened
                continue
    return [digests[url] for url in urls]


@pytest.mark.parametrize("indexed", [True, False])
def test_processes_that_race_download_once(web, tmp_path, indexed):
    urls = serve(web, tmp_path / "src", 3)
    web.pace = 0.01
    if not indexed:
        for number in range(3):
            del web.files[f"/s-{number}.tar.index"]
    found = _in_processes(8, _fetch_all, tmp_path / "cache", BIG, urls)
    assert found == [[xxhash.xxh3_64_hexdigest(content(web, url)) for url in urls]] * 8
    assert [web.gets(f"/s-{number}.tar") for number in range(3)] == [1, 1, 1]
    assert [web.gets(f"/s-{number}.tar.index") for number in range(3)] == [1, 1, 1]


def test_a_killed_download_harms_nobody(web, tmp_path):
    (url,) = serve(web, tmp_path / "src", 1)
    store = Cache(tmp_path / "cache", BIG)
    index = store.open_index(url)
    web.faults["/s-0.tar"] = ["half"]
    process = fork.Process(target=store.fetch, args=(index, url), daemon=True)
    process.start()
    deadline = time.monotonic() + 10
    while not parts(tmp_path / "cache") or not web.gets("/s-0.tar"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL)).start()
    start = time.monotonic()
    assert store.fetch(index, url).read_bytes() == content(web, url)  # waits for the lock of the one that is killed
    assert 0.1 < time.monotonic() - start < 10
    process.join()
    assert process.exitcode == -signal.SIGKILL and not parts(tmp_path / "cache")


@pytest.mark.parametrize("room", [1, 3])
def test_the_limit_holds_while_processes_fetch(web, tmp_path, room):
    urls = serve(web, tmp_path / "src", 6)
    web.pace = 0.002
    limit = room * max(len(content(web, url)) for url in urls)
    store = Cache(tmp_path / "cache", limit)
    sizes: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.001):
            with locked(tmp_path / "cache" / "locks" / "room"):  # else what is renamed could be counted twice
                sizes.append(sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    found = _in_processes(4, _fetch_all, store.folder, limit, urls, 2)
    stop.set()
    sampler.join()
    assert found == [[xxhash.xxh3_64_hexdigest(content(web, url)) for url in urls]] * 4
    assert limit * 0.5 < max(sizes) <= limit
    assert sum(web.gets(f"/s-{number}.tar") for number in range(6)) > 6  # it was too small for all of them
    assert not parts(tmp_path / "cache")
