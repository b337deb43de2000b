"""From a ds_config, a load and a machine to memory, traffic and time. Pure arithmetic: nothing is built or measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.engine.estimate.load import Load
from dstrain.engine.estimate.machine import Machine
from dstrain.engine.estimate.memory import Memory, memory
from dstrain.engine.estimate.plan import Choice, Plan
from dstrain.engine.estimate.traffic import Traffic, traffic


@dataclass(frozen=True)
class Estimate:
    """What one rank needs and what one optimizer step costs. Bytes, FLOPs and seconds."""

    plan: Plan
    load: Load
    machine: Machine
    memory: Memory
    traffic: Traffic
    samples: int  # of an optimizer step, over all ranks

    @property
    def device(self) -> float:
        """Peak bytes of a GPU, without fragmentation and CUDA's own (see Machine.fits_gpu)."""
        return sum(self.memory.device.values())

    @property
    def host(self) -> float:
        """Bytes of host memory of a rank."""
        return sum(self.memory.host.values())

    @property
    def node(self) -> float:
        """Bytes of host memory of all ranks of a node."""
        return self.host * self.machine.gpus

    @property
    def fits(self) -> bool:
        """Whether both memories are large enough, with Machine's margins."""
        return self.device <= self.machine.fits_gpu and self.node <= self.machine.fits_host

    @property
    def samples_a_second(self) -> float:
        """Of all ranks, at the floor of the step's time."""
        return self.samples / self.traffic.seconds


def estimate(config: Mapping[str, Any], load: Load, machine: Machine, choice: Choice | None = None) -> Estimate:
    """Estimate a run.

    Args:
        config: a ds_config, completed or not; bf16 "auto" means bf16, as on GPUs.
        load: what trains, and the pack.
        machine: where; its `ranks` is the world size.
        choice: what the recipe says; the recipe's defaults if left out.
    """
    choice = choice or Choice()
    plan = Plan.of(config, load, machine.ranks, choice)
    samples = load.samples * machine.ranks * choice.micro_steps
    needed = memory(plan, load, machine)
    return Estimate(plan, load, machine, needed, traffic(plan, load, machine), samples)
