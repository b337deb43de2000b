"""The laws of the plan: order, sources, partition, budget, balance, and independence of the world size."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dstrain.data import Draw, Plan
from dstrain.data import order as order_module
from dstrain.data.order import Mixture, SourceOrder
from dstrain.data.plan import Part
from dstrain.errors import ConfigError
from dstrain.rng import Purpose, shuffled

WORLDS = (1, 2, 3, 4, 8)


class Rows:
    """A dataset that is nothing but its tokens, in `counts` rows a shard."""

    def __init__(self, tokens: Sequence[int] | np.ndarray, parts: Sequence[Part] | None = None) -> None:
        self.all = np.asarray(tokens, np.int64)
        self.parts = parts or [Part(np.array([len(self.all)]), len(self.all))]
        self.max_tokens = int(self.all.max(initial=0))

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        return self.all[rows]


def make(tokens: Any, world_size: int = 2, parts: Sequence[Part] | None = None, **options: Any) -> Plan:
    defaults = {"seed": 0, "global_batch_size": 8, "tokens_per_pack": 100}
    return Plan(Rows(tokens, parts), world_size=world_size, **(defaults | options))


@st.composite
def shards(draw: st.DrawFn) -> np.ndarray:
    counts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any))
    return np.array(counts)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Rows, dict[str, int]]:
    """Up to three sources with repeats, in shards of any size, some of them empty."""
    counts = draw(st.lists(shards(), min_size=1, max_size=3))
    parts = [Part(c, int(c.sum()) * draw(st.integers(1, 3))) for c in counts]
    n = sum(int(c.sum()) for c in counts)
    budget = draw(st.integers(1, 300))
    tokens = draw(st.lists(st.integers(1, budget), min_size=n, max_size=n))
    return Rows(tokens, parts), {
        "seed": draw(st.integers(0, 2**64 - 1)),
        "global_batch_size": draw(st.integers(1, n)),
        "tokens_per_pack": budget,
        "window": draw(st.integers(1, 40)),
    }


@given(plans(), st.integers(0, 10**6), st.sampled_from([None, 1, 100, 18432]))
@settings(max_examples=200, deadline=None)
def test_a_step_is_a_partition_within_the_budget(
    case: tuple[Rows, dict[str, int]], step: int, attention: int | None
) -> None:
    rows, options = case
    size, budget = options["global_batch_size"], options["tokens_per_pack"]
    batches = []
    for world_size in (world for world in WORLDS if world <= size):
        try:
            plan = Plan(rows, world_size=world_size, attention_length=attention, **options)
        except ConfigError:
            assert size % world_size and 2 * rows.max_tokens > budget  # all that these cases can get wrong
            continue
        micros = plan.step(step)
        packs = [pack for micro in micros for pack in micro]
        assert all(len(micro) == world_size for micro in micros)
        assert all(sum(int(rows.all[row]) for _, row in pack) <= budget for pack in packs)
        assert all(packs)
        assert all(pack == sorted(pack) for pack in packs)
        batches.append(sorted(draw for pack in packs for draw in pack))
        assert batches[-1] == plan.batch(step)
    assert all(batch == batches[0] for batch in batches)
    assert [draw.draw for draw in batches[0]] == list(range(step * size, (step + 1) * size))


@given(shards(), st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(1, 13), st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_each_row_comes_once_an_epoch(counts: np.ndarray, seed: int, window: int, size: int, epoch: int) -> None:
    order = SourceOrder(counts, seed=seed, window=window)
    n = order.n
    first = epoch * n
    pieces = [order.rows(place, min(size, first + 3 * n - place)) for place in range(first, first + 3 * n, size)]
    rows = np.concatenate(pieces)
    for number in range(3):
        assert sorted(rows[number * n : (number + 1) * n].tolist()) == list(range(n))
    assert np.array_equal(
        rows[n // 2 :], SourceOrder(counts, seed=seed, window=window).rows(first + n // 2, 3 * n - n // 2)
    )


@given(shards(), st.integers(1, 40), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_what_is_read_at_one_time_lies_in_a_window_of_shards(counts: np.ndarray, window: int, epoch: int) -> None:
    order = SourceOrder(counts, seed=5, window=window)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    place, seen = epoch * order.n, []
    while place < (epoch + 1) * order.n:
        within = order.shards(place)
        rows = order.rows(place, int(counts[within].sum()))
        assert set(shard_of[rows].tolist()) == set(within.tolist())  # whole shards, and all of them
        assert counts[within].sum() - counts[within[-1]] < window  # no more than it takes to fill the window
        seen += within.tolist()
        place += len(rows)
    assert sorted(seen) == np.flatnonzero(counts).tolist()


@given(plans())
@settings(max_examples=100, deadline=None)
def test_an_epoch_holds_each_sample_as_often_as_its_source_says(case: tuple[Rows, dict[str, int]]) -> None:
    rows, options = case
    size = sum(part.share for part in rows.parts)
    plan = Plan(rows, world_size=1, **(options | {"global_batch_size": 1}))
    for epoch in (0, 3):
        found = Counter(row for step in range(epoch * size, (epoch + 1) * size) for _, row in plan.batch(step))
        first = 0
        for part in rows.parts:
            n = int(part.counts.sum())
            assert {found[row] for row in range(first, first + n)} <= {part.share // n} if n else {0}
            first += n


@given(st.lists(st.integers(1, 10**7), min_size=2, max_size=6), st.integers(0, 10**9))
@example([1, 1, 131070], 0)
@example([1, 10**9], 12345)
@example([1, 1], 3)
@settings(max_examples=50, deadline=None)
def test_sources_come_in_proportion_to_their_shares(shares: list[int], block: int) -> None:
    """Over any number of draws that ends with a block, to less than one draw; and without a gap or a repetition."""
    mixture = Mixture(shares, seed=1)
    size, total = min(sum(shares), 1 << 16), sum(shares)
    begins, ends = mixture._begins(block), mixture._begins(block + 1)
    assert all(0 <= block * size * share / total - begin < 1 + 1e-6 for share, begin in zip(shares, begins))
    source, number = mixture.numbers(sum(begins), sum(ends) - sum(begins))
    for k in range(len(shares)):
        assert np.array_equal(number[source == k], np.arange(begins[k], ends[k]))
    offset = min(7, sum(begins))
    whole = mixture.numbers(sum(begins) - offset, offset + size)
    cut = mixture.numbers(sum(begins), size)
    assert all(np.array_equal(a[offset:], b) for a, b in zip(whole, cut))


def test_a_small_source_comes_as_rarely_as_it_should() -> None:
    mixture = Mixture([1, 10**6], seed=0)
    drawn = np.concatenate([mixture.numbers(first, 10**5)[0] for first in range(0, 4 * 10**6, 10**5)])
    assert 3 <= int((drawn == 0).sum()) <= 4


@given(plans(), st.lists(st.integers(0, 50), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_step_does_not_depend_on_what_was_asked_before(case: tuple[Rows, dict[str, int]], steps: list[int]) -> None:
    rows, options = case
    used = Plan(rows, world_size=1, **options)
    for step in steps:
        assert used.step(step) == Plan(rows, world_size=1, **options).step(step)


def test_epochs_seeds_and_sources_have_orders_of_their_own() -> None:
    plan = make([1] * 64, global_batch_size=64)
    orders = [tuple(row for _, row in plan.batch(epoch)) for epoch in range(3)]
    orders.append(tuple(row for _, row in make([1] * 64, global_batch_size=64, seed=1).batch(0)))
    orders += [tuple(SourceOrder(np.array([64]), seed=0, window=99, source=k).rows(0, 64).tolist()) for k in (1, 2)]
    assert len(set(orders)) == 6 and tuple(range(64)) not in orders


def test_a_batch_may_reach_into_the_next_epoch() -> None:
    plan = make([1] * 10, global_batch_size=8)
    batch = plan.batch(1)  # places 8 to 15: two of epoch 0, six of epoch 1
    first = {row for _, row in plan.batch(0)}
    assert {row for _, row in batch[:2]} == set(range(10)) - first
    assert len({row for _, row in batch[2:]}) == 6
    assert [draw for draw, _ in batch] == list(range(8, 16))


def test_the_number_of_micro_steps_is_the_least_that_fits() -> None:
    tokens = [60, 50, 40, 30, 10, 10]  # 200 in all
    cases = [(200, 1, 1), (199, 1, 2), (100, 2, 1), (100, 1, 2), (60, 1, 4), (60, 2, 2), (60, 3, 2)]
    for budget, world_size, micros in cases:
        plan = make(tokens, world_size, global_batch_size=6, tokens_per_pack=budget)
        assert len(plan.step(0)) == micros, (budget, world_size)


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_no_rank_waits_long(world_size: int) -> None:
    """Eight samples of 200 to 4,500 tokens a pack: costs of one micro-step within 3 % of their mean."""
    tokens = np.random.default_rng(0).integers(200, 4500, 64 * world_size)
    plan = make(tokens, world_size, global_batch_size=16 * world_size, tokens_per_pack=24000, attention_length=18432)
    for step in range(4):
        for micro in plan.step(step):
            costs = [int(plan.costs(tokens[[row for _, row in pack]]).sum()) for pack in micro]
            assert max(costs) <= 1.03 * np.mean(costs)
        _, used, waiting = plan.figures(step)
        assert 0.5 < used <= 1 and 0 <= waiting <= 0.03


def test_attention_counts() -> None:
    """One long sample costs more than two of half its length, and only then does it get a pack of its own."""
    tokens = [4000, 2000, 2000, 2000]
    sizes = {}
    for attention in (None, 100):
        plan = make(tokens, 2, global_batch_size=4, tokens_per_pack=9000, attention_length=attention)
        (micro,) = plan.step(0)
        sizes[attention] = sorted(len(pack) for pack in micro)
    assert sizes == {None: [2, 2], 100: [1, 3]}


def test_the_plan_does_not_change_from_version_to_version() -> None:
    """A run must continue after an upgrade: these rows are fixed."""
    plan = make([10, 20, 30, 40, 50, 60, 70, 80], 2, seed=7, global_batch_size=4, tokens_per_pack=100)
    assert plan.step(2) == [[[Draw(11, 7)], [Draw(9, 6)]], [[Draw(10, 4)], [Draw(8, 0)]]]
    two = [Part(np.array([3, 2]), 10), Part(np.array([2, 1]), 3)]
    mixed = make([10, 20, 30, 40, 50, 60, 70, 80], 2, two, seed=7, global_batch_size=4, tokens_per_pack=100, window=2)
    assert mixed.step(3) == [[[Draw(12, 2), Draw(13, 1)], [Draw(14, 0), Draw(15, 2)]]]


def test_any_step_is_reached_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One order of shards an epoch and one of rows a window is all that is computed, wherever a run begins."""
    made = []

    def counted(seed: int, n: int, purpose: Purpose, stream: tuple[int, int]) -> np.ndarray:
        made.append((purpose, n))
        return shuffled(seed, n, purpose, stream)

    monkeypatch.setattr(order_module, "shuffled", counted)
    parts = [Part(np.full(1000, 100), 100_000)]
    plan = make(np.full(100_000, 10), 4, parts, global_batch_size=64, tokens_per_pack=400, window=1000)
    for step in (10**9, 10**9 + 1, 10**9 + 3):
        plan.step(step)
    assert made == [(Purpose.SHARD_ORDER, 1000), (Purpose.ORDER, 1000)]


def test_a_billion_samples_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(order_module, "shuffled", lambda s, n, *a: sizes.append(n) or shuffled(s, n, *a))

    class Billion:
        parts = (Part(np.full(100_000, 10_000), 10**9),)
        max_tokens = 5095

        def tokens(self, rows: np.ndarray) -> np.ndarray:
            return 1000 + rows * 2654435761 % 4096

    plan = Plan(Billion(), seed=0, global_batch_size=4096, tokens_per_pack=1 << 15, world_size=1024)
    packs = [pack for step in (123_456_789, 7) for micro in plan.step(step) for pack in micro]
    assert len(packs) == 2048 and max(sizes) == 100_000  # the shards; windows are smaller


@pytest.mark.parametrize(
    ("tokens", "world_size", "options", "message"),
    [
        ([5] * 7, 2, {}, "the shards hold 7 usable samples, fewer than global_batch_size = 8"),
        ([5] * 20, 9, {}, "global_batch_size = 8 leaves some of 9 ranks without a sample; give at least 9"),
        ([5] * 20 + [101, 300], 2, {}, "a sample can have 300 tokens, more than tokens_per_pack = 100"),
        ([], 1, {"global_batch_size": 1}, "the shards hold 0 usable samples"),
        ([60] * 9, 3, {}, "not a multiple of 3 ranks.* or give tokens_per_pack = 120"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tokens: list[int], world_size: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tokens, world_size, **options)
