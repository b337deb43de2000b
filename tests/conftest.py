"""Set before anything imports torch or Triton: one thread a process, and Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files are dealt to the workers of pytest-xdist; all that start ranks are one piece, which is begun first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "tests/dist" if nodeid.startswith("tests/dist/") else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # else pieces of the most tests come first
    return Scheduling(config, log)
