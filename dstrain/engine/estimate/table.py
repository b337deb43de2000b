"""An estimate as lines for a terminal and as data for a file. GB are 1e9 bytes throughout."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from dstrain.engine.estimate.advice import Advice, Candidate
from dstrain.engine.estimate.core import Estimate
from dstrain.engine.estimate.load import Load
from dstrain.engine.estimate.machine import Machine

GB = 1e9
WORDS = {
    "passing gradients": "of the largest tensor (at stage 1 of all) until they are reduced and added up",
    "pinned rounding": "PyTorch makes page-locked buffers in powers of two; what of them is unused",
}


def heading(name: str, load: Load, machine: Machine, source: str) -> list[str]:
    """Say what the estimate is for, where the pack's samples come from (`source`), and what it assumes."""
    m = machine
    low = f", {load.stored_elements:,} of them kept in {load.stored / GB:,.1f} GB" if load.stored else ""
    gpus = f"{m.nodes} node{'s' * (m.nodes > 1)} x {m.gpus} GPU{'s' * (m.gpus > 1)}"
    each, train = load.flops / load.samples, load.train_flops / load.samples
    nvme = f" and {m.nvme / GB:g} GB/s NVMe" if m.nvme else ""
    return [
        f"model      {name}: {load.parameters:,} parameters, {load.trained:,} trained{low}",
        f"pack       {load.samples} sample{'s' * (load.samples > 1)}, {load.tokens:,} tokens a rank ({source});",
        f"           {each / 1e12:,.3g} TFLOP forward, {train / 1e12:,.3g} TFLOP training a sample",
        f"machine    {gpus} of {m.gpu_bytes / GB:,.0f} GB, {m.host_bytes / GB:,.0f} GB host memory a node",
        f"assumed    {m.nvlink / GB:g} GB/s NVLink and {m.pcie / GB:g} GB/s PCIe a GPU,"
        f" {m.network / GB:g} GB/s network, {m.dram / GB:g} GB/s DRAM{nvme} a node;",
        f"           {m.efficiency:.0%} of {m.peak / 1e12:,.0f} TFLOP/s; {m.context / GB:g} GB a GPU for CUDA and NCCL,"
        f" 8 % lost to fragmentation; {m.process / GB:g} GB",
        "           of host memory a process, a tenth of a node's kept free. All GB are 1e9 bytes.",
    ]


def parts(name: str, e: Estimate) -> list[str]:
    """Say where the bytes of a rank go, what passes over the links in a step, and what the step waits for."""
    lines = [f"{name}: GB of a rank by part{'':<8}GPU    host"]
    memory = e.memory
    for part in dict.fromkeys([*memory.device, *memory.host]):
        lines.append(f"  {part:<34}{_gb(memory.device.get(part))} {_gb(memory.host.get(part))}")
    late = [f"{size / GB:,.1f} GB in the {where}" for where, size in late_parts(e) if size]
    lines.append(
        f"  {'sum, of usable':<34}{_gb(e.device)} {_gb(e.host)}   of {e.machine.fits_gpu / GB:,.1f} a GPU,"
        f" {e.machine.fits_host / e.machine.gpus / GB:,.1f} of the host a rank"
    )
    if late:
        lines.append(f"  The optimizer's moments, {' and '.join(late)} a rank, appear at the first step() only.")
    links = [f"{link} {size / GB:,.3g}" for link, size in e.traffic.links.items() if size]
    twice = {"compute": " with recomputation"} if e.traffic.flops > e.traffic.useful_flops else {}
    times = [f"{part} {s:.3g}{twice.get(part, '')}" for part, s in e.traffic.times.items() if s]
    lines.append(f"  GB a step: {', '.join(links) or 'none'} (nvlink and pcie of a GPU, the others of a node)")
    lines += textwrap.wrap(
        f"seconds a step, each alone: {', '.join(times)}", 118, initial_indent="  ", subsequent_indent=" " * 30
    )
    return lines + [f"  {part}: {why}" for part, why in WORDS.items() if part in {*memory.device, *memory.host}]


def late_parts(e: Estimate) -> list[tuple[str, float]]:
    """Where the optimizer's moments will be, and their bytes, if they are not there from the start."""
    return [("GPU", e.memory.late), ("host", e.memory.late_host)]


def comparison(candidates: Iterable[Candidate], best: Candidate | None) -> list[str]:
    """One line for each ds_config."""
    lines = [
        f"{'ds_config':<30}{'GPU GB':>8}{'host GB a node':>16}{'s/step':>8}  {'bound by':<15}{'CPU step':>8}  fits"
    ]
    for c in candidates:
        e = c.estimate
        device, node = e.device <= e.machine.fits_gpu, e.node <= e.machine.fits_host
        fits = "best" if best and c.name == best.name else "yes" if e.fits else ""
        fits = fits or " and ".join(f"no: {what}" for what, ok in (("GPU", device), ("host", node)) if not ok)
        lines.append(
            f"{c.name:<30}{e.device / GB:>8,.1f}{e.node / GB:>16,.0f}{e.traffic.seconds:>8.3g}  {e.traffic.bound:<15}"
            f"{e.traffic.optimizer_share:>8.0%}  {fits}"
        )
    return lines


def scaling(rows: Sequence[tuple[Machine, Advice]]) -> list[str]:
    """One line for each number of GPUs."""
    lines = [
        f"{'GPUs':>6}  {'best ds_config':<30}{'GPU GB':>8}{'host GB a node':>16}{'s/step':>8}{'samples/s':>11}"
        "  bound by"
    ]
    for machine, advice in rows:
        if advice.best is None:
            lines.append(f"{machine.ranks:>6,}  none fits")
            continue
        e = advice.best.estimate
        lines.append(
            f"{machine.ranks:>6,}  {advice.best.name:<30}{e.device / GB:>8,.1f}{e.node / GB:>16,.0f}"
            f"{e.traffic.seconds:>8.3g}{e.samples_a_second:>11,.3g}  {e.traffic.bound}"
        )
    return lines


def as_data(e: Estimate) -> dict[str, Any]:
    """An estimate as plain values: bytes, FLOPs, seconds."""
    return {
        "gpus": e.machine.ranks,
        "nodes": e.machine.nodes,
        "gpu_bytes": {**e.memory.device},
        "host_bytes_a_rank": {**e.memory.host},
        "gpu_bytes_at_first_step": e.memory.late,
        "host_bytes_at_first_step": e.memory.late_host,
        "gpu_total": e.device,
        "host_total_a_node": e.node,
        "fits": e.fits,
        "link_bytes_a_step": {**e.traffic.links},
        "flops_a_step_and_rank": e.traffic.flops,
        "useful_flops_a_step_and_rank": e.traffic.useful_flops,
        "seconds_alone": {**e.traffic.times},
        "seconds_a_step": e.traffic.seconds,
        "bound": e.traffic.bound,
        "cpu_optimizer_share": e.traffic.optimizer_share,
        "samples_a_step": e.samples,
        "samples_a_second": e.samples_a_second,
    }


def _gb(size: float | None) -> str:
    return f"{size / GB:>8,.2f}" if size else f"{'':>8}"
