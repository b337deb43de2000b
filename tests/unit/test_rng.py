"""The counter-based generator: published vectors, the same words everywhere, exact floats, statistics, permutations."""

import math
import time

import numpy as np
import pytest
import torch
from kernel_cases import DEVICES

from dstrain.kernels import philox as kernel
from dstrain.kernels.backend import jit, tl
from dstrain.rng import (
    TWO_PI,
    Purpose,
    normal,
    normal4,
    philox,
    seed_key,
    shuffled,
    uniform,
    uniform_at,
    words,
    words_array,
    words_to_uniform,
)

ONES = 0xFFFFFFFF
# Known-answer vectors of Philox 4x32-10 from Random123's kat_vectors: counter, key, output.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def ks_statistic(u):
    """sqrt(n) times the Kolmogorov-Smirnov distance of u [n] from uniform; above 1.95 one time in a thousand."""
    n = len(u)
    return float((u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()) * math.sqrt(n)


@jit
def _words_kernel(word_ptr, normal_ptr, draw_ptr, group_ptr, seed, n, PURPOSE: tl.constexpr, B: tl.constexpr):
    place = tl.arange(0, B)
    draw = tl.load(draw_ptr + place, mask=place < n, other=0)
    group = tl.load(group_ptr + place, mask=place < n, other=0)
    w0, w1, w2, w3 = kernel.words(seed, PURPOSE, draw, group)
    tl.store(word_ptr + 4 * place, w0.to(tl.int64), mask=place < n)
    tl.store(word_ptr + 4 * place + 1, w1.to(tl.int64), mask=place < n)
    tl.store(word_ptr + 4 * place + 2, w2.to(tl.int64), mask=place < n)
    tl.store(word_ptr + 4 * place + 3, w3.to(tl.int64), mask=place < n)
    flat = tl.arange(0, 4 * B)
    normals = kernel.normal4(seed, PURPOSE, draw, group).reshape(4 * B)
    tl.store(normal_ptr + flat, normals, mask=flat < 4 * n)


def in_triton(seed, purpose, draws, groups, device):
    """Words [n, 4] int64 and normals [n, 4] of counters, from the kernel side."""
    n = len(draws)
    word = torch.empty(n, 4, dtype=torch.int64, device=device)
    normals = torch.empty(n, 4, device=device)
    lanes = (torch.as_tensor(np.asarray(lane).astype(np.int64), device=device) for lane in (draws, groups))
    _words_kernel[(1,)](word, normals, *lanes, seed, n, int(purpose), 256)
    return word.cpu(), normals.cpu()


@DEVICES
@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_known_answers_on_every_side(counter, key, output, device):
    group, purpose, *draw = counter
    seed, draw = key[0] | key[1] << 32, draw[0] | draw[1] << 32
    assert words(seed, purpose, draw, group) == output
    assert tuple(int(w[0]) for w in words_array(seed, purpose, np.uint64(draw), group)) == output
    in_torch = philox(key, tuple(torch.tensor([c], device=device) for c in counter))
    assert tuple(int(w) for w in in_torch) == output
    lanes = np.array([draw], np.uint64), np.array([group])
    assert tuple(in_triton(seed, purpose, *lanes, device)[0][0].tolist()) == output


@DEVICES
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**40 + 3, 2**63, 2**64 - 1])
@pytest.mark.parametrize("purpose", [Purpose.NOISE, Purpose.DROPOUT])
def test_words_are_the_same_on_every_side_and_normals_to_the_last_bits(seed, purpose, device):
    draws = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5, 2**63 - 1]).repeat(30)
    groups = np.tile([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, *range(90, 114)], 7)
    numpy = np.stack(words_array(seed, purpose, draws, groups), axis=1)
    assert numpy.tolist() == [list(words(seed, purpose, d, g)) for d, g in zip(draws.tolist(), groups.tolist())]
    lanes = torch.tensor(groups), torch.tensor(int(purpose)), torch.tensor(draws), torch.tensor(draws >> 32)
    in_torch = philox(seed_key(seed), tuple((lane & ONES).to(device) for lane in lanes))
    assert torch.equal(torch.stack(in_torch, dim=1).cpu(), torch.tensor(numpy.astype(np.int64)))
    triton, triton_normals = in_triton(seed, purpose, draws, groups, device)
    assert torch.equal(triton, torch.tensor(numpy.astype(np.int64)))

    u = ((numpy >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    radius = np.sqrt(-2 * np.log(u[:, ::2].astype(np.float64)))
    angle = (u[:, 1::2] * np.float32(TWO_PI)).astype(np.float64)
    by_hand = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(-1, 4).astype(np.float32)
    ours = normal4(seed, purpose, torch.tensor(draws, device=device), torch.tensor(groups, device=device)).cpu()
    assert ulps(ours, torch.tensor(by_hand)) <= 1
    assert ulps(ours, triton_normals) <= 6


def ulps(a, b):
    """The largest distance of a and b in units of the last place, where signs agree."""
    assert torch.equal(a.sign(), b.sign())
    return int((a.view(torch.int32).long() - b.view(torch.int32).long()).abs().max())


def test_philox_counters_broadcast():
    rows, columns = torch.arange(3)[:, None], torch.arange(5)[None, :]
    block = philox((7, 8), (columns, torch.tensor(2), rows, torch.tensor(0)))
    for r in range(3):
        for c in range(5):
            alone = philox((7, 8), tuple(torch.tensor([v]) for v in (c, 2, r, 0)))
            assert [int(w[r, c]) for w in block] == [int(w) for w in alone]


def test_words_become_floats_strictly_inside_the_unit_interval():
    ends = words_to_uniform(torch.tensor([0, 0x1FF, 0x200, ONES]))
    assert ends.dtype == torch.float32
    assert ends.tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24]


def test_a_draw_number_uses_all_64_bits():
    draws = torch.tensor([5, 5 + 2**32, 5 + 2**62])
    assert len(set(uniform(1, Purpose.TIMESTEP, draws).tolist())) == 3
    assert len(set(normal(1, Purpose.NOISE, draws, torch.tensor(0)).tolist())) == 3


def test_a_number_is_the_same_alone_and_in_a_block():
    draws, elements = torch.tensor([3, 2**40, 0])[:, None], torch.arange(23)[None, :]
    block = normal(2**63 + 11, Purpose.NOISE, draws, elements)
    assert block.shape == (3, 23) and block.dtype == torch.float32
    for r, draw in enumerate([3, 2**40, 0]):
        for e in (0, 1, 2, 3, 22):
            alone = normal(2**63 + 11, Purpose.NOISE, torch.tensor([draw]), torch.tensor([e]))
            assert alone.item() == block[r, e].item()


def test_whole_counters_are_the_same_normals():
    draws = torch.arange(4)[:, None]
    fours = normal4(9, Purpose.INIT, draws, torch.arange(6)[None, :])  # [4, 6, 4]
    assert torch.equal(fours.flatten(1), normal(9, Purpose.INIT, draws, torch.arange(24)[None, :]))


@pytest.mark.parametrize("other", [{"seed": 2}, {"purpose": Purpose.INIT}, {"draws": torch.arange(1, 1001)}])
def test_seed_purpose_and_draw_each_change_the_numbers(other):
    base = {"seed": 1, "purpose": Purpose.NOISE, "draws": torch.arange(1000)}
    ours, theirs = uniform(**base), uniform(**(base | other))
    assert (ours == theirs).sum() < 5
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 0.1


def test_uniform_numbers_are_uniform():
    u = uniform(0, Purpose.TIMESTEP, torch.arange(100_000)).double()
    assert u.min() > 0 and u.max() < 1
    assert ks_statistic(u) < 1.95


def test_normals_are_normal_and_their_lanes_independent():
    x = normal(0, Purpose.NOISE, torch.arange(500)[:, None], torch.arange(256)[None, :])
    assert torch.isfinite(x).all()
    assert ks_statistic(torch.special.ndtr(x.flatten().double())) < 1.95
    lanes = x.reshape(-1, 4)
    spread = 4 / math.sqrt(len(lanes))
    assert lanes.mean(0).abs().max() < spread
    assert (lanes.var(0) - 1).abs().max() < 2 * spread
    for powers in (lanes, lanes.square()):
        off_diagonal = torch.corrcoef(powers.T) - torch.eye(4)
        assert off_diagonal.abs().max() < spread


MANY = torch.arange(100_000)
SERIES = {
    "seeds": lambda: words_to_uniform(philox((MANY, 3), (torch.tensor(5),) * 4)[1]),
    "high words of seeds": lambda: words_to_uniform(philox((3, MANY), (torch.tensor(5),) * 4)[2]),
    "draws": lambda: uniform_at(1, Purpose.AUGMENT, MANY, torch.tensor(7)),
    "elements of a draw": lambda: uniform_at(1, Purpose.AUGMENT, torch.tensor(7), MANY),
}


@pytest.mark.parametrize("along", SERIES)
def test_numbers_along_any_part_of_a_key_are_uniform(along):
    u = SERIES[along]().double()
    n = len(u)
    assert ks_statistic(u) < 1.95
    for power in (1, 2, 3, 4):  # a power of u has the mean 1 / (p + 1) and the variance 1 / (2 p + 1) - mean^2
        spread = (1 / (2 * power + 1) - (power + 1.0) ** -2) ** 0.5
        assert abs(u.pow(power).mean() - 1 / (power + 1)) < 4 * spread / math.sqrt(n)
    for lag in (1, 2, 3, 4, 64):
        assert abs(np.corrcoef(u[lag:], u[:-lag])[0, 1]) < 4 / math.sqrt(n - lag)
    pairs = torch.stack([u[::2], u[1::2]]).mul(16).long()
    cells = torch.bincount(pairs[0] * 16 + pairs[1], minlength=256).double()
    assert ((cells - n / 512) ** 2 / (n / 512)).sum() < 330.5  # chi-squared, 255 degrees: one time in a thousand


def test_the_moments_of_normals_are_those_of_the_normal_distribution():
    x = normal(11, Purpose.NOISE, torch.arange(100)[:, None], torch.arange(2000)[None, :]).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(x.pow(power).mean() - moment) < 4 * math.sqrt(variance / x.numel())
    for sigmas in (1, 2, 3, 4):
        share = math.erfc(sigmas / math.sqrt(2))
        assert abs((x.abs() > sigmas).double().mean() - share) < 4 * math.sqrt(share / x.numel())


@pytest.mark.parametrize("axis", range(4), ids=["seed", "purpose", "draw", "element"])
def test_neighbouring_keys_have_nothing_in_common(axis):
    seed, purpose, draw, group = (
        torch.arange(n).view([-1 if i == place else 1 for i in range(4)]) for place, n in enumerate((24, 10, 24, 24))
    )
    block = torch.stack(torch.broadcast_tensors(*philox((seed, 0), (group, purpose, draw, torch.tensor(0)))))
    near, far = (block.narrow(axis + 1, start, block.shape[axis + 1] - 1).flatten(1) for start in (0, 1))
    n = near.shape[1]
    for function in (lambda u: u, torch.square, lambda u: (u - 0.5).abs()):
        both = torch.cat([function(words_to_uniform(w).double()) for w in (near, far)])  # [8, n]
        assert torch.corrcoef(both)[:4, 4:].abs().max() < 4.5 / math.sqrt(n)
    changed = (near ^ far)[..., None] >> torch.arange(32) & 1  # [4, n, 32]
    assert (changed.double().mean(1) - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        seed_key(seed)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 1000, 1001])
def test_shuffled_is_a_permutation(n):
    order = shuffled(3, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_shuffled_depends_on_seed_purpose_and_stream_alone():
    order = shuffled(3, 1000, Purpose.ORDER, (4, 0))
    assert np.array_equal(order, shuffled(3, 1000, Purpose.ORDER, (4, 0)))
    others = [(4, Purpose.ORDER, (4, 0)), (3, Purpose.SOURCE, (4, 0)), (3, Purpose.ORDER, (0, 4))]
    for other in (*(shuffled(seed, 1000, *rest) for seed, *rest in others), np.arange(1000)):
        assert (order == other).sum() < 10


def test_shuffled_in_chunks_is_the_same(monkeypatch):
    whole = shuffled(1, 5001)
    monkeypatch.setattr("dstrain.rng.SHUFFLE_CHUNK", 7)
    assert np.array_equal(shuffled(1, 5001), whole)


def test_shuffled_puts_every_item_everywhere():
    places = np.stack([np.argsort(shuffled(0, 8, Purpose.ORDER, (0, epoch))) for epoch in range(4000)])  # [4000, 8]
    counts = np.stack([np.bincount(places[:, item], minlength=8) for item in range(8)])
    assert ((counts - 500) ** 2 / 500).sum() < 85.4  # chi-squared, 49 degrees of freedom: one time in a thousand


def test_normals_are_cheap():
    draws, elements = torch.arange(64)[:, None], torch.arange(1024)[None, :]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        normal(0, Purpose.NOISE, draws, elements)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1  # about 5 ms on one core; the bound only catches a loop over elements
