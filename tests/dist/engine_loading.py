"""Runs on each rank: a checkpoint into a partitioned model, and what that reads and takes."""

import re
from pathlib import Path

import torch
from engine_parity import recipe

from dstrain.engine import distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import fill_partitioned
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.weights import Weights

PARAMS = QwenImageParams(
    num_layers=5, attention_head_dim=64, num_attention_heads=9, joint_attention_dim=256, axes_dims_rope=(16, 24, 24)
)


def make() -> QwenImageDiT:
    return QwenImageDiT(PARAMS)


def status(key: str) -> int:
    """A figure of this process in bytes."""
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def load(folder: str, offload: bool) -> dict[str, int]:
    """Bytes read, growth of the peak of memory, and whether every element is the file's."""
    world = distributed.start()
    zero = {"stage": 3} | ({"offload_param": {"device": "cpu"}} if offload else {})
    config = complete({"zero_optimization": zero}, recipe(8), world_size=world.size, bf16=False, path=Path("ds.json"))
    with torch.device("meta"):
        model = make()
    weights = Weights(Path(folder))
    warm = torch.empty(1 << 20)
    warm.zero_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    read, resident = bytes_read(), status("VmRSS")
    fill_partitioned(model, lambda name, shape, start, stop: weights.read(name, start, stop), config, torch.float32)
    result = {"read": bytes_read() - read, "peak": status("VmHWM") - resident}
    wrong = 0
    for name, p in model.named_parameters():
        start = world.rank * p.ds_tensor.numel()
        mine = weights.read(name, start, start + p.ds_tensor.numel())
        wrong += int((p.ds_tensor[: len(mine)] != mine).sum()) + int(p.ds_tensor[len(mine) :].count_nonzero())
    return result | {"wrong": wrong}
