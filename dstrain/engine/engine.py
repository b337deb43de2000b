"""The trained module under DeepSpeed, stages 0 to 3, with or without offload."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from dstrain.engine.ds_config import stage
from dstrain.models.base import DiT

Fill = Callable[[str, torch.Size, int, int], Tensor]


class Engine:
    """Forward, exact accumulation, and the optimizer step of one module.

    Loss and gradients are those of the global batch: every rank adds `loss / global_batch_size` of its own samples,
    in as many micro-steps as it likes as long as all ranks take equally many.
    """

    def __init__(self, module: DiT, config: dict[str, Any]) -> None:
        self.config = config
        groups = list(_parameter_groups(module, config))
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.ds, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)

    @property
    def module(self) -> DiT:
        """The module itself; under stage 3 its parameters are shards."""
        return self.ds.module

    def __call__(self, *args: Any) -> Tensor:
        """Forward of the module."""
        return self.ds(*args)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of this rank's part of the loss; `last` marks the last micro-step of the step."""
        self.ds.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; a sum over ranks is what the global mean needs.
        self.ds.backward(loss * dist.get_world_size())
        if not last:
            self.ds.step()  # lets DeepSpeed count the micro-step; moves no weight

    def step(self, lr: float) -> float:
        """Clip, update, and return the norm of the global batch's gradient before clipping.

        A norm that is not finite means that no weight was changed.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        self._forget_bias_correction()
        if stage(self.config) == 0 and not self.config["bf16"]["enabled"]:
            # In fp32 without ZeRO, DeepSpeed keeps no norm and does not look; gradients are whole on every rank there.
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]).item()
            if not math.isfinite(norm):
                self.module.zero_grad()
                return norm
            self.ds.step()
            return norm
        self.ds.step()
        return float(self.ds.get_global_grad_norm())

    def apply_settings(self) -> None:
        """Put the optimizer settings and the clipping of this run's config into force."""
        for group, wanted in zip(self.ds.optimizer.param_groups, self._settings, strict=True):
            group.update(wanted)
        if hasattr(self.ds.optimizer, "clip_grad"):
            self.ds.optimizer.clip_grad = self.config["gradient_clipping"]

    def _forget_bias_correction(self) -> None:
        """Make the CPU Adam's bias correction a function of the step.

        Its C++ object multiplies beta^t up from step to step in fp32, but starts from pow(beta, t) after a restart, and
        the two round differently: a resumed run would drift by ulps. Told of step 0 first, it takes pow each time.
        """
        adam = getattr(self.ds.optimizer, "optimizer", None)
        if isinstance(adam, DeepSpeedCPUAdam):
            beta1, beta2 = adam.param_groups[0]["betas"]
            none = torch.zeros(1)
            adam.ds_opt_adam.adam_update(adam.opt_id, 0, 0.0, beta1, beta2, 1.0, 0.0, False, none, none, none, none)

    def parameters_gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) one at a time, in order; collective: every rank must exhaust it."""
        for name, p in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                yield name, p.detach()

    def shapes(self) -> dict[str, torch.Size]:
        """Whole shapes of all parameters, in the order of `parameters_gathered`."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self.module.named_parameters()}


def build_engine(make: Callable[[], DiT], fill: Fill, config: dict[str, Any], device: torch.device) -> Engine:
    """Build the module, give it its weights and wrap it.

    Args:
        make: builds the module; under stage 3 its parameters are born partitioned.
        fill: `fill(name, shape, start, stop)` returns elements [start, stop) of the flattened weight; under stage 3 a
            rank asks for its own slice only.
        config: a completed ds_config.
        device: where the module computes.
    """
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    if stage(config) == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            module = make()
        for name, p in module.named_parameters():
            _fill_shard(name, p, fill)
        if "leaf_module" not in config["zero_optimization"]:
            # One gather a block: hooks on each of its 32 tensors would cost more than the transfers.
            set_z3_leaf_modules(module, [module.block_class])
    else:
        with torch.device("meta"):
            module = make()
        module = module.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(fill(name, p.shape, 0, p.numel()).view(p.shape))
    return Engine(module, config)


def _fill_shard(name: str, p: Any, fill: Fill) -> None:
    shard = p.ds_tensor
    start = dist.get_rank(p.ds_process_group) * shard.numel()
    values = fill(name, p.ds_shape, start, min(start + shard.numel(), p.ds_numel))
    shard.data.zero_()  # the last ranks' shards are padded
    shard.data[: len(values)].copy_(values)


def _parameter_groups(module: nn.Module, config: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Matrices decay; norms and biases do not (Loshchilov and Hutter leave the choice; this is the usual one)."""
    params = config["optimizer"]["params"]
    trained = [p for p in module.parameters() if p.requires_grad]
    for matrices in (True, False):
        group = [p for p in trained if (len(getattr(p, "ds_shape", p.shape)) > 1) == matrices]
        if group:
            decay = params["weight_decay"] if matrices else 0.0
            yield {"params": group, "weight_decay": decay, "betas": tuple(params["betas"]), "eps": params["eps"]}
