"""Counter-based randomness: every random number is a pure function of (seed, purpose, draw, element).

There is no stream and no state, so world size, workers, packing and resume cannot change a number, and a kernel can
make the noise again instead of keeping it. The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011). Words are identical on every device; `kernels/philox.py` makes the same normals.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
TWO_PI = 6.2831854820251465  # 2 pi rounded to fp32
SHUFFLE_CHUNK = 1 << 20  # counters at a time: the temporaries stay small however long the permutation is


class Purpose(IntEnum):
    """What a number is for: two purposes never share a counter, so they are independent."""

    NOISE = 0
    TIMESTEP = 1
    CAPTION_DROPOUT = 2
    ORDER = 3
    INIT = 4
    SAMPLE = 5
    SHARD_ORDER = 6
    SOURCE = 7
    AUGMENT = 8
    DROPOUT = 9


def _rounds(key: tuple[int, int], counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    # A product of two 32-bit words fills 64 bits; int64 wraps modulo 2^64, so its bits are those of uint64. Lanes may
    # be ints or arrays of shapes that broadcast: lanes that are the same for many numbers stay small while they can.
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, ((p0 >> 32) & MASK32) ^ c3 ^ k1
        c1, c3 = p1 & MASK32, p0 & MASK32
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def seed_key(seed: int) -> tuple[int, int]:
    """Return the Philox key of a seed, low word first; raise ValueError unless the seed is in [0, 2^64)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    return seed & MASK32, seed >> 32


def _counter(purpose: Purpose, draws: Tensor, groups: Any) -> tuple[Any, int, Tensor, Tensor]:
    return groups, int(purpose), draws & MASK32, (draws >> 32) & MASK32


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox 4x32-10 for each counter.

    `counter` holds four int64 tensors of uint32 values that broadcast; the result has four int64 tensors of uint32
    values, the same on every device.
    """
    return _rounds(key, counter)


def words_to_uniform(words: Tensor) -> Tensor:
    """Map uint32 words (int64 tensor) to fp32 in (0, 1): the top 23 bits, centred in their interval, so exact."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def words(seed: int, purpose: Purpose, draw: int, group: int) -> tuple[int, int, int, int]:
    """Return the four uint32 words of one counter, in plain Python: those that `uniform` and `normal4` begin with."""
    return _rounds(seed_key(seed), (group, int(purpose), draw & MASK32, draw >> 32 & MASK32))


def words_array(seed: int, purpose: Purpose, draws: Any, groups: Any) -> tuple[np.ndarray, ...]:
    """`words` in NumPy, for integers or arrays of integers that broadcast: four uint64 arrays of uint32 values."""
    draws, groups = (np.atleast_1d(np.asarray(lane)).astype(np.uint64) for lane in (draws, groups))
    return _rounds(seed_key(seed), (groups, int(purpose), draws & MASK32, draws >> 32))


def uniform(seed: int, purpose: Purpose, draws: Tensor) -> Tensor:
    """Return one fp32 uniform number in (0, 1) for each int64 draw number; shape and device as `draws`."""
    return words_to_uniform(_rounds(seed_key(seed), _counter(purpose, draws, 0))[0])


def uniform_at(seed: int, purpose: Purpose, draws: Tensor, elements: Tensor) -> Tensor:
    """Return fp32 uniform numbers in (0, 1), number `element` of each draw; `draws` and `elements` int64, broadcast."""
    lanes = torch.stack(torch.broadcast_tensors(*_rounds(seed_key(seed), _counter(purpose, draws, elements // 4))))
    return words_to_uniform(lanes.gather(0, (elements % 4).expand(lanes.shape[1:])[None])[0])


def _box_muller(radius_words: Tensor, angle_words: Tensor) -> tuple[Tensor, Tensor]:
    # The angle is rounded to fp32 once, as in the kernel; the rest is fp64, rounded at the end, so that a normal does
    # not depend on whether the CPU took its vector or its scalar path for that element.
    radius = torch.sqrt(-2.0 * torch.log(words_to_uniform(radius_words).double()))
    angle = (words_to_uniform(angle_words) * TWO_PI).double()
    return (radius * torch.cos(angle)).float(), (radius * torch.sin(angle)).float()


def normal4(seed: int, purpose: Purpose, draws: Tensor, groups: Tensor) -> Tensor:
    """Return the normals of whole counters: fp32 [..., 4], normal `4 * group + lane` of each draw at [..., lane].

    `draws` and `groups` are int64 and broadcast. A quarter of the work of `normal` where elements come in fours.
    """
    w0, w1, w2, w3 = _rounds(seed_key(seed), _counter(purpose, draws, groups))
    return torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1)


def normal(seed: int, purpose: Purpose, draws: Tensor, elements: Tensor) -> Tensor:
    """Return fp32 standard normals, number `element` of each draw; `draws` and `elements` are int64 and broadcast."""
    w0, w1, w2, w3 = _rounds(seed_key(seed), _counter(purpose, draws, elements // 4))
    second_pair, sine = elements % 4 >= 2, elements % 2 == 1
    cosines, sines = _box_muller(torch.where(second_pair, w2, w0), torch.where(second_pair, w3, w1))
    return torch.where(sine, sines, cosines)


def shuffled(seed: int, n: int, purpose: Purpose = Purpose.ORDER, stream: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Return a permutation of range(n), int64 [n]: the order that sorts one 64-bit Philox word per place.

    `stream` holds two uint32 numbers: of one seed and purpose, every stream has a permutation of its own.
    """
    keys = np.empty((n + 1) // 2 * 2, dtype=np.uint64)
    high, low = (part & MASK32 for part in stream)
    for start in range(0, len(keys) // 2, SHUFFLE_CHUNK):
        counters = np.arange(start, min(start + SHUFFLE_CHUNK, len(keys) // 2), dtype=np.uint64)
        w0, w1, w2, w3 = words_array(seed, purpose, high << 32 | low, counters)
        keys[2 * start : 2 * start + 2 * len(counters) : 2] = w0 << 32 | w1
        keys[2 * start + 1 : 2 * start + 2 * len(counters) : 2] = w2 << 32 | w3
    return np.argsort(keys[:n], kind="stable")
