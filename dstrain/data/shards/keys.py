"""A list of keys as one string of bytes: a tenth of the memory of a list of str, and saved without pickle."""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import xxhash


class KeyTable(Sequence[str]):
    """Keys end to end in `blob` (UTF-8); key i ends before byte `ends[i]` (int64 [n])."""

    def __init__(self, blob: bytes, ends: np.ndarray) -> None:
        """Raises ValueError if `ends` does not cut `blob` into pieces."""
        last = int(ends[-1]) if ends.ndim == 1 and len(ends) else 0
        if ends.ndim != 1 or ends.dtype != np.int64 or last != len(blob):
            raise ValueError("the key table does not fit its keys")
        if len(ends) and (ends[0] < 0 or np.any(ends[1:] < ends[:-1])):
            raise ValueError("the keys of the key table overlap")
        self.blob = blob
        self.ends = ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> "KeyTable":
        """Make a table of `keys`."""
        encoded = [key.encode() for key in keys]
        return cls(b"".join(encoded), np.cumsum([len(key) for key in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = range(len(self))[place]  # negative places, and IndexError past the end
        start = int(self.ends[i - 1]) if i else 0
        return self.blob[start : int(self.ends[i])].decode(errors="backslashreplace")

    def take(self, places: np.ndarray) -> "KeyTable":
        """Make a table of the keys at `places`, in that order."""
        if np.array_equal(places, np.arange(len(self))):
            return self
        lasts = self.ends[places]
        firsts = np.concatenate([[0], self.ends])[places]
        blob = b"".join(self.blob[first:last] for first, last in zip(firsts.tolist(), lasts.tolist()))
        return KeyTable(blob, np.cumsum(lasts - firsts, dtype=np.int64))


class KeyLog:
    """Keys as they are met, of which some may come again; a million take 30 MB."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._ends, self._hashes = array("q"), array("Q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, key: str) -> None:
        """Note one key."""
        encoded = key.encode()
        self._blob += encoded
        self._ends.append(len(self._blob))
        self._hashes.append(xxhash.xxh3_64_intdigest(encoded))

    def table(self) -> KeyTable:
        """Return all keys in the order of their coming."""
        return KeyTable(bytes(self._blob), np.frombuffer(self._ends, np.int64))

    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """Tell which were met more than once, and which were not but lie beside one that was: bool [n] each.

        Keys with one hash pass for the same, which is as good as never.
        """
        _, numbers, counts = np.unique(np.frombuffer(self._hashes, np.uint64), return_inverse=True, return_counts=True)
        again = counts[numbers] > 1
        beside = np.zeros_like(again)
        beside[1:] |= again[:-1]
        beside[:-1] |= again[1:]
        return again, beside & ~again
