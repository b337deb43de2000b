"""Runs that are asked to stop, by whatever way, rank and launcher: one agreed step, a checkpoint, and the same bits."""

import os
import signal
import time

import pytest
from launches import Launch, assert_same_run, launch, losses, saved, undisturbed_run

pytestmark = pytest.mark.dist

SLOW = {"at": "step", "do": "sleep", "seconds": 0.2}  # each step, so that there is time to stop it
RANKS = {"rank 0": [0], "rank 1": [1], "both": [0, 1]}
IN_CI = [
    ("SIGTERM", "both", "bare", "idle"),
    ("SIGUSR1", "rank 1", "torchrun", "idle"),
    ("SIGINT", "rank 0", "bare", "mid-save"),
    ("STOP", "", "deepspeed", "mid-save"),
    ("SIGTERM", "rank 1", "bare", "before step 1"),
    ("max_minutes", "", "bare", "idle"),
]
SOAK = [
    ("SIGTERM", "rank 0", "deepspeed", "idle"),
    ("SIGTERM", "rank 1", "torchrun", "mid-save"),
    ("SIGTERM", "both", "deepspeed", "mid-save"),
    ("SIGTERM", "rank 1", "deepspeed", "idle"),
    ("SIGUSR1", "rank 0", "bare", "mid-save"),
    ("SIGUSR1", "both", "deepspeed", "idle"),
    ("SIGUSR1", "rank 0", "torchrun", "before step 1"),
    ("SIGINT", "rank 1", "torchrun", "idle"),
    ("SIGINT", "both", "deepspeed", "before step 1"),
    ("SIGINT", "both", "torchrun", "mid-save"),
    ("STOP", "", "bare", "idle"),
    ("STOP", "", "torchrun", "before step 1"),
]
# torchrun says 1 whatever its ranks say; deepspeed passes on what the first of them said.
CODES = {"bare": [75, 75], "deepspeed": [75], "torchrun": [1]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return undisturbed_run(tmp_path_factory.mktemp("whole"), steps=12, save_every=3)


@pytest.mark.parametrize(
    ("how", "who", "launcher", "when"), [*IN_CI, *(pytest.param(*case, marks=pytest.mark.soak) for case in SOAK)]
)
def test_a_wish_to_stop_is_agreed_on_and_nothing_is_lost(whole, tmp_path, how, who, launcher, when):
    recipe, undisturbed = whole
    run_dir, hold, there = tmp_path / "run", tmp_path / "hold", tmp_path / "there"
    run_dir.mkdir()
    place = {"mid-save": ("write", 5), "before step 1": ("barrier", 1)}.get(when)
    faults = [SLOW]
    if place:  # rank 1 writes nothing but its part of checkpoints
        at, nth = place
        faults = [{"at": at, "do": "sleep", "seconds": 2, "rank": 1, "nth": nth, "once": str(there)}, SLOW]
    argv = [f"run_dir={run_dir}", *(["train.max_minutes=0.02"] if how == "max_minutes" else [])]
    with Launch(recipe, *argv, launcher=launcher, faults=faults, env={"DSTRAIN_HOLD_FILE": str(hold)}) as run:
        run.until(there.exists) if place else run.until_step(run_dir, 1 if how != "max_minutes" else 0)
        if how == "STOP":
            (run_dir / "STOP").touch()
        elif how != "max_minutes":
            run.send(getattr(signal, how), *RANKS[who])
        codes, output = run.ends(), run.output
    assert codes == CODES[launcher], output[-4000:]
    assert output.count("; the same command continues") == 1, output[-4000:]
    assert hold.exists() == (how in ("SIGINT", "STOP"))
    assert not (run_dir / "STOP").exists()
    assert not any(path.name.startswith(".") for path in (run_dir / "checkpoints").glob(".*"))
    if when == "before step 1" and how != "STOP":  # which is looked for once a step
        assert "nothing to save" in output
        assert not saved(run_dir) and not losses(run_dir)
    else:
        assert 0 < saved(run_dir)[0] == len(losses(run_dir)) < 12
        assert f"after step {saved(run_dir)[0]} of 12, with a checkpoint" in output
    launch(recipe, f"run_dir={run_dir}")
    assert_same_run(run_dir, undisturbed)


def test_a_second_signal_is_ignored_and_a_third_ends_without_saving(whole, tmp_path):
    recipe, undisturbed = whole
    run_dir, there = tmp_path / "run", tmp_path / "there"
    # Of the second checkpoint: it begins with the first signal, after a step that does not save by itself.
    slow_save = {"at": "save", "do": "sleep", "seconds": 60, "nth": 2, "rank": 1, "once": str(there)}
    with Launch(recipe, f"run_dir={run_dir}", faults=[SLOW, slow_save]) as run:
        run.until_step(run_dir, 3)
        run.send(signal.SIGTERM, 0, 1)
        run.until(there.exists)  # rank 0 waits for rank 1 in a collective now, and no handler of its main thread runs
        run.send(signal.SIGTERM, 0, 1)
        time.sleep(1)
        assert len(run.alive()) == 2, "the second signal has ended it"
        run.send(signal.SIGTERM, 0, 1)
        codes, output = run.ends(5), run.output
    assert codes == [1, 1]
    assert "SIGTERM: ended without saving; what was saved before is intact" in output
    assert saved(run_dir) == [3]
    launch(recipe, f"run_dir={run_dir}")
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize(
    ("launcher", "word", "number"),
    [
        ("deepspeed", "bin/deepspeed", signal.SIGKILL),
        ("torchrun", "bin/torchrun", signal.SIGKILL),
        pytest.param("deepspeed", "bin/deepspeed", signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param("deepspeed", "deepspeed.launcher.launch", signal.SIGKILL, marks=pytest.mark.soak),
        pytest.param("deepspeed", "deepspeed.launcher.launch", signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param("torchrun", "bin/torchrun", signal.SIGTERM, marks=pytest.mark.soak),
    ],
)
def test_no_rank_outlives_its_launcher(whole, tmp_path, launcher, word, number):
    recipe, undisturbed = whole
    run_dir = tmp_path / "run"
    with Launch(recipe, f"run_dir={run_dir}", launcher=launcher, faults=[SLOW]) as run:
        run.until_step(run_dir, 1)
        os.kill(run.launcher(word), number)
        run.ends(8)
        output = run.output
    assert 0 < saved(run_dir)[0] == len(losses(run_dir)) < 12, output[-4000:]
    launch(recipe, f"run_dir={run_dir}")
    assert_same_run(run_dir, undisturbed)


def test_two_runs_cannot_have_one_folder(whole, tmp_path):
    recipe, _ = whole
    run_dir = tmp_path / "run"
    with Launch(recipe, f"run_dir={run_dir}", faults=[{**SLOW, "seconds": 5}]) as run:
        run.until_step(run_dir, 0)
        holder = run.rank(0)
        output = launch(recipe, f"run_dir={run_dir}", code=2)
        assert len(run.alive()) == 2, "the first run goes on"
    assert f"is in use by process {holder} on " in output
    assert output.count("dstrain: error") == 1
