"""Each file in ds_configs/ starts on two real ranks and follows plain PyTorch, with all weights and with adapters."""

import subprocess
import sys

import pytest
from engine_presets import Case
from ranks import run_ranks
from small_runs import ROOT, environment

from dstrain.engine.ds_config import faults, load

PRESETS = sorted((ROOT / "ds_configs").glob("*.json"))
# hpZ's process groups are one a process; the others are run one after the other in the same two.
ALONE = [p for p in PRESETS if p.stem == "zero3_hpz"]
NVME = [p for p in PRESETS if "nvme" in p.stem]
TOGETHER = [p for p in PRESETS if p not in ALONE + NVME]
BUILD_NVME = """
from dstrain.engine.distributed import keep_compiled_ops
keep_compiled_ops()
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder("AsyncIOBuilder")
if not builder.is_compatible(verbose=False):
    raise SystemExit(77)
builder.load()
"""


def preset(path, drive):
    """A shipped file, with what a user has to fit to the machine: the drive, and the GPUs of a node."""
    config = load(path)
    zero = config["zero_optimization"]
    for what in ("offload_param", "offload_optimizer"):
        if zero.get(what, {}).get("device") == "nvme":
            zero[what]["nvme_path"] = str(drive)
    if zero.get("zero_hpz_partition_size", 1) > 1:
        zero["zero_hpz_partition_size"] = 2
    assert list(faults(config)) == []
    return config


def held(tmp_path, cases):
    first, second = run_ranks(2, "engine_presets:follow", tmp_path, cases, timeout=570)
    for name, found in first.items():
        exact = "fp32" in name
        for step, (ours, loss, norm, want_norm) in enumerate(found.steps):
            near = 1e-6 if step == 0 else 1e-4
            assert ours == pytest.approx(loss, rel=near if exact else 2e-3), (name, step)
            assert norm == pytest.approx(want_norm, rel=10 * near if exact else 1e-2), (name, step)
        assert found.gap < (1e-4 if exact else 1e-2), name
        assert found.moved > 1e-3, name
        assert [s[2] for s in found.steps] == [s[2] for s in second[name].steps], name
    return first


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("paths", [TOGETHER, ALONE], ids=["together", "alone"])
def test_they_follow_plain_pytorch(tmp_path, paths):
    cases = {
        f"{path.stem} {what} {'bf16' if bf16 else 'fp32'}": Case(preset(path, tmp_path), what, bf16)
        for path in paths
        for what, bf16 in (("full", True), ("lora", False))
    }
    held(tmp_path, cases)


@pytest.fixture(scope="module")
def nvme_op():
    """DeepSpeed's asynchronous file access: twelve C++ files, compiled once for an environment."""
    done = subprocess.run([sys.executable, "-c", BUILD_NVME], cwd=ROOT, env=environment(), timeout=1500)
    if done.returncode == 77:
        pytest.skip("DeepSpeed's async_io does not compile here: install libaio's headers (Debian: libaio-dev)")
    assert done.returncode == 0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NVME, ids=lambda p: p.stem)
def test_it_follows_plain_pytorch_and_resumes_with_parameters_and_states_in_files(tmp_path, path, nvme_op):
    name = f"{path.stem} full fp32"
    config = preset(path, tmp_path)
    config["zero_optimization"]["offload_param"]["max_in_cpu"] = 0  # else the first 1e9 elements stay in memory
    case = Case(config, wide=True, folder=str(tmp_path / "checkpoints"))
    found = held(tmp_path, {name: case})[name]
    parameters, sub_groups = found.in_files
    assert parameters > 0 and sub_groups > 0
    assert found.resumed
