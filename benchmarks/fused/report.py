"""What the benchmark of fused operations prints, and draws."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from dstrain.tracking.metrics import device_name

COLORS = {"triton": "#2563c9", "compile": "#7aa6e8", "liger": "#c9852b", "eager": "#9aa0aa"}
BLOCK_COLORS = {"matmuls": "#d9dde3", "attention": "#9aa0aa", "glue": "#2563c9"}
Found = dict[str, Any]


def machine(device: torch.device) -> Found:
    """Describe what the figures were measured on."""
    found: Found = {
        "device": device_name(device),
        "processor": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"memory_gib": round(about.total_memory / 2**30, 1), "processors": about.multi_processor_count}
        found["l2_mib"] = round(about.L2_cache_size / 2**20, 1)
    for package in ("torch", "triton", "diffusers", "liger-kernel", "dstrain"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def line(case: Found) -> None:
    """Print a case on a line: time and share of each face, or its error."""
    name = case.get("operation", "block")
    parts = []
    for face, f in case["faces"].items():
        if "us" in f:
            us = [f"{f['us'][part]['median']:.0f}" for part in ("forward", "backward") if part in f["us"]]
            share = [f"{f[part]['share_of_copy']:.0%}" for part in ("forward", "backward") if part in f]
            glue = [f"glue {f['kernels_us']['glue']:.0f}"] if "glue" in f.get("kernels_us", {}) else []
            parts.append(f"{face} {'+'.join(us)} us {' '.join([*share, *glue])}".rstrip())
        elif "error" in f:
            parts.append(f"{face} off by {f['error']:.1e}")
        else:
            parts.append(
                f"{face} {next((f'{key}: {f[key]}' for key in ('wrong', 'failed', 'skipped') if key in f), '-')}"
            )
    print(f"{name} {case.get('width', '')} {case['tokens']} x{case['samples']}: {'; '.join(parts)}", flush=True)


def verdicts(found: Found) -> list[Found]:
    """The figures to reach, what was measured, and whether that is enough."""
    shares: list[tuple[float, str]] = []
    behind: list[tuple[float, str]] = []
    for case in found["operations"]:
        triton = case["faces"].get("triton", {})
        for part in ("forward", "backward"):
            # Latents of a few tokens are no load for a memory: what is shared out there is the time of a launch.
            if part in triton and case["least_bytes"][part == "backward"] > 16 << 20:
                where = f"{case['operation']} {part}, {case['width']} wide, {case['tokens']} tokens x{case['samples']}"
                shares.append((triton[part]["share_of_copy"], where))
                for face in ("eager", "compile"):
                    if part in (times := case["faces"].get(face, {}).get("times_triton", {})):
                        behind.append((times[part]["median"], f"{face}: {where}"))
    found_figures = [
        _verdict("share of copy bandwidth, least of all", 0.85, min(shares, default=None)),
        _verdict("times faster than eager and torch.compile, least of all", 1.0, min(behind, default=None)),
    ]
    for block in found["blocks"][:1]:
        faces = block["faces"]
        where = f"block, {block['tokens']} tokens, {block['samples']} samples"
        ours, eager = faces.get("triton", {}), faces.get("diffusers", {})
        if "glue" in ours.get("kernels_us", {}) and "glue" in eager.get("kernels_us", {}):
            gain = eager["kernels_us"]["glue"] / ours["kernels_us"]["glue"]
            found_figures.append(_verdict("glue, times faster than eager", 3.0, (gain, where)))
        if "memory" in ours and "memory" in eager:
            less = 1 - ours["memory"]["kept_after_forward"] / eager["memory"]["kept_after_forward"]
            found_figures.append(_verdict("less kept for the backward than eager", 0.35, (less, where)))
        for face, least in (("diffusers", 1.25), ("diffusers compile", 1.0)):
            if "times_triton" in faces.get(face, {}):
                gain = faces[face]["times_triton"]["step"]["median"]
                found_figures.append(_verdict(f"step, times faster than {face}", least, (gain, where)))
    return found_figures


def _verdict(what: str, least: float, measured: tuple[float, str] | None) -> Found:
    if measured is None:
        return {"what": what, "at_least": least, "measured": None, "reached": None}
    value, where = measured
    return {"what": what, "at_least": least, "measured": round(value, 3), "where": where, "reached": value >= least}


def print_verdicts(figures: list[Found]) -> None:
    """A line for each."""
    for f in figures:
        sign = {True: "reached", False: "MISSED", None: "not measured"}[f["reached"]]
        measured = "" if f["measured"] is None else f"{f['measured']} "
        print(f"{sign}: {f['what']}: {measured}(at least {f['at_least']}) {f.get('where', '')}".rstrip())


def plot(found: Found, path: Path) -> None:
    """Draw each operation's share of the copy bandwidth at the largest size that ran, and the blocks' times."""
    chosen = _largest(found["operations"])
    blocks = [b for b in found["blocks"][:1] if any("glue" in f.get("kernels_us", {}) for f in b["faces"].values())]
    figure = Figure(figsize=(14, 1.6 + 0.62 * max(3, len(chosen))), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    for part, ax in zip(("forward", "backward"), axes):
        _shares(ax, chosen, part)
        ax.set_title(f"{part}: share of the bandwidth of a copy ({found['copy_gb_per_s']:,.0f} GB/s)", size=10)
    _legend(axes[0])
    axes[1].set_yticklabels([])
    for block in blocks:
        _block(axes[2], block)
    if not blocks:
        axes[2].set_axis_off()
    figure.suptitle(f"Fused operations, {found['machine']['device']}, bf16", size=12)
    figure.savefig(path)


def _largest(cases: list[Found]) -> list[Found]:
    """Of each operation the case of one sample, at the first model, with most tokens."""
    best: dict[str, Found] = {}
    for case in cases:
        name, kind = case["operation"], (case["model"], case["samples"])
        if name not in best or (
            kind == (best[name]["model"], best[name]["samples"]) and case["tokens"] > best[name]["tokens"]
        ):
            best[name] = case
    return list(best.values())


def _shares(ax: Any, cases: list[Found], part: str) -> None:
    for i, (face, color) in enumerate(COLORS.items()):
        values = [case["faces"].get(face, {}).get(part, {}).get("share_of_copy", 0.0) for case in cases]
        places = [row + (i - 1.5) * 0.2 for row in range(len(cases))]
        ax.barh(places, values, 0.18, color=color, label=face)
    ax.axvline(0.85, color="#1f2430", linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(cases)), [f"{c['operation']}\n{c['tokens']:,} tokens" for c in cases], size=8)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.xaxis.set_major_formatter("{x:.0%}")
    _plain(ax)


def _block(ax: Any, block: Found) -> None:
    faces = {name: f["kernels_us"] for name, f in block["faces"].items() if "glue" in f.get("kernels_us", {})}
    left = [0.0] * len(faces)
    for part, color in BLOCK_COLORS.items():
        values = [f[part] / 1e3 for f in faces.values()]
        ax.barh(range(len(faces)), values, 0.6, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, values)]
    ax.set_yticks(range(len(faces)), list(faces), size=8)
    ax.invert_yaxis()
    _legend(ax)
    ax.set_title(f"block, {block['tokens']:,} tokens: ms of a step", size=10)
    _plain(ax)


def _legend(ax: Any) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=4, frameon=False, fontsize=9)


def _plain(ax: Any) -> None:
    for side in ax.spines.values():
        side.set_visible(False)
    ax.grid(axis="x", color="#d9dde3", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, length=0)
