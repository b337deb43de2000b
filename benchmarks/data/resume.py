"""How long each loader takes to go on in the middle of an epoch, and how many samples it reads in vain for that.

dstrain has an index of millions of rows that all are the one picture of a small tar, and decodes a batch of 8 of them.
litdata and streaming have as many tiny members, the same shards again and again. webdataset and energon have those
shards once: webdataset keeps no state, so it reads on to the place, and energon's state can only be had by reading up
to it, which is done once and not counted.

    python benchmarks/data/resume.py DATA SAMPLES ROWS PART...     # prepares all that; data_loading.py does it
"""

import json
import os
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import peers
import torch

_KIND, _EXTENSION = "tiny", "bin"
MANY = ("dstrain", "litdata", "streaming")  # those that have millions of samples


class Counted:
    """Counts the payloads that a loader has read."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, data: bytes) -> bytes:
        self.count += 1
        return data


def webdataset(data: Path, samples: int, place: int, seen: Counted) -> tuple[Callable[[], Any], int]:
    import webdataset

    urls = [str(path) for path in sorted((data / "tar" / _KIND).glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(peers.buffer_size(_EXTENSION))
    stream = dataset.map(lambda sample: (seen(sample[_EXTENSION]), sample["txt"].decode()))
    return lambda: next(islice(iter(stream), place, None)), 1


def litdata(data: Path, samples: int, place: int, seen: Counted) -> tuple[Callable[[], Any], int]:
    dataset = peers.litdata_dataset(data, f"many_{samples}", seen)
    state = dataset.state_dict(place, num_workers=0, batch_size=1)
    dataset = peers.litdata_dataset(data, f"many_{samples}", seen)
    if place:
        dataset.load_state_dict(state)
    return lambda: next(iter(dataset)), 1


def streaming(data: Path, samples: int, place: int, seen: Counted) -> tuple[Callable[[], Any], int]:
    dataset = peers.streaming_dataset(data, f"many_{samples}", seen)
    if place:
        state = {"epoch": 0, "sample_in_epoch": place, "num_canonical_nodes": 1, "shuffle_seed": 9176}
        dataset.load_state_dict(state)
    return lambda: next(iter(dataset)), 1


def energon(data: Path, samples: int, place: int, seen: Counted) -> tuple[Callable[[], Any], int]:
    path = data / f"energon_state_{samples}_{place}.pt"
    loader = peers.energon_loader(data, _KIND, _EXTENSION, seen, workers=0)
    if place:
        loader.restore_state_rank(torch.load(path, weights_only=False))
    return lambda: next(iter(loader)), peers.BATCH


def save_energon(data: Path, samples: int, parts: list[float]) -> None:
    """Read up to each of `parts` of the epoch once, to have the state there."""
    loader = peers.energon_loader(data, _KIND, _EXTENSION, peers.as_it_is, workers=0)
    batches, at = iter(loader), 0
    for part in parts:
        place = int(samples * part)
        path = data / f"energon_state_{samples}_{place}.pt"
        if path.exists():
            continue
        while at < place:
            next(batches)
            at += peers.BATCH
        torch.save(loader.save_state_rank(), path)


def save_many(data: Path, samples: int, rows: int) -> None:
    """Make `rows` samples of the tiny ones for litdata and streaming: links to their files, and longer indexes."""
    for name, listed in (("litdata", "chunks"), ("mds", "shards")):
        source, folder = data / name / _KIND, data / name / f"many_{rows}"
        if folder.exists():
            continue
        folder.mkdir()
        index = json.loads((source / "index.json").read_text())
        shards = []
        for number in range(rows // samples):
            for shard in index[listed]:
                place = shard if name == "litdata" else shard["raw_data"]
                key = "filename" if name == "litdata" else "basename"
                copy = f"{number}-{place[key]}"
                os.link(source / place[key], folder / copy)
                changed = {**place, key: copy}
                shards.append(changed if name == "litdata" else {**shard, "raw_data": changed})
        (folder / "index.json").write_text(json.dumps({**index, listed: shards}))


def save_large(data: Path, rows: int) -> None:
    """Make the index for dstrain, in shards of 10,000 rows."""
    import ours

    folder = data / f"large_{rows}"
    if folder.exists():
        return
    picture = min((data / "pictures").glob("*.jpg"))
    tar_path = data / "one.tar"
    with tarfile.open(tar_path, "w") as tar:
        for path in (picture, picture.with_suffix(".txt")):
            tar.add(path, path.name)
    ours.make_large(tar_path, folder, rows, max(1, rows // 10_000))


LOADERS = {"webdataset": webdataset, "litdata": litdata, "streaming": streaming, "energon": energon}


def measure(name: str, data: Path, samples: int, part: float) -> dict[str, float]:
    """Return seconds to open, from there to the first sample, and how many samples were read but not delivered."""
    seen = Counted()
    start = time.perf_counter()
    first, delivered = LOADERS[name](data, samples, int(samples * part), seen)
    opened = time.perf_counter()
    first()
    ready = time.perf_counter()
    return {
        "open_s": opened - start,
        "first_s": ready - opened,
        "samples": samples,
        "in_vain": seen.count - delivered,
    }


if __name__ == "__main__":
    save_energon(Path(sys.argv[1]), int(sys.argv[2]), [float(part) for part in sys.argv[4:]])
    save_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    save_large(Path(sys.argv[1]), int(sys.argv[3]))
