"""The trained module under DeepSpeed, stages 0 to 3, with or without offload."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import set_z3_leaf_modules, z3_leaf_module
from torch import Tensor, nn

from dstrain.engine.ds_rules import offload, stage
from dstrain.engine.master import Master
from dstrain.engine.moments import adam_of, adamw_8bit
from dstrain.models.base import DiT
from dstrain.models.lora import plain_name

Fill = Callable[[str, torch.Size, int, int], Tensor]


class Engine:
    """Forward, exact accumulation, and the optimizer step of one module.

    Loss and gradients are those of the global batch: every rank adds `loss / global_batch_size` of its own samples,
    in as many micro-steps as it likes as long as all ranks take equally many.
    """

    def __init__(
        self, module: DiT, config: dict[str, Any], *, ema_decay: float = 0.0, ema_on_cpu: bool = False
    ) -> None:
        self.config = config
        names = {id(p): plain_name(name) for name, p in module.named_parameters()}
        self.ds = _initialize(module, config)
        self._peak_lr = [group["lr"] for group in self.ds.optimizer.param_groups]
        self.ema_decay = ema_decay
        self.master = Master(self.ds, names)
        if ema_decay:
            self.master.start_average(torch.device("cpu") if ema_on_cpu else None)

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

    def step(self, lr_factor: float, steps_done: int = 0) -> float:
        """Clip, update at `lr_factor` of the peak rates, and return the norm of the global batch's gradient.

        The norm is that before clipping. One that is not finite means that no weight was changed. `steps_done` before
        this one let an average forget its start: its decay is at most (1 + steps_done) / (10 + steps_done).
        """
        twin = getattr(self.ds.optimizer, "backup_optimizer", None)  # of Twin-Flow's share on the GPU
        for optimizer in (self.ds.optimizer, twin) if twin else (self.ds.optimizer,):
            for group, peak in zip(optimizer.param_groups, self._peak_lr):
                group["lr"] = peak * lr_factor
        self._forget_bias_correction()
        self.master.may_change.wait()
        norm = self._step()
        if self.ema_decay and math.isfinite(norm):
            self.master.update_average(min(self.ema_decay, (1 + steps_done) / (10 + steps_done)))
        return norm

    def _step(self) -> float:
        if stage(self.config) == 0 and not self.config["bf16"]["enabled"]:
            # In fp32 without ZeRO, DeepSpeed keeps no norm and does not look; gradients are whole on every rank there.
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]).item()
            if not math.isfinite(norm):
                self.module.zero_grad()
                return norm
            self.ds.step()
            return norm
        if stage(self.config) == 3 and self.config["optimizer"]["type"] == "Muon":
            # What DeepSpeed gives afterwards is the norm of the orthogonalised update.
            norm = float(combine_grad_norm_groups(self.ds.optimizer._get_norm_groups()))
            self.ds.step()
            return norm
        self.ds.step()
        return float(self.ds.get_global_grad_norm())

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Let the module compute as it would be exported: no dropout, averaged weights if there are any; collective."""
        self.ds.eval()
        try:
            with self.master.averaged() if self.ema_decay else nullcontext():
                yield
        finally:
            self.ds.train()

    def _forget_bias_correction(self) -> None:
        """Make the CPU Adam's bias correction a function of the step.

        Its C++ object multiplies beta^t up from step to step in fp32, but starts from pow(beta, t) after a restart, and
        the two round differently: a resumed run would drift by ulps. Told of step 0 first, it takes pow each time.
        """
        adam = adam_of(getattr(self.ds.optimizer, "optimizer", None))
        if isinstance(adam, DeepSpeedCPUAdam):
            beta1, beta2 = adam.param_groups[0]["betas"]
            none = torch.zeros(1)
            adam.ds_opt_adam.adam_update(adam.opt_id, 0, 0.0, beta1, beta2, 1.0, 0.0, False, none, none, none, none)

    def parameters_gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (plain name, whole tensor) one at a time, in order; collective: every rank must exhaust it."""
        for name, p in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                yield plain_name(name), p.detach()


def build_engine(
    make: Callable[[], DiT],
    fill: Fill,
    config: dict[str, Any],
    device: torch.device,
    *,
    ema_decay: float = 0.0,
    ema_on_cpu: bool = False,
) -> Engine:
    """Build the module, give it its weights and wrap it.

    Args:
        make: builds the module, with adapters if it has any, and says what trains (requires_grad); it is called with
            the meta device as default, so that no memory is taken.
        fill: `fill(name, shape, start, stop)` returns elements [start, stop) of the flattened parameter of that plain
            name; under stage 3 a rank asks for its own slice only.
        config: a completed ds_config.
        device: where the module computes.
        ema_decay: of a running average of the weights; 0 = none.
        ema_on_cpu: keep the average in host memory.
    """
    with torch.device("meta"):
        module = make()
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    if stage(config) == 3:
        fill_partitioned(module, fill, config, dtype)
        # With leaf modules, DeepSpeed's prefetch from NVMe reads parameters that are already being read, and asserts.
        if "leaf_module" not in config["zero_optimization"] and offload(config, "param") != "nvme":
            # One gather a block: hooks on each of its 32 tensors would cost more than the transfers.
            set_z3_leaf_modules(module, [module.block_class])
    else:
        for name, owner, leaf, meta in _parameters(module):
            values = fill(name, meta.shape, 0, meta.numel()).view(meta.shape)
            values = values.to(device, dtype if meta.is_floating_point() else meta.dtype)
            setattr(owner, leaf, nn.Parameter(values, requires_grad=meta.requires_grad))
    engine = Engine(module, config, ema_decay=ema_decay, ema_on_cpu=ema_on_cpu)
    for block in module.modules():
        if isinstance(block, module.block_class):
            block.gathered = stage(config) < 3 or z3_leaf_module(block)  # type: ignore[assignment]
    return engine


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Module, str, nn.Parameter]]:
    """Plain name, owner, attribute and value of each parameter; they may be exchanged while going through them."""
    for path, owner in module.named_modules():
        for leaf, p in list(owner.named_parameters(recurse=False)):
            yield plain_name(f"{path}.{leaf}" if path else leaf), owner, leaf, p


def fill_partitioned(module: nn.Module, fill: Fill, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Give each parameter memory, this rank's slice of its values, and to ZeRO-3, one after the other.

    DeepSpeed's way, building the module inside `zero.Init`, would initialise each tensor and broadcast it from rank 0
    before the loaded weights replace it. Here the memory of a whole parameter is reserved for a moment, but only the
    slice is touched. (Uses two private methods of `zero.Init` in DeepSpeed 0.19; the parity tests hold them.)
    """
    init = deepspeed.zero.Init(config_dict_or_path=config)
    if init.mem_efficient_linear:
        init._enable_mem_efficient_linear()
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, owner, leaf, meta in _parameters(module):
        values = torch.empty(
            meta.shape, dtype=dtype if meta.is_floating_point() else meta.dtype, device=init.local_device
        )
        size = -(-meta.numel() // world)
        start, stop = min(rank * size, meta.numel()), min((rank + 1) * size, meta.numel())
        values.view(-1)[start:stop] = fill(name, meta.shape, start, stop)
        p: Any = nn.Parameter(values, requires_grad=meta.requires_grad)
        setattr(owner, leaf, p)
        init._convert_to_deepspeed_param(p)
        p.partition()
        if p.ds_tensor.numel() == size:  # else it has gone to NVMe
            p.ds_tensor.data[stop - start :].zero_()  # the last ranks' shards are padded
        p.ds_secondary_tensor = None  # hpZ's copy for the node is made by the first gather


def _initialize(module: nn.Module, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine."""
    groups, section = list(_parameter_groups(module, config)), config["optimizer"]
    chosen: dict[str, Any] = {"model_parameters": groups}
    if section["type"] == "AdamW8bit":
        chosen = {"optimizer": adamw_8bit(groups, section["params"])}
        config = {k: v for k, v in config.items() if k != "optimizer"}
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    ds = deepspeed.initialize(model=module, config=config, **chosen)[0]
    if stage(config) == 0 and config["bf16"]["enabled"]:
        # To reserve memory, DeepSpeed took a step with gradients of zero: it counts, and the weights have decayed.
        ds.optimizer.optimizer.state.clear()
        for p, master in zip(chain(*ds.optimizer.fp16_groups), chain(*ds.optimizer.fp32_groups)):
            master.data.copy_(p.data)
    return ds


def _parameter_groups(module: nn.Module, config: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Matrices decay; norms and biases do not (Loshchilov and Hutter leave the choice; this is the usual one)."""
    params = config["optimizer"]["params"]
    trained = [p for p in module.parameters() if p.requires_grad]
    for matrices in (True, False):
        group = [p for p in trained if (len(getattr(p, "ds_shape", p.shape)) > 1) == matrices]
        if group:
            decay = params["weight_decay"] if matrices else 0.0
            yield {"params": group, "weight_decay": decay, "betas": tuple(params["betas"]), "eps": params["eps"]}
