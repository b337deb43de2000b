"""Kills at any moment, disks that fail and a W&B that is not there: the run goes on, or goes on later, bit by bit."""

import random
import signal
import time

import pytest
from launches import Launch, assert_same_run, launch, losses, saved, undisturbed_run

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return undisturbed_run(tmp_path_factory.mktemp("whole"), steps=8, save_every=1)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 8))])
def test_a_kill_at_any_moment_loses_nothing(whole, tmp_path, seed):
    recipe, undisturbed = whole
    run_dir, rng = tmp_path / "run", random.Random(seed)
    ranks = [[0], [1], [0, 1]][seed % 3]
    slow = {"at": "step", "do": "sleep", "seconds": 0.1}
    with Launch(recipe, f"run_dir={run_dir}", faults=[slow]) as run:
        run.until_step(run_dir, rng.randint(0, 4))
        time.sleep(rng.uniform(0, 0.4))
        run.send(signal.SIGKILL, *ranks)
        run.ends(20)
    there = saved(run_dir)
    output = launch(recipe, f"run_dir={run_dir}")
    if there:
        assert f"continuing from {run_dir / 'checkpoints'}/step-{there[0]:08d}" in output
    assert_same_run(run_dir, undisturbed)
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.parametrize("name", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.soak)])
def test_a_save_that_fails_is_borne_and_the_next_one_works(whole, tmp_path, name):
    recipe, undisturbed = whole
    run_dir, there = tmp_path / "run", tmp_path / "there"
    # The tenth write of rank 1, which writes nothing but its part of checkpoints, is in the first of them.
    fault = {"at": "write", "do": name, "rank": 1, "nth": 10, "once": str(there)}
    output = launch(recipe, f"run_dir={run_dir}", faults=[fault])
    assert there.exists()
    assert output.count("The training goes on, and will save again in its turn") == 1
    assert "step-00000001: not saved (rank 1: " in output
    assert "MiB are free" in output
    assert saved(run_dir) == [8, 7]
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert_same_run(run_dir, undisturbed)


def test_a_last_save_that_fails_is_a_failure_and_can_be_made_up_for(whole, tmp_path):
    recipe, undisturbed = whole
    run_dir, there = tmp_path / "run", tmp_path / "there"
    fault = {"at": "write", "do": "ENOSPC", "rank": 1, "nth": 10, "once": str(there)}
    launch(recipe, f"run_dir={run_dir}", "train.steps=4")
    output = launch(recipe, f"run_dir={run_dir}", "train.save_every=100", faults=[fault], code=1)
    assert output.count("dstrain: error: ") == 1
    assert "step-00000008: not saved (rank 1: " in output and "Traceback" not in output
    assert saved(run_dir) == [4, 3]
    launch(recipe, f"run_dir={run_dir}")
    assert_same_run(run_dir, undisturbed)


def test_more_failed_saves_than_are_borne_end_the_run(whole, tmp_path):
    recipe, _ = whole
    run_dir = tmp_path / "run"
    faults = [{"at": "write", "do": "EIO", "rank": 1}]
    output = launch(recipe, f"run_dir={run_dir}", "train.failed_saves=1", faults=faults, code=1)
    assert output.count("The training goes on, and will save again in its turn") == 1
    assert "step-00000002: not saved (rank 1: " in output
    assert saved(run_dir) == [] and len(losses(run_dir)) >= 2


def test_a_dead_wandb_server_neither_stops_nor_holds_up_the_run(whole, tmp_path):
    recipe, undisturbed = whole
    run_dir = tmp_path / "run"
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "WANDB_DIR": str(tmp_path)}
    with Launch(recipe, f"run_dir={run_dir}", "tracking.wandb=online", env=env) as run:
        run.until_step(run_dir, 7)
        last = time.monotonic()
        codes = run.ends(40)
        seconds, output = time.monotonic() - last, run.output
    assert codes == [0, 0], output[-4000:]
    assert seconds < 20  # eight are allowed to W&B; the rest is for a machine that others use too
    assert "0123456789" * 4 not in output
    assert_same_run(run_dir, undisturbed)
