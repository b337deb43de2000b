"""The other loaders of the benchmark, each as its documentation has it: shuffled, batches of 8, lists of samples.

Every function yields epochs, an epoch yields batches, and a batch is a list of (payload, caption). With no workers the
datasets of litdata and streaming are iterated without their DataLoader, which costs time and does nothing then.
`transform` turns the bytes of a payload into what is wanted, in the worker.
"""

import io
import math
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

BATCH = 8
MAX_PIXELS = 512 * 512

Transform = Callable[[bytes], Any]
Batch = list[tuple[Any, str]]
Epochs = Iterator[Iterator[Batch]]


def as_it_is(data: bytes) -> bytes:
    return data


def with_pillow(data: bytes) -> torch.Tensor:
    """Decode and resize as a training script does: uint8 [3, H, W], at most 512 x 512 pixels, multiples of 16."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGB")
        scale = min(1.0, math.sqrt(MAX_PIXELS / (image.width * image.height)))
        width, height = int(image.width * scale) // 16 * 16, int(image.height * scale) // 16 * 16
        return torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.LANCZOS))).permute(2, 0, 1)


def buffer_size(extension: str) -> int:
    """Return how many samples are shuffled among each other where a buffer does it; 2.4 MB each must fit memory."""
    return 32 if extension == "bin" else 100


def singly(source: Iterator[tuple[Any, str]]) -> Iterator[Batch]:
    for sample in source:
        yield [sample]


class TarStream(IterableDataset):
    """What a loader without an index or a shuffle buffer does: shards in random order, members as they come."""

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.tars, self.transform = sorted(folder.glob("*.tar")), transform

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        while True:
            for path in random.sample(self.tars, len(self.tars)):
                with tarfile.open(path, "r|") as tar:
                    members = ((member.name, tar.extractfile(member).read()) for member in tar)
                    for (_, payload), (_, caption) in zip(members, members):
                        yield self.transform(payload), caption.decode()


def tarfile_epochs(data: Path, kind: str, extension: str, transform: Transform, workers: int) -> Epochs:
    dataset = TarStream(data / "tar" / kind, transform)
    if workers:
        yield iter(DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=list))
    yield singly(iter(dataset))


def webdataset_epochs(data: Path, kind: str, extension: str, transform: Transform, workers: int) -> Epochs:
    import webdataset

    urls = [str(path) for path in sorted((data / "tar" / kind).glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(buffer_size(extension))
    dataset = dataset.map(lambda sample: (transform(sample[extension]), sample["txt"].decode()))
    if workers:
        dataset = dataset.batched(BATCH, collation_fn=list)
        yield iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))
    yield singly(iter(dataset))


def _epochs(loader_class: Any, dataset: Any, workers: int) -> Epochs:
    options = {"batch_size": BATCH, "num_workers": workers, "collate_fn": list, "persistent_workers": True}
    loader = loader_class(dataset, **options) if workers else None
    while True:
        yield iter(loader) if loader else singly(iter(dataset))


def litdata_dataset(data: Path, kind: str, transform: Transform) -> Any:
    from litdata import StreamingDataset

    def both(sample: dict[str, Any]) -> tuple[Any, str]:
        return transform(bytes(sample["payload"])), sample["caption"]

    # its default of decoding 256 rows at a time, of which a shuffle uses few before the next, is ten times slower here
    options = {"shuffle": True, "batch_decode": 0, "max_cache_size": "100GB"}
    return StreamingDataset(str(data / "litdata" / kind), transform=both, **options)


def litdata_epochs(data: Path, kind: str, extension: str, transform: Transform, workers: int) -> Epochs:
    from litdata import StreamingDataLoader

    yield from _epochs(StreamingDataLoader, litdata_dataset(data, kind, transform), workers)


def streaming_dataset(data: Path, kind: str, transform: Transform) -> Any:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Dataset(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[Any, str]:
            sample = super().__getitem__(at)
            return transform(sample["payload"]), sample["caption"]

    return Dataset(local=str(data / "mds" / kind), shuffle=True, batch_size=BATCH)


def streaming_epochs(data: Path, kind: str, extension: str, transform: Transform, workers: int) -> Epochs:
    from streaming import StreamingDataLoader

    yield from _epochs(StreamingDataLoader, streaming_dataset(data, kind, transform), workers)


def energon_loader(data: Path, kind: str, extension: str, transform: Transform, workers: int) -> Any:
    from dataclasses import dataclass

    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    @dataclass
    class Pair(Sample):
        payload: Any
        caption: str

    @stateless
    def cook(sample: dict[str, Any]) -> Pair:
        return Pair(**basic_sample_keys(sample), payload=transform(sample[extension]), caption=sample["txt"].decode())

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

        def batch(self, samples: list[Pair]) -> Batch:
            return [(sample.payload, sample.caption) for sample in samples]

    dataset = get_train_dataset(
        data / "tar" / kind,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=buffer_size(extension),
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    return get_savable_loader(dataset)


def energon_epochs(data: Path, kind: str, extension: str, transform: Transform, workers: int) -> Epochs:
    yield iter(energon_loader(data, kind, extension, transform, workers))


EPOCHS = {
    "webdataset": webdataset_epochs,
    "litdata": litdata_epochs,
    "streaming": streaming_epochs,
    "energon": energon_epochs,
    "tarfile": tarfile_epochs,
}
