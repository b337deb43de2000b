"""Which ds_config is best: the one with the lowest floor of the step's time among those that fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dstrain.engine.estimate.core import Estimate, estimate
from dstrain.engine.estimate.load import Load
from dstrain.engine.estimate.machine import Machine
from dstrain.engine.estimate.plan import Choice

CPU, NVME = {"device": "cpu"}, {"device": "nvme"}
WEIGHTS_STAY = "no offload_param"
RATIOS = [i / 20 for i in range(1, 20)]  # of Twin-Flow
MOST_GPUS = 1024


@dataclass(frozen=True)
class Candidate:
    """A ds_config and what it needs. `name` begins with that of a file in ds_configs/; `change` is what to change."""

    name: str
    estimate: Estimate
    change: str = ""


@dataclass(frozen=True)
class Advice:
    """The best of `candidates`, or None if none fits, and the reason in a sentence."""

    best: Candidate | None
    candidates: tuple[Candidate, ...]
    sentence: str


def advise(load: Load, machine: Machine, choice: Choice | None = None, base: Mapping[str, Any] | None = None) -> Advice:
    """Choose among the ds_configs.

    Args:
        load: what trains, and the pack.
        machine: where. Without an NVMe drive (Machine.nvme = 0) none is counted on.
        choice: what the recipe says.
        base: a ds_config whose precision is kept (`bf16`, `data_types`); bf16 if left out.
    """
    choice = choice or Choice()
    found = tuple(candidates(load, machine, choice, base))
    fitting = [c for c in found if c.estimate.fits]
    if not fitting:
        return Advice(None, found, _missing(found, load, machine, choice, base))
    best = min(fitting, key=lambda c: c.estimate.traffic.seconds)  # of equals the first, which is the simplest
    steps = f"{best.estimate.traffic.seconds:.2f} s a step at least, bound by {best.estimate.traffic.bound}"
    change = f" with {best.change}" if best.change else ""
    return Advice(best, found, f"{best.name.split(',')[0]}{change}: {steps}")


def candidates(
    load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None = None
) -> Iterator[Candidate]:
    """Yield every ds_config that there is for this machine, the simplest first."""
    for name, zero, change in _settings(machine):
        yield Candidate(name, _estimate(zero, load, machine, choice, base), change)
        if change == WEIGHTS_STAY:
            yield _twin_flow(load, machine, choice, base)


def _twin_flow(load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None) -> Candidate:
    """Keep as much of the optimizer on the GPU as fits there; all but a twentieth in the host if nothing does."""
    for ratio in RATIOS:
        zero = {"stage": 3, "offload_optimizer": {**CPU, "ratio": ratio}}
        found = _estimate(zero, load, machine, choice, base)
        if found.device <= machine.fits_gpu:
            break
    return Candidate(f"zero3_offload, ratio {ratio:g}", found, f"offload_optimizer.ratio {ratio:g}, {WEIGHTS_STAY}")


def _settings(machine: Machine) -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "zero1", {"stage": 1}, ""
    yield "zero2", {"stage": 2, "overlap_comm": True}, ""
    yield "zero3", {"stage": 3}, ""
    if machine.nodes > 1 and machine.gpus > 1:
        zero = {"stage": 3, "zero_hpz_partition_size": machine.gpus}
        yield "zero3_hpz", zero, f"zero_hpz_partition_size {machine.gpus}"
    yield "zero2_offload", {"stage": 2, "overlap_comm": True, "offload_optimizer": CPU}, ""
    yield "zero3_offload, optimizer only", {"stage": 3, "offload_optimizer": CPU}, WEIGHTS_STAY
    yield "zero3_offload", {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, ""
    if machine.nvme:
        yield "zero3_nvme", {"stage": 3, "offload_optimizer": NVME, "offload_param": NVME}, ""


def _estimate(
    zero: dict[str, Any], load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None
) -> Estimate:
    precision = {key: base[key] for key in ("bf16", "data_types") if key in base} if base else {}
    return estimate({"bf16": {"enabled": True}, **precision, "zero_optimization": zero}, load, machine, choice)


def _missing(
    found: tuple[Candidate, ...], load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None
) -> str:
    def lacks(c: Candidate) -> float:
        return max(c.estimate.device / machine.fits_gpu, c.estimate.node / machine.fits_host)

    near = min(found, key=lacks)
    short = [
        f"{have / allowed:.1f}x the {what} memory ({have / 1e9:,.0f} of {allowed / 1e9:,.0f} usable GB)"
        for what, have, allowed in (
            ("GPU", near.estimate.device, machine.fits_gpu),
            ("host", near.estimate.node, machine.fits_host),
        )
        if have > allowed
    ]
    wider = _smallest(load, machine, choice, base)
    more = f"the smallest number of such GPUs that fits: {wider}" if wider else f"nor do {MOST_GPUS:,} such GPUs"
    return f"none fits; the nearest, {near.name}, needs {' and '.join(short)}; {more}"


def _smallest(load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None) -> str:
    for count in counts(machine):
        wider = scaled(machine, count)
        if count > machine.ranks and any(c.estimate.fits for c in candidates(load, wider, choice, base)):
            return f"{count} ({wider.nodes} x {wider.gpus})"
    return ""


def counts(machine: Machine) -> list[int]:
    """Powers of two up to 1,024."""
    return [1 << i for i in range(MOST_GPUS.bit_length())]


def scaled(machine: Machine, count: int) -> Machine:
    """Return at least `count` such GPUs: on one node of up to eight, or on as many nodes as are needed.

    A machine of several nodes keeps its own number of GPUs a node. A node that is used in part has all its memory.
    """
    gpus = machine.gpus if machine.nodes > 1 else max(8, machine.gpus)
    if count <= gpus:
        return replace(machine, nodes=1, gpus=count)
    return replace(machine, nodes=-(-count // gpus), gpus=gpus)
