"""Runs on each rank: real engines whose saves are slow on one rank."""

import json
import os
import time
from pathlib import Path

from engine_resume import build, steps

from dstrain import faults
from dstrain.engine import checkpoint, distributed
from dstrain.engine.saver import Saver


def slow_rank(cases: dict[str, tuple[dict, str]], tmp: str) -> dict[str, tuple[dict[str, float], str]]:
    """Per case (ds_config, background): seconds until each file was last written, and any damage."""
    world = distributed.start()
    results = {}
    for name, (ds, background) in cases.items():
        engine = build(ds, False, world)
        steps(engine, 0, 1, world)
        saver = Saver(engine.master, Path(tmp) / name, background=background)
        if world.rank == 1:
            faults._visits.clear()
            os.environ[faults.VARIABLE] = json.dumps([{"at": "write", "do": "sleep", "seconds": 1.0, "nth": 5}])
        distributed.barrier()
        begun = time.time()
        saver.begin(1, {})
        if background == "on":
            engine.master.may_change.wait()
            steps(engine, 1, 2, world)  # the training goes on meanwhile
        path = saver.commit()
        os.environ[faults.VARIABLE] = ""
        times = {p.name: p.stat().st_mtime - begun for p in path.iterdir()}
        results[name] = times, checkpoint.damage(path)
    return results
