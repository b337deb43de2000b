"""Write the samples of the benchmark in each loader's own format, and say what that takes.

    python benchmarks/data/prepare.py DATA [--samples N] [--latents 400] [--tiny 100000]

DATA/{pictures,small} hold JPEGs with captions (pictures.py); the latents (2.4 MB of noise each) and the tiny members
are made here. Each kind becomes tars that webdataset.ShardWriter writes, which dstrain, webdataset and tarfile read as
they are, with energon's own index beside them; litdata's chunks; and MDS. Shards and chunks have 64 MB, the default of
the two that convert. Seconds and bytes of all that go to DATA/formats.json. What is there already is kept.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from subprocess import DEVNULL, run

import numpy as np

log = logging.getLogger("prepare")

EXTENSION = {"pictures": "jpg", "small": "jpg", "latents": "bin", "tiny": "bin"}
_SHARD = 64 << 20
_LATENT_BYTES, _TINY_BYTES = 2_400_000, 100
_CAPTION = "a caption of a few words, as short as they come"

Sample = tuple[str, bytes, str]  # key, payload, caption
Item = tuple[str, str]  # kind, path of a JPEG or number of a made sample


def items(data: Path, kind: str, count: int) -> list[Item]:
    """Name the first `count` samples of a kind, always the same."""
    if EXTENSION[kind] == "jpg":
        return [(kind, str(path)) for path in islice(sorted((data / kind).glob("*.jpg")), count)]
    return [(kind, str(number)) for number in range(count)]


def load(item: Item) -> Sample:
    kind, name = item
    if EXTENSION[kind] == "jpg":
        path = Path(name)
        return path.stem, path.read_bytes(), path.with_suffix(".txt").read_text()
    size = _LATENT_BYTES if kind == "latents" else _TINY_BYTES
    return f"{int(name):07d}", np.random.default_rng(int(name)).bytes(size), _CAPTION


def as_dict(item: Item) -> dict[str, str | bytes]:
    return dict(zip(("key", "payload", "caption"), load(item)))


def write_tars(source: list[Item], folder: Path) -> None:
    import webdataset

    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxsize=_SHARD, maxcount=1 << 40, verbose=0) as writer:
        for kind, name in source:
            key, payload, caption = load((kind, name))
            writer.write({"__key__": key, EXTENSION[kind]: payload, "txt": caption})


def write_litdata(source: list[Item], folder: Path) -> None:
    from litdata import optimize

    optimize(as_dict, source, str(folder), chunk_bytes=_SHARD, num_workers=1, verbose=False)


def write_mds(source: list[Item], folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"key": "str", "payload": "bytes", "caption": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=_SHARD) as writer:
        for item in source:
            writer.write(as_dict(item))


def index_energon(tars: Path) -> None:
    command = [str(Path(sys.executable).parent / "energon"), "prepare", str(tars), "--non-interactive"]
    options = ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "2", "--no-progress"]
    run([*command, *options], check=True, stdout=DEVNULL)


def index_dstrain(tars: Path) -> None:
    import ours

    ours.index(tars)


def timed(work: Callable[[], None]) -> float:
    """Run in a process of its own, as some of the writers leave threads behind; return seconds, imports included."""
    start = time.perf_counter()
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("it failed; what it said is above")
    return time.perf_counter() - start


def size(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def convert(data: Path, kind: str, count: int) -> dict[str, dict[str, float]]:
    """Write one kind in all formats; return seconds and megabytes of each."""
    taken: dict[str, dict[str, float]] = {}
    source = items(data, kind, count)
    for name, write in (("tar", write_tars), ("litdata", write_litdata), ("mds", write_mds)):
        folder = data / name / kind
        seconds = timed(partial(write, source, folder))
        taken[name] = {"seconds": round(seconds, 2), "megabytes": round(size(folder) / 1e6, 1)}
    tars = data / "tar" / kind
    for name, index in (("energon", index_energon), ("dstrain", index_dstrain)):
        before = size(tars)
        seconds = timed(partial(index, tars))
        taken[name] = {"seconds": round(seconds, 2), "megabytes": round((size(tars) - before) / 1e6, 3)}
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=1 << 40, help="of pictures and small ones (default: all)")
    parser.add_argument("--latents", type=int, default=400)
    parser.add_argument("--tiny", type=int, default=100_000, help="for the time to resume")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["OMP_NUM_THREADS"] = "1"
    report = args.data / "formats.json"
    done = json.loads(report.read_text()) if report.exists() else {}
    counts = {"pictures": args.samples, "small": args.samples, "latents": args.latents, "tiny": args.tiny}
    for kind, count in counts.items():
        if kind not in done:
            for name in ("tar", "litdata", "mds"):
                shutil.rmtree(args.data / name / kind, ignore_errors=True)
            done[kind] = convert(args.data, kind, count)
            report.write_text(json.dumps(done, indent=2) + "\n")
            log.info("%s: %s", kind, done[kind])


if __name__ == "__main__":
    main()
