"""Bytes of one rank by part, on its GPU and in the host, under DeepSpeed 0.19.8.

The states are those that its optimizers allocate (runtime/zero/stage3.py, stage_1_and_2.py, bf16_optimizer.py), counted
as live tensors of real runs: tests/dist/test_engine_estimate.py. Parts that lie in the same memory one after the other
are counted once, by their largest.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from dstrain.engine.estimate.load import Load
from dstrain.engine.estimate.machine import Machine
from dstrain.engine.estimate.plan import Plan

# Bytes for a token and unit of width in bf16, counted over the Qwen-Image block with its kernels
# (benchmarks/block_traffic.py): kept for the backward without checkpointing, the same where its layers are called, with
# its inputs alone, with the attention's result besides; what several samples add, whose rows attention wants in another
# order; taken by what is passing in a backward (the perceptron's hidden rows, thrice); kept by what comes before and
# behind the blocks.
BLOCK, CALLED, INPUTS, ATTENTION, REORDERED, BACKWARD, ENDS = 26.1, 34.4, 2.0, 4.03, 2.0, 24.0, 4.4
PIECE = 10 / 36  # of a block's matrices: those whose gradients come out of one piece of it together

STATES = ("weights", "gradients", "master weights", "optimizer", "EMA")  # there from step to step, in this order


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part."""

    device: dict[str, float]
    host: dict[str, float]
    late: float  # bytes on the device that appear at the first step only: the optimizer's moments
    late_host: float


def memory(plan: Plan, load: Load, machine: Machine) -> Memory:
    """Count a rank's memory; parts of no bytes are left out."""
    device, host = _states(plan, load)
    moments = device.get("optimizer", 0.0), host.get("optimizer", 0.0)
    if plan.stage == 0 and plan.word == 2:  # DeepSpeed takes an empty step when it starts
        moments = 0.0, 0.0
    activations, away = _activations(plan, load)
    device["activations"], host["activations"] = activations, away
    if plan.choice.encoders != "absent":
        moved = plan.choice.encoders == "offload"
        device["encoders"] = max(0.0, load.encoder_bytes - activations) if moved else load.encoder_bytes
        host["encoders"] = load.encoder_bytes if moved else 0.0
    device |= _buffers(plan, load, activations)
    if machine.pinned_rounding:
        host["pinned rounding"] = sum(_rounded(size) - size for size in _pinned(plan, load))
    host["process"] = machine.process
    device, host = ({part: size for part, size in parts.items() if size} for parts in (device, host))
    return Memory(device, host, *moments)


def _states(plan: Plan, load: Load) -> tuple[dict[str, float], dict[str, float]]:
    """What stays from step to step, and the gradients."""
    t, word = load.trained, plan.word
    share, weights = plan.shard(t, 1), plan.shard(word * (load.frozen + t) + load.stored, 3)
    device, host = {"weights": weights}, dict[str, float]()
    if plan.stage == 3:
        device["weights"] += load.persistent(plan.persistence, word) * (1 - 1 / plan.ranks)
        device["weights"] += (word * (load.frozen + t) + load.stored) / plan.group if plan.group > 1 else 0.0
    if plan.parameters != "none":
        host["weights"] = weights if plan.parameters == "cpu" else min(weights, plan.swap_bytes)
        device["weights"] = load.persistent(plan.persistence, word)
    gradients, on_host = _gradients(plan, t)
    device["gradients"] = gradients
    if plan.optimizer == "none":
        device |= {"master weights": plan.master * share, "optimizer": plan.moments * share}
    else:
        states = {"master weights": plan.master, "optimizer": plan.moments, "gradients": plan.master or 4}
        for part, size in states.items():
            if plan.optimizer == "cpu":
                host[part] = host.get(part, 0.0) + size * share * plan.ratio
                device[part] = device.get(part, 0.0) + size * share * (1 - plan.ratio)
        host["gradients"] = host.get("gradients", 0.0) + on_host
        if plan.optimizer == "nvme":
            host["swap buffers"] = plan.swap_buffers * 4 * _tile(plan, load)
        if plan.stage < 3:
            host["master weights"] += word * share + word * load.largest  # new weights on their way
            device["gradients"] += word * load.largest
    if plan.choice.ema != "none":
        beside = device if plan.optimizer == "none" and plan.choice.ema == "auto" else host
        beside["EMA"] = 4 * share
    return device, host


def _gradients(plan: Plan, t: int) -> tuple[float, float]:
    """Bytes of gradients on the device and in the host that a step adds up, without those that are only passing."""
    share, offloaded, wide = t / plan.ranks, plan.optimizer != "none", plan.accumulator
    if plan.stage == 0:
        return plan.word * t, 0.0
    if plan.stage == 3:
        return (0.0, wide * share) if offloaded else (wide * share, 0.0)
    if wide == plan.word:
        return (0.0, 0.0) if offloaded else (wide * share, 0.0)
    if plan.stage == 1 and not offloaded:  # DeepSpeed takes its bf16 optimizer: all of them in fp32, and in bf16
        return (wide + plan.word) * t, 0.0
    return wide * share * (2 if plan.stage == 1 else 1), 0.0


def _activations(plan: Plan, load: Load) -> tuple[float, float]:
    """Bytes on the device at the peak, which lies in the backward, and in the host."""
    unit = load.width * load.tokens * plan.word / 2
    policies = [plan.choice.activations[i % len(plan.choice.activations)] for i in range(load.depth)]
    policies[-1] = "full" if policies[-1] == "offload" else policies[-1]
    away = policies.count("offload")
    block = (CALLED if load.called else BLOCK) + (REORDERED if load.samples > 1 else 0.0)
    keeps = {"none": block, "attention": ATTENTION, "full": INPUTS, "offload": 0.0}
    kept = list(accumulate(keeps[policy] for policy in policies))  # when the backward of block i begins
    live = [k + (0.0 if policy == "none" else block) for k, policy in zip(kept, policies)]
    peak = max(kept[-1] + ENDS, max(live) + BACKWARD) + INPUTS * min(2, away)
    return unit * peak, unit * INPUTS * away


def _buffers(plan: Plan, load: Load, activations: float) -> dict[str, float]:
    word, t = plan.word, load.trained
    weights = word * (load.frozen + t) + load.stored
    buckets, passing, gathered = (
        float(word * min(plan.bucket, t)),
        float(word * min(max(load.largest, PIECE * load.block), t)),
        0.0,
    )
    if plan.stage == 3:
        buckets = float(word * plan.bucket)  # allocated whole, however little trains
        live = min(load.parameters, max(load.block, plan.live))
        gathered = weights * live / max(1, load.parameters)
        gathered = min(gathered, weights - load.persistent(plan.persistence, word))
        gathered += word * load.largest if load.stored else 0.0  # a matrix whose low-bit weights are expanded
    elif plan.stage == 2 or plan.optimizer != "none":
        buckets *= 2 if plan.overlap else 1
        if plan.stage == 1:  # whole gradients until the step
            passing = plan.accumulator * t * (1 - 1 / plan.ranks)
    else:
        passing = min(5e8, t) * (plan.accumulator if plan.stage else word) if plan.ranks > 1 else 0.0
        passing += word * t if plan.stage == 1 and plan.accumulator == word else 0.0
        buckets = 0.0
    # The optimizer's step comes when activations and gathered blocks are gone.
    step = max(0.0, _step(plan, load) - activations - gathered)
    return {"gathered blocks": gathered, "buckets": buckets, "passing gradients": passing, "fp32 at step()": step}


def _step(plan: Plan, load: Load) -> float:
    """Bytes of the fp32 gradients that a step makes of what has been added up."""
    if plan.optimizer != "none":
        return 0.0
    copies = plan.accumulator + (4 if plan.accumulator < 4 and plan.master == 4 else 0)
    if plan.stage == 3:
        return copies * _tile(plan, load)
    if plan.stage == 0:
        return 4.0 * load.trained if plan.word == 2 else 0.0
    return copies * load.trained / plan.ranks if plan.accumulator == plan.word else 0.0


def _tile(plan: Plan, load: Load) -> float:
    """Elements that are updated at a time: a tile ends with the tensor that fills it."""
    return min(plan.tile + load.largest / plan.ranks, load.trained / plan.ranks)


def _pinned(plan: Plan, load: Load) -> list[float]:
    """Sizes of the page-locked buffers."""
    share, sizes = load.trained / plan.ranks, list[float]()
    if plan.optimizer != "none" and plan.pinned_states:
        if plan.stage == 3:
            tile = _tile(plan, load)
            tiles = plan.swap_buffers if plan.optimizer == "nvme" else round(share * plan.ratio / tile)
            sizes += [plan.accumulator * share, *[4 * tile] * tiles]
        else:
            sizes += [plan.master * share, plan.master * share, plan.word * share]
    if plan.parameters == "cpu" and plan.pinned_weights:
        sizes.append(plan.word * share)
    return sizes


def _rounded(size: float) -> float:
    """PyTorch's allocator of page-locked memory rounds up to a power of two."""
    return float(1 << max(0, ceil(size) - 1).bit_length())
