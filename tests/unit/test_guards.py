"""The guards that decide from figures: spikes of the loss, data left out, steps that are not finite."""

import json
import math
from collections import Counter
from time import perf_counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.guards import NEW_LEVEL, SILENT, NonFinite, SkippedData, Spikes
from dstrain.tracking.metrics import SIGMA_BINS, sigma_bins

DEVIATIONS = 5.0
TRENDS = {
    "flat": lambda s: np.ones(len(s)),
    "falling": lambda s: 5 ** (-s / 2000),
    "rising": lambda s: 5 ** (s / 2000),
    "warm-up": lambda s: 1 + 5 * np.exp(-s / 30),
    "decay": lambda s: np.where(s < len(s) // 2, 1.0, 0.6),
}


def losses_of(rng, steps, batch, spread, trend):
    """Losses and ranges of sigma, [steps, batch] each.

    A lognormal about a curve of sigma with the bell's weights and the default shift, and what all samples of a step
    share: the trend, and a correlated wander of 6 %.
    """
    t = 1 - rng.random((steps, batch)) * 0.999
    sigmas = math.exp(0.8) / (math.exp(0.8) + (1 / t - 1))
    bell = np.exp(-2 * (t - 0.5) ** 2 / 0.25)
    curve = (
        (0.3 + 3 * (sigmas - 0.55) ** 2 + 0.5 * (1 - sigmas) ** 4) * (bell - bell.min()) / (bell - bell.min()).mean()
    )
    wander, pushes = np.zeros(steps), rng.normal(0, 0.02, steps)
    for i in range(1, steps):
        wander[i] = 0.95 * wander[i - 1] + pushes[i]
    shared = TRENDS[trend](np.arange(steps)) * np.exp(wander)
    losses = shared[:, None] * curve * np.exp(rng.normal(0, spread, (steps, batch)))
    return losses, np.minimum((sigmas * SIGMA_BINS).astype(int), SIGMA_BINS - 1)


def bins_of(losses, places):
    """[steps, 2, 4]: sums and counts."""
    inside = [places == b for b in range(SIGMA_BINS)]
    rows = [np.stack([(losses * m).sum(1) for m in inside], 1), np.stack([m.sum(1) for m in inside], 1)]
    return np.stack(rows, 1).astype(float)


def all_series(count, steps, batches, spreads):
    for i in range(count):
        rng = np.random.default_rng([11, i])
        trend = list(TRENDS)[i % len(TRENDS)]
        batch, spread = batches[i // 5 % len(batches)], spreads[i // 5 // len(batches) % len(spreads)]
        yield rng, (batch, spread, trend), bins_of(*losses_of(rng, steps, batch, spread, trend))


def regular(n=8.0, level=1.0):
    return np.array([[n * level] * SIGMA_BINS, [n] * SIGMA_BINS])


def seen(steps=100, deviations=DEVIATIONS):
    spikes = Spikes(deviations)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        assert spikes.judge(regular() * np.array([np.exp(rng.normal(0, 0.1, 4)), np.ones(4)])) is None
    return spikes


def test_bins_are_those_of_the_metrics():
    rng = np.random.default_rng(3)
    losses, sigmas = torch.rand(40), torch.tensor(rng.random(40))
    places = np.minimum((sigmas.float() * SIGMA_BINS).long().numpy(), 3)[None]
    np.testing.assert_allclose(sigma_bins(losses, sigmas), bins_of(losses.double().numpy()[None], places)[0])


def test_ten_times_the_loss_is_found_in_every_series():
    """A planted step in 1,000 series: all of it, and one range of sigma where that holds enough samples."""
    tried, missed = Counter(), Counter()
    for rng, (batch, spread, _), bins in all_series(1000, 85, (16, 32, 64, 128, 512), (0.5, 0.7)):
        at = int(rng.integers(SILENT + 5, len(bins)))
        spikes = Spikes(DEVIATIONS)
        for row in bins[:at]:
            spikes.judge(row)
        history = spikes.state()
        for what in ("step", "range"):
            row, fullest = bins[at].copy(), int(bins[at, 1].argmax())
            if what == "range" and row[1, fullest] < 60 * spread**2:
                continue
            row[0, slice(None) if what == "step" else fullest] *= 10
            spikes.restore(history)
            tried[what] += 1
            found = spikes.judge(row)
            missed[what] += found is None
            if found and what == "range" and batch >= 128:
                assert found.bin == fullest, "it is said where"
    assert tried["step"] == 1000 and tried["range"] > 500
    assert sum(missed.values()) == 0, missed


def test_one_false_alarm_in_ten_thousand_steps_at_most():
    alarms, steps = Counter(), 0
    for _, case, bins in all_series(75, 700, (8, 32, 128, 512), (0.5, 0.7, 1.0)):
        spikes = Spikes(DEVIATIONS)
        for row in bins:
            alarms[case] += spikes.judge(row) is not None
        steps += len(bins)
    assert steps > 50_000
    assert sum(alarms.values()) < steps / 10_000, +alarms


def test_the_first_steps_are_only_looked_at():
    spikes = Spikes(DEVIATIONS)
    for step in range(SILENT):
        assert spikes.judge(regular(level=1000.0 if step == 20 else 1.0)) is None
    assert spikes.judge(regular(level=10.0)) is not None


def test_a_loss_without_noise():
    spikes = Spikes(DEVIATIONS)
    for _ in range(300):
        assert spikes.judge(regular()) is None
    assert spikes.judge(regular(level=2.9)) is None, "less than three times the usual is none"
    found = spikes.judge(regular(level=3.1))
    assert found.bin is None
    assert (found.value, found.median) == (pytest.approx(3.1), pytest.approx(1.0, rel=1e-3))


def test_one_range_is_named():
    row = regular()
    row[0, 2] *= 10
    found = seen().judge(row)
    assert (found.bin, found.value) == (2, 10.0)
    assert found.median == pytest.approx(1.0, rel=0.1)
    assert "for sigma in [0.5, 0.75) is 10, usual is" in str(found)


def test_spikes_do_not_become_usual():
    spikes = seen()
    state = spikes.state()
    found = [spikes.judge(regular(level=1000.0)) for _ in range(NEW_LEVEL - 1)]
    assert all(found)
    assert found[0] == found[-1], "the last as far away as the first"
    assert spikes.state()[2:] == state[2:]
    assert spikes.judge(regular()) is None
    assert spikes.judge(regular(level=10.0))


def test_a_level_that_stays_becomes_usual():
    spikes = seen()
    alarms = sum(spikes.judge(regular(level=30.0)) is not None for _ in range(200))
    assert alarms == NEW_LEVEL
    assert spikes.judge(regular(level=300.0)) is not None


def test_a_falling_loss_is_no_spike():
    spikes = seen()
    assert not any(spikes.judge(regular(level=0.01)) for _ in range(100))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_passed_over(value):
    spikes = seen()
    state = spikes.state()
    row = regular()
    row[0, 1] = value
    assert spikes.judge(row) is None
    assert spikes.state() == state


def test_empty_ranges_and_zero_losses():
    spikes, rng = Spikes(DEVIATIONS), np.random.default_rng(1)
    for step in range(400):
        row = np.zeros((2, 4))
        row[:, step % 2] = rng.uniform(0.5, 1.5), 1.0  # one sample a step; two ranges never have any
        row[1, 3] = step % 3 == 0  # a sample of weight zero
        assert spikes.judge(row) is None
    assert spikes.judge(np.zeros((2, 4))) is None
    assert np.isnan(spikes.usual()).tolist() == [False, False, True, True]
    row[:, 2] = 1e9, 1.0
    assert spikes.judge(row) is None, "nothing is known of this range"
    row[0, :2] = 1000.0
    assert spikes.judge(row) is not None


@pytest.mark.parametrize("at", [0, 7, 49, 60, 230, 399])
def test_restored_in_the_middle_it_decides_alike(at):
    rng = np.random.default_rng(5)
    bins = bins_of(*losses_of(rng, 400, 16, 0.7, "falling"))
    bins[[70, 71, 240, 300], 0] *= 20
    straight, before = Spikes(DEVIATIONS), Spikes(DEVIATIONS)
    expected = [straight.judge(row) for row in bins]
    assert sum(x is not None for x in expected) >= 4
    verdicts = [before.judge(row) for row in bins[:at]]
    text = json.dumps(before.state(), allow_nan=False)
    assert len(text) < 16_000
    after = Spikes(DEVIATIONS)
    after.restore(json.loads(text))
    assert verdicts + [after.judge(row) for row in bins[at:]] == expected
    assert after.state() == straight.state()


def test_sums_in_another_order_decide_alike():
    rng = np.random.default_rng(6)
    bins = bins_of(*losses_of(rng, 200, 64, 0.7, "flat"))
    one, other = Spikes(DEVIATIONS), Spikes(DEVIATIONS)
    for row in bins:
        one.judge(row)
        other.judge(row * (1 + np.array([[1e-14], [0.0]])))
    assert one.state() == other.state()


def test_another_window_takes_what_fits():
    for window, other in ((200, 80), (80, 200)):
        spikes = Spikes(DEVIATIONS, window)
        for _ in range(300):
            spikes.judge(regular())
        changed = Spikes(DEVIATIONS, other)
        changed.restore(spikes.state())
        assert changed.judge(regular()) is None
        assert changed.judge(regular(level=10.0)) is not None


def test_it_costs_little():
    spikes, row = seen(300), regular()
    best = min(_seconds(spikes, row) for _ in range(5))
    assert best / 100 < 1e-3, "0.15 ms on an idle core"


def _seconds(spikes, row):
    start = perf_counter()
    for _ in range(100):
        spikes.judge(row)
    return perf_counter() - start


def test_skipped_data_by_example():
    skipped = SkippedData()
    assert [skipped.data_step(s) for s in (0, 50)] == [0, 50]
    assert skipped.skip(40, 52) == 13  # a spike at step 50, two batches more
    assert [skipped.data_step(s) for s in (39, 40, 41)] == [39, 53, 54]
    assert skipped.skip(40, 45) == 6  # again, before another checkpoint: both count
    assert [skipped.data_step(s) for s in (39, 40)] == [39, 59]
    assert skipped.skip(30, 44) == 34  # back to before the first: batches 30 to 63 were seen or left out
    assert [skipped.data_step(s) for s in (29, 30)] == [29, 64]
    assert skipped.state() == [[30, 34]]
    with pytest.raises(ValueError, match="leave out"):
        skipped.skip(5, 4)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 12), st.booleans()), min_size=1, max_size=8
    )
)
def test_no_batch_is_used_twice_and_none_that_was_left_out(events):
    """A run that goes on for some steps, meets a spike, goes back, and leaves batches out; now and then restarted."""
    skipped, step = SkippedData(), 0
    used: list[int] = []  # by the steps of the history that counts
    left_out: set[int] = set()
    for forward, back, more, restarted in events:
        for _ in range(forward + 1):
            used.append(skipped.data_step(step))
            step += 1
        spike = step - 1
        back_to = max(0, spike - back)
        batches = [skipped.data_step(s) for s in range(back_to, spike + more + 1)]
        shift = skipped.skip(back_to, spike + more)
        assert shift >= spike + more + 1 - back_to
        left_out.update(batches)
        used, step = used[:back_to], back_to
        if restarted:
            state = json.loads(json.dumps(skipped.state()))
            skipped = SkippedData()
            skipped.restore(state)
        assert used == [skipped.data_step(s) for s in range(step)], "the history stays as it was"
        ahead = [skipped.data_step(s) for s in range(step, step + 50)]
        assert all(a < b for a, b in zip(used + ahead, (used + ahead)[1:], strict=False))
        assert left_out.isdisjoint(used + ahead)
        assert ahead[0] == max(left_out) + 1, "no more than asked for is left out"


def test_going_back_forgets_what_was_decided_later():
    skipped = SkippedData()
    skipped.skip(10, 12)
    skipped.skip(20, 25)
    skipped.go_back(20)
    assert len(skipped.state()) == 2
    skipped.go_back(19)
    assert skipped.state() == [[10, 3]]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_it_halts_after_more_in_a_row_than_are_borne(limit):
    guard = NonFinite(limit)
    for _ in range(limit):
        assert guard.judge(math.nan, 1.0)
        assert not guard.must_halt
    assert not guard.judge(1.0, 2.0)
    for _ in range(limit):
        assert guard.judge(1.0, math.inf)
    assert not guard.must_halt
    again = NonFinite(limit)
    again.restore(json.loads(json.dumps(guard.state())))
    for g in (guard, again):
        assert g.judge(-math.inf)
        assert g.must_halt
        assert (g.in_a_row, g.total) == (limit + 1, 2 * limit + 1)
