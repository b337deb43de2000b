"""Bytes over each link, FLOPs, and the shortest time that an optimizer step can take.

Collectives count what has to pass: of P bytes a rank receives P (n - 1) / n in a gather, as much leaves it in a
reduce-scatter, an all-reduce is both. Between nodes, each node must receive what the others hold once. What DeepSpeed's
offload moves is read off its stage 3 (`partition_grads`, `step`).
"""

from dataclasses import dataclass

from dstrain.engine.estimate.load import Load
from dstrain.engine.estimate.machine import Machine
from dstrain.engine.estimate.plan import Plan

ADAM_BYTES = 46  # of DRAM for a parameter: clipping 8, AdamW 28, casts and copies 10
LAUNCHES = (24, 48)  # kernels of a block: forward, backward; its operators cost the host more than a launch alone
LAUNCH = 2e-5  # seconds of the host for a kernel
HOOK = 1e-4  # seconds of the host for a tensor that ZeRO-3 gathers, a block at a time
OVERLAP = 0.8  # of the compute time under which transfers can hide


@dataclass(frozen=True)
class Traffic:
    """Of one optimizer step."""

    links: dict[str, float]  # bytes: nvlink a GPU, network into a node, pcie out and in a GPU, dram and nvme a node
    flops: float  # of a rank, with what is computed twice
    useful_flops: float  # of a rank, without
    times: dict[str, float]  # seconds that each part would take alone
    seconds: float  # the floor

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.times, key=lambda part: self.times[part])

    @property
    def optimizer_share(self) -> float:
        """Share of the step that waits for the CPU's optimizer."""
        return self.times["CPU optimizer"] / self.seconds


def traffic(plan: Plan, load: Load, machine: Machine) -> Traffic:
    """Count one optimizer step."""
    micro = plan.choice.micro_steps
    word, t = plan.word, load.trained
    nvlink, network = _collectives(plan, load, machine)
    out, back = _offload(plan, load)
    share, on_node = t / plan.ranks, t / machine.nodes
    cpu = plan.ratio if plan.optimizer == "cpu" else 1.0 if plan.optimizer == "nvme" else 0.0
    scale = (plan.moments + (plan.master or 4)) / 12  # of fp32 AdamW's
    nvme = (plan.moments + plan.master) * 2 * on_node + 8 * on_node if plan.optimizer == "nvme" else 0.0
    if plan.parameters == "nvme":
        nvme += word * load.parameters / machine.nodes * (2 * micro + 1)
    links = {
        "nvlink": nvlink,
        "network": network,
        "pcie out": out,
        "pcie in": back,
        "dram": ADAM_BYTES * scale * on_node * cpu,
        "nvme": nvme,
    }
    flops = micro * (load.train_flops + _recomputed(plan, load))
    compute = flops / machine.peak / machine.efficiency
    host = micro * load.depth * (sum(LAUNCHES) + LAUNCHES[0] * _share(plan, load, "full")) * LAUNCH
    host += micro * HOOK * load.tensors if plan.stage == 3 else 0.0
    after = word * share * cpu / machine.pcie if plan.optimizer == "cpu" else 0.0
    times = {
        "compute": compute,
        "communication": max(nvlink / machine.nvlink, network / machine.network),
        "PCIe": max(out, back) / machine.pcie,
        "CPU optimizer": links["dram"] / machine.dram,
        "NVMe": nvme / machine.nvme if machine.nvme else float("inf") if nvme else 0.0,
        "host overhead": host,
    }
    meanwhile = max(out / machine.pcie, back / machine.pcie - after)
    exposed = max(times["communication"], meanwhile) - OVERLAP * compute
    serial = max(times["CPU optimizer"], times["NVMe"])  # the drive reads ahead while the CPU computes
    seconds = max(compute + max(0.0, exposed), host) + serial + after
    return Traffic(links, flops, micro * load.train_flops, times, seconds)


def _share(plan: Plan, load: Load, *policies: str) -> float:
    """Share of the blocks that are recomputed; "full" stands for all policies that do."""
    chosen = [plan.choice.activations[i % len(plan.choice.activations)] for i in range(load.depth)]
    if policies == ("full",):
        return sum(policy != "none" for policy in chosen) / load.depth
    return sum(policy in policies for policy in chosen) / load.depth


def _recomputed(plan: Plan, load: Load) -> float:
    """FLOPs of a pack's second forward."""
    return load.flops * _share(plan, load, "full") - load.attention_flops * _share(plan, load, "attention")


def _collectives(plan: Plan, load: Load, machine: Machine) -> tuple[float, float]:
    """Bytes that a GPU receives inside its node, and a node from the others, in a step."""
    micro, word, t = plan.choice.micro_steps, plan.word, load.trained
    inside, between = 1 - 1 / machine.ranks, 1 - 1 / machine.nodes
    weights = word * (load.frozen + t) + load.stored
    if plan.stage == 3:
        again = 1 if plan.reuse < load.block and _share(plan, load, "full") else 0
        gathers = 2 + again
        far = 1 if plan.group > 1 else gathers  # with hpZ the backward gathers from the node's own copy
        kept = load.persistent(plan.persistence, word)  # gathered once, when the step has changed it
        reduced = word * t
        return (
            (micro * (gathers * (weights - kept) + reduced) + kept) * inside,
            (micro * (far * (weights - kept) + reduced) + kept) * between,
        )
    if plan.stage == 2:  # each bucket is reduced to all; then the new weights go round
        total = word * (2.0 * micro + 1) * t
    elif plan.stage == 1:
        total = 2 * (plan.accumulator if plan.optimizer == "none" or word == 2 else word) * t + word * t
    else:
        total = 2.0 * word * t
    return total * inside, total * between


def _offload(plan: Plan, load: Load) -> tuple[float, float]:
    """Bytes over a GPU's PCIe link out to the host and back, in a step."""
    micro, word, share = plan.choice.micro_steps, plan.word, load.trained / plan.ranks
    out = back = 0.0
    if plan.optimizer != "none" and plan.stage == 3:
        wide, fp32 = plan.accumulator, plan.master or 4
        out += (wide * micro + fp32 * plan.ratio) * share  # every sum, then what the optimizer reads
        back += (wide * micro + word * plan.ratio) * share  # every sum comes back once, then the new weights
    elif plan.optimizer != "none":
        out += 4 * share
        back += word * share
    if plan.parameters != "none":
        back += micro * 2 * (word * (load.frozen + load.trained) + load.stored) / plan.ranks
        out += word * share
    unit = load.width * load.tokens * word / 2 * load.depth
    moved = 2 * unit * _share(plan, load, "offload") * micro
    return out + moved, back + moved
