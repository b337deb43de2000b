"""The fp32 weights and optimizer state that this rank holds, whatever the ZeRO stage and wherever they lie.

DeepSpeed keeps them flattened, each rank its own part: under stage 3 a slice of every parameter, in sub-groups; under
stages 1 and 2 a range of all parameters end to end; without ZeRO all of them. Here each flat tensor is a `Group` of
`Fragment`s, so that saving, restoring and averaging need neither a gather nor to know the stage.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dstrain.engine import moments
from dstrain.engine.state import Piece, State
from dstrain.storage import idle

Names = Mapping[int, str]  # of parameters, by id


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + size) of a parameter, at `offset` of its group's flat tensor."""

    name: str
    shape: torch.Size
    start: int
    size: int
    offset: int
    weight: Callable[[], Tensor]  # the same elements of what the model computes with, 1-D

    def of(self, flat: Tensor) -> Tensor:
        """Return this fragment's elements of a tensor that lies as the flat one, as a view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.size]


@dataclass(frozen=True)
class Group:
    """A flat fp32 tensor, the optimizer that moves it, and what it is made of."""

    flat: Tensor
    optimizer: torch.optim.Optimizer
    fragments: list[Fragment]
    replicated: bool = False  # every rank has the same
    fetch: Callable[[], None] | None = None  # from NVMe
    put_back: Callable[[], None] | None = None

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Have the flat tensor and the optimizer's state of it in memory."""
        if self.fetch:
            self.fetch()
        try:
            yield
        finally:
            if self.put_back:
                self.put_back()


def groups(ds: Any, names: Names) -> list[Group]:
    """Return the flat tensors of a DeepSpeed engine (0.19); `names` has a name for every trained parameter."""
    optimizer = ds.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [_sub_group(optimizer, i, names) for i in range(len(optimizer.fp16_groups))]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        parts = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
        return [_partition(optimizer.optimizer, params, flat, names) for params, flat in parts]
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        parts = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
        return [_partition(optimizer.optimizer, params, flat, names) for params, flat in parts]
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups))
        return [_replica(optimizer.optimizer, p, master, names) for p, master in pairs]
    return [_replica(optimizer, p, p, names) for group in optimizer.param_groups for p in group["params"]]


def _sub_group(zero: Any, i: int, names: Names) -> Group:
    fragments, offset = [], 0
    for p in zero.fp16_groups[i]:
        shard = p.ds_tensor.ds_numel
        start = shard * dist.get_rank(p.ds_process_group)
        size = max(0, min(shard, p.ds_numel - start))  # the last ranks' shards are padded
        weight = partial(lambda p, size: p.ds_tensor.data[:size], p, size)
        fragments.append(Fragment(names[id(p)], p.ds_shape, min(start, p.ds_numel), size, offset, weight))
        offset += shard
    optimizer = zero.optimizer
    if zero.offload_optimizer and zero.subgroup_to_device[i] != "cpu" and hasattr(zero, "backup_optimizer"):
        optimizer = zero.backup_optimizer  # Twin-Flow's share on the GPU
    fetch = put_back = None
    if zero._swappable_optimizer_subgroup(i):
        fetch = partial(zero._optimizer_states_and_gradient_swap_in, i)
        put_back = partial(zero._optimizer_states_and_gradient_swap_out, i)
    return Group(zero.fp32_partitioned_groups_flat[i], optimizer, fragments, False, fetch, put_back)


def _partition(optimizer: torch.optim.Optimizer, params: list[Any], flat: Tensor, names: Names) -> Group:
    fragments = []
    for p in params:
        if (mapping := p._hp_mapping) is None:  # it lies on other ranks
            continue
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        weight = partial(lambda p, start, size: p.data.view(-1)[start : start + size], p, start, size)
        fragments.append(Fragment(names[id(p)], p.shape, start, size, mapping.hp_fragment_address.start, weight))
    return Group(flat, optimizer, fragments)


def _replica(optimizer: torch.optim.Optimizer, p: nn.Parameter, master: Tensor, names: Names) -> Group:
    weight = partial(lambda p: p.data.view(-1), p)
    return Group(master, optimizer, [Fragment(names[id(p)], p.shape, 0, p.numel(), 0, weight)], replicated=True)


class Master:
    """All groups of this rank, and the running average of their weights if one is kept."""

    def __init__(self, ds: Any, names: Names) -> None:
        self.ds = ds
        self.groups = groups(ds, names)
        self.average: dict[str, Tensor] = {}
        self.may_change = threading.Event()  # cleared while somebody else reads the state, which must not change then
        self.may_change.set()
        self._computes_with_average = False

    def start_average(self, device: torch.device | None) -> None:
        """Begin to average, from the weights as they are; on `device`, or where each flat tensor lies."""
        for group in self.groups:
            with group.in_memory():
                for f in group.fragments:
                    self.average[f.name] = f.of(group.flat).to(device or group.flat.device, torch.float32, copy=True)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average = decay average + (1 - decay) weights, in fp32."""
        for group in self.groups:
            with group.in_memory():
                pairs = [(self.average[f.name], f.of(group.flat)) for f in group.fragments if f.size]
                if pairs and all(a.device == w.device and a.dtype == w.dtype for a, w in pairs):
                    torch._foreach_lerp_([a for a, _ in pairs], [w for _, w in pairs], 1 - decay)
                    continue
                for average, weight in pairs:  # one by one: a copy of a whole group would not always fit
                    average.lerp_(weight.to(average.device, average.dtype), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model compute with the average; collective. The fp32 weights are not touched."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange weights and average where they have one dtype; where the weights are rounded, round them anew."""
        self.may_change.wait()
        back = self._computes_with_average
        for group in self.groups:
            with group.in_memory():
                for f in group.fragments:
                    weight, average = f.weight(), self.average[f.name]
                    if weight.dtype == average.dtype:
                        kept = weight.clone()
                        weight.copy_(average)
                        average.copy_(kept)
                    else:
                        weight.copy_(f.of(group.flat) if back else average)
        self._computes_with_average = not back
        _publish(self.ds.optimizer)

    def pieces(self) -> list[Piece]:
        """Return what of the state this rank is to save: weight, the optimizer's moments, ema."""
        found = list[Piece]()
        for group in self.groups:
            kinds = {"weight": group.flat.dtype, **moments.kinds(group.optimizer, group.flat)}
            kinds |= {"ema": torch.float32} if self.average else {}
            for f in group.fragments:
                first, last = _share(group, f)
                found.append(Piece(f.name, f.shape, f.start + first, last - first, kinds))
        return found

    @property
    def optimizer_step(self) -> int:
        """Updates that the optimizer counts."""
        return max(moments.steps(group.optimizer, group.flat) for group in self.groups)

    @property
    def is_on_disk(self) -> bool:
        """Whether DeepSpeed keeps a part of the state on NVMe, from where it can only be read between steps."""
        return any(group.fetch for group in self.groups)

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of each of `pieces`, 1-D, where they lie; they may be views."""
        for group in self.groups:
            with group.in_memory():
                flats = {"weight": group.flat, **moments.tensors(group.optimizer, group.flat)}
                for f in group.fragments:
                    first, last = _share(group, f)
                    found = {kind: f.of(flat) for kind, flat in flats.items()}
                    if self.average:
                        found["ema"] = self.average[f.name]
                    yield {kind: tensor[first:last] for kind, tensor in found.items()}

    @torch.no_grad()
    def restore(self, saved: State, *, publish: bool = False, busy: Callable[[], None] = idle) -> None:
        """Take fp32 weights, moments and average from a checkpoint.

        What the model computes with must be there already, or is brought there with `publish`, which is collective.
        busy: called again and again meanwhile.
        """
        self.may_change.wait()
        for group in self.groups:
            with group.in_memory():
                found = dict[str, Tensor]()
                for f in group.fragments:
                    busy()
                    for kind in sorted(saved.kinds) if f.size else ():  # in this order they are saved again
                        if not saved.has(kind, f.name) or (kind == "ema" and not self.average):
                            continue
                        values = saved.read(kind, f.name, f.start, f.start + f.size)
                        if kind == "weight":
                            f.of(group.flat).copy_(values)
                            if self.average and not saved.has("ema", f.name):  # it begins here
                                self.average[f.name].copy_(values)
                        elif kind == "ema":
                            self.average[f.name].copy_(values)
                        else:
                            if kind not in found:
                                found[kind] = moments.empty(group.optimizer, group.flat)
                            f.of(found[kind]).copy_(values)
                if found:
                    moments.put(group.optimizer, group.flat, found, saved.optimizer_step)
                for f in group.fragments if publish else ():
                    f.weight().copy_(f.of(group.flat))
        if publish:
            _publish(self.ds.optimizer)


def _share(group: Group, f: Fragment) -> tuple[int, int]:
    """Which elements [first, last) of a fragment this rank writes."""
    if not group.replicated:
        return 0, f.size
    rank, world = dist.get_rank(), dist.get_world_size()
    return f.size * rank // world, f.size * (rank + 1) // world


def _publish(optimizer: Any) -> None:
    """Bring weights that were changed on the ranks that own them to all who compute with them; collective."""
    if hasattr(optimizer, "persistent_parameters"):
        optimizer._partition_all_parameters()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
        return
    flat = getattr(optimizer, "bit16_groups_flat", None) or getattr(optimizer, "bf16_groups_flat", None)
    if flat:
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=flat,
            partitioned_param_groups=getattr(optimizer, "parallel_partitioned_bit16_groups", None)
            or optimizer.bf16_partitioned_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
