"""Before the first rank starts, DeepSpeed's C++ ops are compiled: minutes once, nothing later."""

import subprocess
import sys

import pytest
from small_runs import ROOT, environment

WARM_UP = """
from dstrain.engine.distributed import keep_compiled_ops
keep_compiled_ops()
from deepspeed.accelerator import get_accelerator
for op in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    get_accelerator().create_op_builder(op).load()
"""


@pytest.fixture(scope="session", autouse=True)
def compiled_ops():
    subprocess.run([sys.executable, "-c", WARM_UP], cwd=ROOT, env=environment(), check=True, timeout=1500)
