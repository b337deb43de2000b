"""The laws of the plan: order, partition, budget, and independence of the world size."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data import Draw, Plan
from dstrain.data import plan as plan_module
from dstrain.errors import ConfigError
from dstrain.rng import shuffled

WORLDS = (1, 2, 3, 4, 8)


def make(tokens: list[int] | np.ndarray, world_size: int = 2, **options: int) -> Plan:
    settings_ = {"seed": 0, "global_batch_size": 8, "tokens_per_pack": 100} | options
    return Plan(np.asarray(tokens, np.int64), world_size=world_size, **settings_)


@st.composite
def plans(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, int]]:
    n = draw(st.integers(1, 60))
    batch = draw(st.integers(1, n))
    budget = draw(st.integers(1, 300))
    tokens = draw(st.lists(st.integers(1, budget), min_size=n, max_size=n))
    return np.array(tokens), {
        "seed": draw(st.integers(0, 2**64 - 1)),
        "global_batch_size": batch,
        "tokens_per_pack": budget,
    }


@given(plans(), st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_a_step_is_a_partition_within_the_budget(case: tuple[np.ndarray, dict[str, int]], step: int) -> None:
    tokens, options = case
    size, budget = options["global_batch_size"], options["tokens_per_pack"]
    batches = []
    for world_size in (world for world in WORLDS if world <= size):
        try:
            plan = Plan(tokens, world_size=world_size, **options)
        except ConfigError:
            assert size % world_size  # the only thing that these cases can get wrong
            continue
        micros = plan.step(step)
        packs = [pack for micro in micros for pack in micro]
        loads = [sum(int(tokens[row]) for _, row in pack) for pack in packs]
        assert all(len(micro) == world_size for micro in micros)
        assert max(loads) <= budget
        assert loads == sorted(loads, reverse=True)
        assert all(packs)
        assert all(pack == sorted(pack) for pack in packs)
        batches.append(sorted(draw for pack in packs for draw in pack))
        assert batches[-1] == plan.batch(step)
    assert all(batch == batches[0] for batch in batches)
    assert [draw.draw for draw in batches[0]] == list(range(step * size, (step + 1) * size))


@given(plans())
@settings(max_examples=60, deadline=None)
def test_each_row_comes_once_an_epoch(case: tuple[np.ndarray, dict[str, int]]) -> None:
    tokens, options = case
    plan = Plan(tokens, world_size=1, **options)
    epochs = 3
    steps = -(-epochs * plan.n // plan.global_batch_size)
    rows = [draw.row for step in range(steps) for draw in plan.batch(step)]
    for epoch in range(epochs):
        assert sorted(rows[epoch * plan.n : (epoch + 1) * plan.n]) == list(range(plan.n))


@given(plans(), st.lists(st.integers(0, 50), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_step_does_not_depend_on_what_was_asked_before(
    case: tuple[np.ndarray, dict[str, int]], steps: list[int]
) -> None:
    tokens, options = case
    used = Plan(tokens, world_size=1, **options)
    for step in steps:
        assert used.step(step) == Plan(tokens, world_size=1, **options).step(step)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = make([1] * 64, global_batch_size=64)
    orders = [tuple(row for _, row in plan.batch(epoch)) for epoch in range(3)]
    orders.append(tuple(row for _, row in make([1] * 64, global_batch_size=64, seed=1).batch(0)))
    assert len(set(orders)) == 4 and tuple(range(64)) not in orders


def test_a_batch_may_reach_into_the_next_epoch() -> None:
    plan = make([1] * 10, global_batch_size=8)
    batch = plan.batch(1)  # places 8 to 15: two of epoch 0, six of epoch 1
    first = {row for _, row in plan.batch(0)}
    assert {row for _, row in batch[:2]} == set(range(10)) - first
    assert len({row for _, row in batch[2:]}) == 6
    assert [draw for draw, _ in batch] == list(range(8, 16))


def test_the_number_of_micro_steps_is_the_least_that_fits() -> None:
    tokens = [60, 50, 40, 30, 10, 10]  # 200 in all
    for budget, world_size, micros in [
        (200, 1, 1),
        (199, 1, 2),
        (100, 2, 1),
        (100, 1, 2),
        (60, 1, 4),
        (60, 2, 2),
        (60, 4, 1),
    ]:
        plan = make(tokens, world_size, global_batch_size=6, tokens_per_pack=budget)
        assert len(plan.step(0)) == micros, (budget, world_size)


def test_longest_first_balances_the_ranks() -> None:
    tokens = np.random.default_rng(0).integers(200, 4500, 512)
    plan = make(tokens, 8, global_batch_size=256, tokens_per_pack=33000)
    micros = plan.step(0)
    for micro in micros:
        loads = [int(tokens[[row for _, row in pack]].sum()) for pack in micro]
        assert max(loads) - min(loads) <= 0.03 * max(loads)
    assert len(micros) == -(-int(tokens[[row for _, row in plan.batch(0)]].sum()) // (8 * 33000))


def test_the_plan_does_not_change_from_version_to_version() -> None:
    """A run must continue after an upgrade: these rows are fixed."""
    plan = make([10, 20, 30, 40, 50, 60, 70, 80], 2, seed=7, global_batch_size=4, tokens_per_pack=100)
    assert plan.step(2) == [[[Draw(9, 7)], [Draw(11, 6)]], [[Draw(8, 5)], [Draw(10, 4)]]]
    assert plan.step(3) == [[[Draw(13, 3), Draw(15, 0)], [Draw(12, 1), Draw(14, 2)]]]


def test_any_step_is_reached_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One order an epoch is all that is computed, wherever a run begins."""
    made = []

    def counted(seed: int, epoch: int, n: int) -> np.ndarray:
        made.append(epoch)
        return shuffled(seed, epoch, n)

    monkeypatch.setattr(plan_module, "shuffled", counted)
    plan = make(np.full(1000, 10), 4, global_batch_size=64, tokens_per_pack=400)
    for step in (10**9, 10**9 + 1, 10**9 + 3):
        plan.step(step)
    assert made == [64 * 10**9 // 1000]
    for step in (0, 14, 15, 16, 29):  # step 15 holds places 960 to 1023
        plan.step(step)
    assert made[1:] == [0, 1]


def test_samples_and_batches_go_together() -> None:
    rows = Counter(row for step in range(10) for _, row in make([5] * 20, 4, global_batch_size=10).batch(step))
    assert set(rows.values()) == {5}


@pytest.mark.parametrize(
    ("tokens", "world_size", "options", "message"),
    [
        ([5] * 7, 2, {}, "the shards hold 7 usable samples, fewer than global_batch_size = 8"),
        ([5] * 20, 9, {}, "global_batch_size = 8 leaves some of 9 ranks without a sample; give at least 9"),
        (
            [5] * 20 + [101, 300],
            2,
            {},
            "2 of 22 samples have more tokens than tokens_per_pack = 100; give at least 300",
        ),
        ([], 1, {"global_batch_size": 1}, "the shards hold 0 usable samples"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tokens: list[int], world_size: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tokens, world_size, **options)


@pytest.mark.parametrize(
    ("tokens", "batch", "world_size", "needed"),
    [
        ([100] * 5, 5, 2, 200),
        ([90, 70, 50, 30, 10, 5], 5, 2, 120),
        ([90, 70, 50, 30, 10, 8, 6, 4, 2, 1], 7, 4, 120),
        ([60] * 9, 8, 3, 120),
        ([90, 70, 65, 60, 50], 5, 4, 110),  # no batch reaches into the next epoch
    ],
)
def test_a_rank_is_never_left_without_samples(tokens: list[int], batch: int, world_size: int, needed: int) -> None:
    """Where the batch does not divide, the budget must have room for two of the longest samples that could meet."""
    with pytest.raises(ConfigError, match=f"not a multiple of {world_size} ranks.* or give tokens_per_pack = {needed}"):
        make(tokens, world_size, global_batch_size=batch, tokens_per_pack=needed - 1)
    plan = make(tokens, world_size, global_batch_size=batch, tokens_per_pack=needed)
    assert all(pack for step in range(20) for micro in plan.step(step) for pack in micro)
    even = make(tokens, world_size, global_batch_size=world_size, tokens_per_pack=max(tokens))
    assert all(pack for step in range(20) for micro in even.step(step) for pack in micro)
