"""Pictures, tars and datasets for the tests of dstrain.data."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dstrain.data import Dataset, open_dataset
from dstrain.data.media.resolution import Resolution
from dstrain.data.selection import Wanted


def image_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    """A smooth picture that no other seed gives."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 3 + seed * 7, y * 2 + seed * 11, x + y + seed * 13], axis=-1) % 256
    return image_bytes(Image.fromarray(pixels.astype(np.uint8)), kind)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(count: int, size: tuple[int, int] = (32, 32), first: int = 0) -> list[tuple[str, bytes]]:
    """`count` samples of one size, each a picture and its caption."""
    members = []
    for number in range(first, first + count):
        members.append((f"{number:04d}.png", picture(*size, seed=number)))
        members.append((f"{number:04d}.txt", f"caption {number}".encode()))
    return members


SIZES = ((32, 32), (64, 48), (48, 96), (17, 40), (100, 33))


def mixed_dataset(folder: Path, shards: int = 2, samples: int = 10, max_pixels: int = 4096) -> Dataset:
    """Shards of pictures of several shapes, with captions of several lengths."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        members = []
        for number in range(shard * samples, (shard + 1) * samples):
            members.append((f"{number:04d}.png", picture(*SIZES[number % len(SIZES)], seed=number)))
            members.append((f"{number:04d}.txt", f"caption {number} {'word ' * (number % 7)}".encode()))
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    return open_dataset([str(folder)], Wanted(Resolution(max_pixels)))


def damage_row(dataset: Dataset, row: int) -> None:
    """Overwrite a byte of a row's picture in its shard, as bit rot does: the index does not notice."""
    path = Path(dataset.shard(row))
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.startswith(dataset.key(row) + ".png"))
    stat = path.stat()
    with path.open("r+b") as f:
        f.seek(member.offset_data + member.size // 2)
        byte = f.read(1)[0]
        f.seek(member.offset_data + member.size // 2)
        f.write(bytes([byte ^ 0x55]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
