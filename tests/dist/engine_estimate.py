"""Runs on each rank: what DeepSpeed really allocates, counted tensor by tensor, and the peak of the process."""

import gc
import re
from pathlib import Path
from typing import Any

import torch

from dstrain.engine import distributed
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

SMALL = QwenImageParams(num_layers=6, num_attention_heads=2, joint_attention_dim=256)  # 14.6 M parameters
LARGE = QwenImageParams(num_layers=3, num_attention_heads=8, joint_attention_dim=1024)  # 118 M


def settings(bf16: bool, zero: dict[str, Any], extra: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The JSON that DeepSpeed is given; buffers are small, so that states are what counts."""
    small = {
        "reduce_bucket_size": 1000,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_max_live_parameters": 1000,
        "stage3_param_persistence_threshold": 100,
        "sub_group_size": 10**9,
    }
    adam = {"lr": 1e-4} if "offload_optimizer" in zero else {"lr": 1e-4, "torch_adam": True, "fused": True}
    return {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 40,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16, **extra.get("bf16", {})},
        **({"data_types": extra["data_types"]} if "data_types" in extra else {}),
        "zero_optimization": small | zero,
        "optimizer": {"type": "AdamW", "params": adam},
    }


def build(params: QwenImageParams, config: dict[str, Any], trained: str) -> tuple[Any, QwenImageDiT]:
    """A plain DeepSpeed engine, not this project's; parameters whose name has `trained` in it train."""
    import deepspeed

    torch.manual_seed(0)
    if config["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = QwenImageDiT(params)
    else:
        model = QwenImageDiT(params).to(torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    chosen = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=chosen, config=config)
    return engine, model


def backward(engine: Any, params: QwenImageParams) -> None:
    layout = PackLayout.build([[(1, 2, 2)]], [2])
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 64, generator=g), torch.randn(2, params.joint_attention_dim, generator=g)
    engine.backward(engine(*inputs, torch.rand(1, generator=g), layout).float().square().mean())


def live() -> dict[int, tuple[int, Any]]:
    """Bytes and storage of every tensor that Python or a gradient holds, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes():
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = (storage.nbytes(), storage)
    return found


def states(cases: dict[str, tuple[bool, dict[str, Any], dict[str, Any], str]]) -> dict[str, list[int]]:
    """Per case the bytes that are alive after the first backward, the first step, and the second backward."""
    world = distributed.start()
    results = {}
    for name, (bf16, zero, extra, trained) in cases.items():
        before = live()  # holds these storages, so that no new one can have the address of an old one
        engine, model = build(SMALL, settings(bf16, zero, extra, world.size), trained)
        rows = []
        for step in range(2):
            backward(engine, SMALL)
            rows.append(sum(size for at, (size, _) in live().items() if at not in before))
            engine.step()
            if step == 0:
                rows.append(sum(size for at, (size, _) in live().items() if at not in before))
        results[name] = rows
        del engine, model
    return results


def peak(zero: dict[str, Any], extra: dict[str, Any]) -> tuple[int, int]:
    """Resident bytes of the process before the model, and its peak after two steps."""
    world = distributed.start()
    import deepspeed  # noqa: F401, what it loads is not the model's

    before = _status("VmRSS")
    engine, _ = build(LARGE, settings(True, zero, extra, world.size), "")
    for _ in range(2):
        backward(engine, LARGE)
        engine.step()
    return before, _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
