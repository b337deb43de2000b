"""Ranks that hang, die or lag: who it is, is said, all processes end, and the same command continues."""

import signal
import time

import pytest
from launches import Launch, assert_same_run, launch, rows, saved, undisturbed_run

pytestmark = pytest.mark.dist

MINUTES = 0.1
LIMIT = 60 * MINUTES + 14  # with room for a machine that others use too; a timeout of NCCL or gloo is minutes
QUICK = f"guard.hang_minutes={MINUTES}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return undisturbed_run(tmp_path_factory.mktemp("whole"), steps=6, save_every=2)


def ends_after(run, there, run_dir) -> float:
    """Seconds from the fault until no process is left."""
    run.until(there.exists)
    begun = time.monotonic()
    codes = run.ends(LIMIT)
    assert 0 not in codes and 75 not in codes, run.output[-4000:]
    return time.monotonic() - begun


@pytest.mark.parametrize(
    ("rank", "place"),
    [
        (0, "step"),
        (1, "save"),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in [(1, "step"), (0, "data"), (1, "data"), (0, "save"), (0, "barrier"), (1, "barrier")]
        ),
    ],
)
def test_a_rank_that_is_stopped_is_named(whole, tmp_path, rank, place):
    recipe, undisturbed = whole
    run_dir, there = tmp_path / "run", tmp_path / "there"
    fault = {"at": place, "do": "stop", "rank": rank, "once": str(there)}
    faults = [fault | ({"nth": 2} if place == "barrier" else {"step": 4})]  # the watch begins with the first barrier
    if place == "barrier":  # the second comes after a save that has failed
        faults.append({"at": "write", "do": "ENOSPC", "rank": 1, "nth": 10})
    with Launch(recipe, f"run_dir={run_dir}", QUICK, faults=faults) as run:
        seconds = ends_after(run, there, run_dir)
        pid, output = run.rank(rank), run.output
    assert seconds > 60 * MINUTES - 1
    assert f"rank {rank} (process {pid} on " in output, output[-4000:]
    assert f"rank {1 - rank} (process" not in output
    assert output.count("dstrain: error: ") == 1
    assert "what was saved is intact, and the same command continues" in output
    launch(recipe, f"run_dir={run_dir}")
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_rank_that_sleeps_is_named_as_the_one_that_is_waited_for(whole, tmp_path, rank):
    recipe, undisturbed = whole
    run_dir, there = tmp_path / "run", tmp_path / "there"
    fault = {"at": "data", "do": "sleep", "seconds": 1000, "rank": rank, "step": 3, "once": str(there)}
    with Launch(recipe, f"run_dir={run_dir}", QUICK, faults=[fault]) as run:
        ends_after(run, there, run_dir)
        pid, output = run.rank(rank), run.output
    assert f"all wait for rank {rank} (process {pid} on " in output, output[-4000:]
    assert "which is at: step 3, its data" in output
    assert output.count("dstrain: error: ") == 1
    assert "in reach" in output, "a traceback shows where it hangs"
    launch(recipe, f"run_dir={run_dir}")
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize(
    ("rank", "launcher"), [(1, "bare"), (0, "bare"), pytest.param(1, "deepspeed", marks=pytest.mark.soak)]
)
def test_a_rank_that_is_killed_is_named_and_the_others_end(whole, tmp_path, rank, launcher):
    recipe, undisturbed = whole
    run_dir = tmp_path / "run"
    slow = {"at": "step", "do": "sleep", "seconds": 0.2}
    with Launch(recipe, f"run_dir={run_dir}", faults=[slow], launcher=launcher) as run:
        run.until_step(run_dir, 2)
        pid = run.rank(rank)
        run.send(signal.SIGKILL, rank)
        codes, output = run.ends(15), run.output
    assert 0 not in codes
    assert launcher != "bare" or f"rank {rank} (process {pid} on " in output, output[-4000:]
    assert "Traceback" not in output
    launch(recipe, f"run_dir={run_dir}")
    assert_same_run(run_dir, undisturbed)


def test_who_is_slow_is_in_the_metrics(whole, tmp_path):
    recipe, _ = whole
    run_dir = tmp_path / "run"
    launch(recipe, f"run_dir={run_dir}", faults=[{"at": "data", "do": "sleep", "seconds": 0.3, "rank": 1}])
    late = rows(run_dir)[1:]  # in the first step all is slow
    assert [row["slowest_rank"] for row in late].count(1) >= len(late) - 1
    assert all(row["rank_spread_s"] > 0.2 for row in late if row["slowest_rank"] == 1)
    assert saved(run_dir)[0] == 6
