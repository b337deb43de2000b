"""Which ds_config is best: the one with the lowest floor of the step's time among those that fit."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from dstrain.engine.estimate.core import Estimate, estimate
from dstrain.engine.estimate.load import Load
from dstrain.engine.estimate.machine import Machine
from dstrain.engine.estimate.plan import Choice

CPU, NVME = {"device": "cpu"}, {"device": "nvme"}
PINNED = {**CPU, "pin_memory": True}
RATIOS = [i / 20 for i in range(1, 20)]  # of Twin-Flow
MOST_GPUS = 1024
OPTIMIZER_ONLY = "zero3_offload, optimizer only"
LIGHTER: Mapping[str, tuple[Literal["offload", "absent"], ...]] = {  # places for the encoders
    "resident": ("offload", "absent"),
    "offload": ("absent",),
    "absent": (),
}


@dataclass(frozen=True)
class Candidate:
    """A ds_config and what it needs. `name` begins with that of a file in ds_configs/.

    change: the section to put there instead, as JSON to be pasted; "" = the file as it is.
    """

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
    name, change = best.name.split(",")[0], f" with {best.change}" if best.change else ""
    return Advice(best, found, f"{name}: {steps} (ds_configs/{name}.json{change})")


def candidates(
    load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None = None
) -> Iterator[Candidate]:
    """Yield every ds_config that there is for this machine, the simplest first."""
    for name, zero, changed in _settings(machine, choice):
        yield Candidate(name, _estimate(zero, load, machine, choice, base), _change(zero) if changed else "")
        if name == OPTIMIZER_ONLY:
            yield _twin_flow(load, machine, choice, base)


def _change(zero: dict[str, Any]) -> str:
    return json.dumps({"zero_optimization": zero})[1:-1]


def _twin_flow(load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None) -> Candidate:
    """Keep as much of the optimizer on the GPU as fits there; all but a twentieth in the host if nothing does."""
    for ratio in RATIOS:
        zero = {"stage": 3, "offload_optimizer": {**PINNED, "ratio": ratio}}
        found = _estimate(zero, load, machine, choice, base)
        if found.device <= machine.fits_gpu:
            break
    return Candidate(f"zero3_offload, ratio {ratio:g}", found, _change(zero))


def _settings(machine: Machine, choice: Choice) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield a name, its zero_optimization, and whether that differs from the file's."""
    yield "zero1", {"stage": 1}, False
    yield "zero2", {"stage": 2, "overlap_comm": True}, False
    yield "zero3", {"stage": 3}, False
    if machine.nodes > 1 and machine.gpus > 1:
        yield "zero3_hpz", {"stage": 3, "zero_hpz_partition_size": machine.gpus}, True
    yield "zero2_offload", {"stage": 2, "overlap_comm": True, "offload_optimizer": CPU}, False
    yield OPTIMIZER_ONLY, {"stage": 3, "offload_optimizer": PINNED}, True
    yield "zero3_offload", {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, False
    if machine.nvme and choice.ema == "none":  # with an average the trainer refuses it
        yield "zero3_nvme", {"stage": 3, "offload_optimizer": NVME, "offload_param": NVME}, False


def _estimate(
    zero: dict[str, Any], load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None
) -> Estimate:
    precision = {key: base[key] for key in ("bf16", "data_types") if key in base} if base else {}
    return estimate({"bf16": {"enabled": True}, **precision, "zero_optimization": zero}, load, machine, choice)


def _missing(
    found: tuple[Candidate, ...], load: Load, machine: Machine, choice: Choice, base: Mapping[str, Any] | None
) -> str:
    lighter = list(_lighter(choice))
    for other, flags in lighter:
        name = next((c.name for c in candidates(load, machine, other, base) if c.estimate.fits), None)
        if name:
            return f"none fits as asked; with {flags}: {name}"

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
    found_wider = ((_smallest(load, machine, other, base), flags) for other, flags in [(choice, ""), *lighter])
    wider, flags = next(((count, flags) for count, flags in found_wider if count), ("", ""))
    more = f"the smallest number of such GPUs that fits: {wider}" if wider else f"nor do {MOST_GPUS:,} such GPUs"
    more += f", with {flags}" if flags else ""
    return f"none fits; the nearest, {near.name}, needs {' and '.join(short)}; {more}"


def _lighter(choice: Choice) -> Iterator[tuple[Choice, str]]:
    """Yield what needs less memory than what is asked for, the least change first, and the flags that say it."""
    flags = ""
    if not {"full", "offload"}.issuperset(choice.activations):
        choice, flags = replace(choice, activations=("full",)), "--activations full "
        yield choice, flags.strip()
    for place in LIGHTER[choice.encoders]:
        yield replace(choice, encoders=place), f"{flags}--encoders {place}"


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
