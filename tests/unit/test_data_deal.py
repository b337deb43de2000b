"""Dealing samples to packs: nothing lost, nothing over the budget, no rank without work, packs full and even."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.deal import deal

ATTENTION = 18_432


@given(
    st.integers(1, 12), st.integers(1, 400), st.integers(1, 8), st.integers(0, 11),
    st.sampled_from(["any", "longest", "half", "just over half", "ones"]), st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_whatever_the_lengths(ranks: int, capacity: int, rounds: int, rest: int, kind: str, random) -> None:
    if rest % ranks and capacity < 2:
        return
    most = capacity // 2 if rest % ranks else capacity  # what a plan asks for where the batch does not divide
    lengths = {
        "any": lambda: random.randint(1, most),
        "longest": lambda: most,
        "half": lambda: max(1, most // 2),
        "just over half": lambda: min(most, most // 2 + 1),
        "ones": lambda: 1,
    }
    n = ranks * rounds + rest % ranks
    tokens = np.array([lengths[kind if random.random() < 0.8 else "any"]() for _ in range(n)])
    costs = tokens * (random.choice([1, 100, ATTENTION]) + tokens)
    micros = deal(tokens, costs, ranks=ranks, capacity=capacity)
    packs = [pack for micro in micros for pack in micro]
    assert all(len(micro) == ranks for micro in micros)
    assert sorted(place for pack in packs for place in pack) == list(range(n))
    assert all(pack and pack == sorted(pack) and tokens[pack].sum() <= capacity for pack in packs)
    assert len(micros) >= -(-int(tokens.sum()) // (ranks * capacity))


@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize("fill", [0.9, 0.97, 0.985])
def test_full_packs_of_even_cost(ranks: int, fill: float) -> None:
    """Four micro-steps of about 14 samples a pack: the fewest that can be, and hardly any waiting."""
    rng = np.random.default_rng(ranks)
    capacity, micros = 32_768, 4
    tokens = rng.integers(256, 4500, 20 * micros * ranks)
    tokens = tokens[: np.searchsorted(np.cumsum(tokens), fill * micros * ranks * capacity)]
    tokens = tokens[: len(tokens) // ranks * ranks]
    costs = tokens * (ATTENTION + tokens)
    dealt = deal(tokens, costs, ranks=ranks, capacity=capacity)
    assert len(dealt) == micros
    loads = np.array([[costs[pack].sum() for pack in micro] for micro in dealt])
    assert loads.max(axis=1).sum() <= 1.03 * loads.mean(axis=1).sum()
