"""The counter-based generator: published vectors, exact maps to floats, statistics, permutations."""

import math
import time

import numpy as np
import pytest
import torch

from dstrain.rng import Purpose, normal, normal4, philox, seed_key, shuffled, uniform, words_to_uniform

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


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_known_answers(counter, key, output):
    words = philox(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == output


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
