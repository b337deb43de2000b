"""Set before anything imports torch or Triton: one thread a process, and Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name.startswith("test_engine_"))  # last: see below
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files are dealt to the workers of pytest-xdist in the order of `items`.

    All that start whole runs, whose ranks watch each other's time, are one piece, which is begun first. Files of the
    engine, whose ranks do not, fill the end.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "runs" if file.startswith("tests/dist/") and "/test_engine_" not in file else file

    config.option.loadscopereorder = False  # else pieces of the most tests come first
    return Scheduling(config, log)
