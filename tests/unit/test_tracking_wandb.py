"""W&B with everything that can go wrong there."""

import logging
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from dstrain.errors import ConfigError
from dstrain.tracking import wandb as tracking_wandb
from dstrain.tracking.jsonl import JsonlTracker, read_metrics
from dstrain.tracking.tracker import Tee, open_trackers
from dstrain.tracking.wandb import WandbTracker, has_key, resolve_mode, run_id

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in ("API_KEY", "MODE", "BASE_URL", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-such-netrc"))


# --- which mode


def test_auto_goes_online_only_with_a_key(monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve_mode("auto") == "online"


@pytest.mark.parametrize("text", ["machine", "\x00", "machine api.wandb.ai login user\n", "machine a b c d e f g"])
def test_a_broken_netrc_is_no_key(monkeypatch, tmp_path, text):
    (tmp_path / "netrc").write_text(text)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()


@pytest.mark.parametrize(("asked", "mode"), [("offline", "offline"), ("disabled", "off"), ("shared", "online")])
def test_auto_follows_the_environment(monkeypatch, asked, mode):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", asked)
    assert resolve_mode("auto") == mode
    assert resolve_mode("online") == "online"


@pytest.mark.parametrize("mode", ["onlin", "", False, None])
@pytest.mark.parametrize("is_main", [True, False])
def test_an_unknown_mode_is_refused_on_every_rank(tmp_path, mode, is_main):
    with pytest.raises(ConfigError, match="wandb mode"):
        open_trackers(tmp_path, mode, "p", "n", {}, 0, is_main)
    assert not list(tmp_path.iterdir())


def test_the_run_id_is_made_once_and_a_damaged_one_is_made_anew(tmp_path):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    (tmp_path / tracking_wandb.ID_FILE).write_bytes(b"../\xff")
    again = run_id(tmp_path)
    assert again != first
    assert run_id(tmp_path) == again


# --- faults, with a stand-in for the wandb module


class FakeWandb:
    """Records what is asked of it; `hang` names the call that waits, `fail` that which raises, `slow` that of 5 s."""

    def __init__(self, hang: str = "", fail: str = "", slow: str = "") -> None:
        self.hang, self.fail, self.slow = hang, fail, slow
        self.inits: list[dict] = []
        self.rows: list[tuple[int, dict]] = []
        self.finished = self.teardowns = 0
        self.hanging, self.release = threading.Event(), threading.Event()
        self.run = SimpleNamespace(
            log=self.log, finish=self.finish, url="https://w/r", dir="/runs/a/wandb/offline-run/files"
        )

    def trouble(self, call: str) -> None:
        if call == self.hang:
            self.hanging.set()
            assert self.release.wait(60)
        if call == self.slow:
            self.release.wait(5)
        if call == self.fail:
            raise RuntimeError(f"{call} is broken\nwith details")

    def Settings(self, **settings):
        return settings

    def Image(self, path):
        return ("image", path)

    def init(self, **options):
        self.inits.append(options)
        self.trouble("init")
        self.trouble(f"{options['mode']} init")
        return self.run

    def log(self, row, step):
        self.trouble("log")
        self.rows.append((step, row))

    def finish(self):
        self.trouble("finish")
        self.finished += 1

    def teardown(self):
        self.teardowns += 1


@pytest.fixture
def fake(monkeypatch):
    made = []

    def install(**faults) -> FakeWandb:
        module = FakeWandb(**faults)
        monkeypatch.setitem(sys.modules, "wandb", module)
        made.append(module)
        return module

    yield install
    for module in made:
        module.release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("wandb"):
            thread.join(30)


def train(run_dir: Path, steps: int, mode: str = "online", finish_s: float = 5.0, during=None) -> float:
    """Log steps as a trainer does; returns the seconds that finish took. W&B must add no time to a step."""
    jsonl = JsonlTracker(run_dir / "metrics.jsonl", first_step=0)
    wandb = WandbTracker(run_dir, mode, "project", "name", {"api_key": KEY, "lr": 1.0}, finish_s=finish_s)
    trackers = Tee([jsonl, wandb])
    if during:
        during.wait(30)
    added = []
    for step in range(steps):
        row = {"loss": 1 / (step + 1)}
        jsonl.log(step, row)
        before = time.perf_counter()
        wandb.log(step, row)
        added.append(time.perf_counter() - before)
    trackers.sync()
    assert median(added) < 1e-3, "of a step"
    start = time.monotonic()
    trackers.finish()
    trackers.finish()
    assert [r["step"] for r in read_metrics(run_dir)] == list(range(steps)), "metrics.jsonl is complete"
    return time.monotonic() - start


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_rows_and_pictures_arrive_in_order(tmp_path, fake, caplog):
    module = fake()
    tracker = WandbTracker(tmp_path, "online", "project", "name", {"api_key": KEY, "lr": 1.0})
    for step in range(2000):
        tracker.log(step, {"loss": float(step)})
    tracker.log_image(1999, "samples", tmp_path / "grid.png")
    tracker.finish()
    assert module.rows == [
        *((step, {"loss": float(step)}) for step in range(2000)),
        (1999, {"samples": ("image", str(tmp_path / "grid.png"))}),
    ]
    [options] = module.inits
    assert (options["id"], options["resume"]) == (run_id(tmp_path), "allow")
    assert options["config"] == {"api_key": "***", "lr": 1.0}
    assert options["save_code"] is False
    assert module.finished == 1
    assert module.teardowns == 1
    assert not warnings_of(caplog)
    WandbTracker(tmp_path, "online", "project", "name", {}).finish()
    assert module.inits[1]["id"] == module.inits[0]["id"], "a resumed run continues the same curves"


def test_without_the_module_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(tmp_path, 200)
    [warning] = warnings_of(caplog)
    assert "W&B is off for this run" in warning


def test_online_without_a_key_is_offline(tmp_path, fake, caplog):
    module = fake()
    tracker = open_trackers(tmp_path, "online", "project", "name", {}, 0, True)
    tracker.log(0, {"loss": 1.0})
    tracker.finish()
    assert [options["mode"] for options in module.inits] == ["offline"]
    assert module.rows == [(0, {"loss": 1.0})]
    [warning] = warnings_of(caplog)
    assert "no API key" in warning


def test_a_dead_server_turns_the_run_offline(tmp_path, fake, caplog):
    module = fake(fail="online init")
    train(tmp_path, 200)
    assert [options["mode"] for options in module.inits] == ["online", "offline"]
    assert module.inits[0]["id"] == module.inits[1]["id"]
    assert module.teardowns == 2
    assert [step for step, _ in module.rows] == list(range(200)), "the rows of the waiting time are not lost"
    [warning] = warnings_of(caplog)
    assert "RuntimeError: online init is broken" in warning
    assert "details" not in warning


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_an_init_that_always_fails_costs_w_and_b_only(tmp_path, fake, caplog, mode):
    module = fake(fail="init")
    train(tmp_path, 200, mode=mode)
    assert not module.rows
    assert len(warnings_of(caplog)) == (2 if mode == "online" else 1)


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_call_that_hangs_neither_slows_the_loop_nor_holds_the_end(tmp_path, fake, caplog, call):
    module = fake(hang=call)
    took = train(tmp_path, 200, finish_s=1.0, during=module.hanging if call == "init" else None)
    assert module.hanging.is_set(), "the whole loop and finish ran while the call hung"
    assert not module.release.is_set()
    assert took < 3
    assert module.finished == 0
    assert module.teardowns == 1, "wandb's exit hook, which would wait for it, is gone"
    [warning] = warnings_of(caplog)
    assert "did not close within 1 s" in warning


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_calls_of_five_seconds_hold_neither_the_loop_nor_the_end(tmp_path, fake, call):
    fake(slow=call)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    start = time.monotonic()
    jsonl = JsonlTracker(run_dir / "metrics.jsonl", first_step=0)
    trackers = Tee([jsonl, WandbTracker(run_dir, "online", "project", "name", {})])
    for step in range(300):
        trackers.log(step, {"loss": 1.0})
    assert time.monotonic() - start < 3, "the loop"
    trackers.finish()
    assert time.monotonic() - start < 10, "the end, with W&B's own patience"
    assert [r["step"] for r in read_metrics(run_dir)] == list(range(300))


def test_rows_that_are_refused_are_reported_once(tmp_path, fake, caplog):
    module = fake(fail="log")
    train(tmp_path, 200)
    assert module.finished == 1
    [warning] = warnings_of(caplog)
    assert "RuntimeError: log is broken" in warning


def test_a_slow_server_loses_the_oldest_rows_and_keeps_the_memory_bounded(tmp_path, fake, caplog, monkeypatch):
    monkeypatch.setattr(tracking_wandb, "QUEUE_ROWS", 100)
    module = fake(hang="init")
    tracker = WandbTracker(tmp_path, "online", "project", "name", {})
    assert module.hanging.wait(30)
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
    module.release.set()
    tracker.finish()
    assert [step for step, _ in module.rows] == list(range(900, 1000))
    [warning] = warnings_of(caplog)
    assert "loses its oldest rows" in warning


def test_a_finish_that_fails_is_reported(tmp_path, fake, caplog):
    module = fake(fail="finish")
    train(tmp_path, 20)
    assert len(module.rows) == 20
    [warning] = warnings_of(caplog)
    assert "did not close cleanly" in warning


def test_the_stop_button_does_not_interrupt_one_rank(tmp_path, fake, caplog):
    module = fake()
    tracker = WandbTracker(tmp_path, "online", "project", "name", {})
    tracker.finish()
    module.inits[0]["settings"]["stop_fn"]()
    [warning] = warnings_of(caplog)
    assert "signal the job" in warning


def test_other_ranks_and_mode_off_never_touch_w_and_b(tmp_path, fake):
    module = fake()
    for run_dir, mode, is_main in ((tmp_path / "a", "online", False), (tmp_path / "b", "off", True)):
        run_dir.mkdir()
        tracker = open_trackers(run_dir, mode, "project", "name", {}, 0, is_main)
        tracker.log(0, {"loss": 1.0})
        tracker.log_image(0, "samples", tmp_path / "grid.png")
        tracker.sync()
        tracker.finish()
    assert not module.inits
    assert not list((tmp_path / "a").iterdir())
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


# --- the real wandb, in a process of its own

RUN = """
import logging, sys, time
import psutil
from pathlib import Path
from dstrain.tracking.tracker import Tee
from dstrain.tracking.jsonl import JsonlTracker
from dstrain.tracking.wandb import WandbTracker, resolve_mode
logging.basicConfig(level=logging.INFO)
run_dir, mode, kill, wait_s, init_s, finish_s = Path(sys.argv[1]), *sys.argv[2:4], *map(float, sys.argv[4:])
jsonl = JsonlTracker(run_dir / "metrics.jsonl", first_step=0)
wandb = WandbTracker(run_dir, resolve_mode(mode), "p", "n", {"hub_token": "PLANTED-config"},
                     init_s=init_s, finish_s=finish_s)
tracker = Tee([jsonl, wandb])
added = []
for step in range(50):
    before = time.perf_counter()
    tracker.log(step, {"loss": 1 / (step + 1)})
    added.append(time.perf_counter() - before)
    if step == 25 and kill:
        while not (service := [c for c in psutil.Process().children(True) if "wandb-core" in " ".join(c.cmdline())]):
            time.sleep(0.05)
        while wandb._rows:
            time.sleep(0.05)
        for process in service:
            process.kill()
wandb._thread.join(wait_s)
before = time.perf_counter()
tracker.finish()
print("FINISHED in", time.perf_counter() - before, "median", sorted(added)[25])
"""


def real_run(run_dir: Path, mode: str, wait_s: float, init_s: float, finish_s: float, kill: str = "", **env: str):
    """Run it with its output in a file, since wandb's service may outlive it and keep a pipe open."""
    run_dir.mkdir(exist_ok=True)
    command = [sys.executable, "-c", RUN, str(run_dir), mode, kill, str(wait_s), str(init_s), str(finish_s)]
    start = time.monotonic()
    with (run_dir / "stdout").open("w") as out:
        subprocess.run(command, env=os.environ | env, stdout=out, stderr=out, check=True, timeout=120)
    assert [r["step"] for r in read_metrics(run_dir)] == list(range(50))
    text = (run_dir / "stdout").read_text()
    assert float(text.rpartition("median ")[2].split()[0]) < 1e-3, "with metrics.jsonl"
    return time.monotonic() - start, text


def test_the_real_wandb_offline_keeps_secrets_out_and_its_id(tmp_path):
    planted = {f"PLANTED_{i}_{kind}": f"PLANTED-{i}" for i, kind in enumerate(("TOKEN", "SECRET", "KEY", "NAME"))}
    run_dir = tmp_path / "run"
    for _ in range(2):
        _, output = real_run(run_dir, "offline", 0, 30, 30, WANDB_API_KEY=KEY, **planted)
        assert "wandb sync" in output
        assert "Traceback" not in output
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    runs = [path for path in files if path.suffix == ".wandb"]
    assert {path.name for path in runs} == {f"run-{run_id(run_dir)}.wandb"}
    assert all(b"loss" in path.read_bytes() for path in runs)
    leaks = [path for path in files if b"PLANTED" in path.read_bytes() or KEY.encode() in path.read_bytes()]
    assert not leaks


def rows_of(path: Path) -> dict[int, float]:
    """Losses by step in a .wandb file: a LevelDB log (7 bytes, then blocks of 32 KiB) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    rows, at, parts = {}, 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record that is whole, or the last part of one
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                values = {"".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                rows[int(values["_step"])] = float(values["loss"])
    return rows


def test_the_real_wandb_offline_run_is_complete_and_can_be_sent_later(tmp_path):
    real_run(tmp_path / "run", "offline", 0, 30, 30)
    [folder] = (tmp_path / "run/wandb").glob("offline-run-*")
    [run] = folder.glob("*.wandb")
    assert rows_of(run) == {step: 1 / (step + 1) for step in range(50)}
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)]
    sync = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert sync.returncode == 0
    assert "Would sync 1 run(s)" in sync.stdout + sync.stderr


def test_the_real_wandb_may_lose_its_service(tmp_path):
    _, output = real_run(tmp_path / "run", "offline", 0, 30, 8, kill="service")
    assert float(output.rpartition("FINISHED in ")[2].split()[0]) < 10
    [run] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert "Traceback" not in output
    assert "metrics.jsonl" in output, "it is said where all the rows are"
    assert run.exists()


def test_the_real_wandb_with_a_dead_server_goes_on_offline(tmp_path):
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    _, output = real_run(tmp_path / "run", "auto", 4, 1, 30, **env)
    assert output.count("this run is logged offline") == 1
    assert "Traceback" not in output
    [run] = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert b"loss" in run.read_bytes()


def test_the_real_wandb_cannot_hold_the_exit(tmp_path):
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    took, output = real_run(tmp_path / "run", "online", 0, 20, 2, **env)
    assert "is left behind" in output
    assert took < 15, "the process ended long before W&B gave up its server"
