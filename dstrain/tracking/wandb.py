"""Weights & Biases, kept at arm's length: the training loop only ever puts a row into a queue.

One daemon thread imports wandb, opens the run and sends the rows. Whatever goes wrong there (no module, no key, a
dead or slow server, an error in any call) costs rows in W&B and one warning; it never raises into the loop and never
holds it up. `metrics.jsonl` has every step in any case.
"""

import importlib
import logging
import math
import netrc
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from dstrain.errors import ConfigError, did_you_mean
from dstrain.storage import write_atomic
from dstrain.tracking.redact import redact, redact_text

Mode = Literal["online", "offline", "off"]
MODES = ("auto", "online", "offline", "off")
ID_FILE = "wandb_run_id"
QUEUE_ROWS = 4096  # about an hour of one-second steps while W&B opens or catches up; then the oldest go

log = logging.getLogger(__name__)


def check_mode(mode: str) -> None:
    """Raise ConfigError when `mode` is none of `MODES`."""
    if mode not in MODES:
        raise ConfigError(
            f"wandb mode {mode!r}{did_you_mean(str(mode), MODES)} (known: {', '.join(MODES)};"
            " YAML needs quotes around 'off')"
        )


def resolve_mode(mode: str) -> Mode:
    """Turn a checked mode of the recipe into what will be done.

    "auto" follows WANDB_MODE where that is set, and otherwise goes online when there is an API key. Without a key
    "online" becomes "offline" with a warning, since wandb would stop and ask for one at the terminal.
    """
    if mode == "auto":
        asked = os.environ.get("WANDB_MODE", "")
        mode = {"disabled": "off"}.get(asked, asked)
        if mode not in ("online", "offline", "off"):
            mode = "online" if has_key() else "offline"
    if mode == "online" and not has_key():
        log.warning("W&B has no API key (WANDB_API_KEY or `wandb login`): this run is logged offline")
        return "offline"
    return cast(Mode, mode)


def has_key() -> bool:
    """Whether W&B would find credentials: WANDB_API_KEY, an identity token, or the server's entry in the netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])


def run_id(run_dir: Path) -> str:
    """Return the W&B id of the run in `run_dir`, made once, so that a resumed run continues the same curves."""
    path = run_dir / ID_FILE
    if path.exists() and re.fullmatch(r"[0-9a-f]{12}", path.read_text(errors="replace")):
        return path.read_text()
    made = secrets.token_hex(6)
    write_atomic(path, made.encode())
    return made


class WandbTracker:
    """Sends rows and pictures to one W&B run from a thread of its own.

    After a resume, steps that the crashed run had already sent are sent again; W&B keeps the first, and they are equal.
    """

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["online", "offline"],
        project: str,
        name: str,
        config: Mapping[str, Any],
        *,
        init_s: float = 30.0,
        finish_s: float = 8.0,
    ) -> None:
        """Return at once; the run opens in the background, within `init_s` seconds or offline."""
        self._mode = mode
        self._init_s, self._finish_s = init_s, finish_s
        self._run = {
            "project": redact_text(project),
            "name": redact_text(name),
            "id": run_id(run_dir),
            "dir": str(run_dir.absolute()),
            "config": redact(config),
            "save_code": False,
        }
        self._rows: deque[tuple[int, dict[str, float | Path]]] = deque(maxlen=QUEUE_ROWS)
        self._wake = threading.Event()
        self._send_until = math.inf
        self._closing = self._abandoned = False
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue a row. When the queue is full the oldest row goes."""
        self._put(step, dict(values))

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Queue a picture; the file must stay until the end of the run."""
        self._put(step, {name: path})

    def rewind(self, step: int) -> None:
        """Do nothing: W&B keeps the first row that it got for a step."""

    def sync(self) -> None:
        """Do nothing: what must last is in metrics.jsonl."""

    def finish(self) -> None:
        """Send what is queued and close the run, in `finish_s` seconds at most; then leave W&B behind."""
        if self._closing:
            return
        self._send_until = time.monotonic() + self._finish_s / 2
        self._closing = True
        self._wake.set()
        self._thread.join(0.9 * self._finish_s)
        if self._thread.is_alive():
            self._abandoned = True
            log.warning("W&B did not close within %g s and is left behind; metrics.jsonl is complete", self._finish_s)
            # wandb waits for its server once more when the interpreter exits; its teardown removes that hook first.
            unhook = threading.Thread(target=_teardown, name="wandb-teardown", daemon=True)
            unhook.start()
            unhook.join(0.1 * self._finish_s)

    def _put(self, step: int, row: dict[str, float | Path]) -> None:
        if not self._thread.is_alive():
            return  # W&B could not be opened, which was said
        if len(self._rows) == QUEUE_ROWS:
            self._warn_once("slow", "W&B does not keep up and loses its oldest rows; metrics.jsonl has them all")
        self._rows.append((step, row))
        self._wake.set()

    def _work(self) -> None:
        try:
            wandb = importlib.import_module("wandb")
            run = self._open(wandb)
        except Exception as e:
            if not self._abandoned:
                log.warning("W&B is off for this run (%s); metrics.jsonl has every step", _first_line(e))
            return
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._rows and time.monotonic() < self._send_until:
                self._send(wandb, run, *self._rows.popleft())
            if self._closing:
                break
        try:
            run.finish()
        except Exception as e:
            log.warning("W&B did not close cleanly (%s); metrics.jsonl is complete", _first_line(e))
        _teardown()

    def _open(self, wandb: Any) -> Any:
        if self._mode == "online":
            try:
                return self._init(wandb, "online")
            except Exception as e:
                if self._abandoned:
                    raise
                log.warning("W&B cannot go online (%s): this run is logged offline", _first_line(e))
                _teardown()  # the failed attempt would keep the run id occupied
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # it would hold the command line, unmasked
            init_timeout=self._init_s,
            finish_timeout=0.8 * self._finish_s,
            stop_fn=self._refuse_stop,
        )
        resume = "allow" if mode == "online" else None
        run = wandb.init(mode=mode, resume=resume, settings=settings, **self._run)
        where = run.url if mode == "online" else f"offline, upload with `wandb sync {Path(run.dir).parent}`"
        log.info("W&B: %s", where)
        return run

    def _send(self, wandb: Any, run: Any, step: int, row: dict[str, float | Path]) -> None:
        try:
            run.log({k: wandb.Image(str(v)) if isinstance(v, Path) else v for k, v in row.items()}, step=step)
        except Exception as e:
            self._warn_once("log", f"W&B refuses rows ({_first_line(e)}); metrics.jsonl has them all")

    def _refuse_stop(self) -> None:
        """W&B's Stop button would interrupt this rank alone and leave the others waiting for it."""
        self._warn_once("stop", "the Stop button of W&B does not stop a distributed run: signal the job instead")

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", message)


def _teardown() -> None:
    """End wandb's service process, where there is one, and the exit hook that waits for it."""
    with suppress(Exception, SystemExit):
        importlib.import_module("wandb").teardown()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
