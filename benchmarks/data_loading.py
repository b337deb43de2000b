"""Compare loaders of image-text samples: dstrain, webdataset, litdata, mosaicml-streaming, megatron-energon, tarfile.

    pip install torch webdataset litdata mosaicml-streaming megatron-energon psutil matplotlib
    pip install pillow simplejpeg xxhash av fsspec tqdm pyyaml      # and dstrain itself: pip install --no-deps -e .
    python benchmarks/data/pictures.py PHOTOGRAPHS --out DATA     # what PHOTOGRAPHS are: see there
    python benchmarks/data/prepare.py DATA                        # every loader's own format
    python benchmarks/data_loading.py DATA --out benchmarks/results/data_loading.json
    python benchmarks/data/plot_loading.py benchmarks/results/data_loading.json

All read the same samples, from files that the page cache holds, in shuffled order, in batches of 8 lists, and every
payload is looked at: its length, first and last byte. dstrain, webdataset and tarfile read the same plain tars, energon
too with its index; litdata and streaming their own converted formats. Cases:

    raw_jpeg    JPEGs of 86 kB with captions, not decoded. Workers 0; and 1, where what is sent between processes counts
    raw_latent  members of 2.4 MB with captions
    decoded     pictures of 0.5 to 2 megapixels decoded and resized to at most 512 x 512 pixels, at 1 and 2 workers;
                by Pillow with Lanczos, which is what users of the others do, and by dstrain's function. `bare` is no
                loader: threads that read at known places and decode with dstrain's function, the most one could reach
    resume      seconds from the loader made ready to the first sample, at parts of an epoch, and the samples read in
                vain for it: dstrain, litdata and streaming among 10 million samples, webdataset and energon among
                100,000, as they have to read up to the place; dstrain decodes 8 pictures, the others read tiny members

The loaders take turns, round after round, each time in a fresh process, and the order turns from round to round.
Ratios are dstrain's speed over the other's in the same round. The clock starts after a warm-up, so making workers and
first indexes is not in it, and stands still between epochs. `others` is how many cores the rest of the machine kept
busy meanwhile, at most: where that is not near 0, the machine was shared and the figures are not worth much.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data import table
from data.machine import processor

HERE = Path(__file__).parent
PACKAGES = "torch numpy pillow simplejpeg xxhash webdataset litdata mosaicml-streaming megatron-energon".split()
OTHERS = ("webdataset", "litdata", "streaming", "energon")
PARTS = (0.0, 0.01, 0.1, 0.5)  # of an epoch, at which is resumed
LARGE = 10_000_000


@dataclass(frozen=True)
class Case:
    """One comparison: what is read, and which (loader, decoder) take part, dstrain first."""

    kind: str
    extension: str
    entries: tuple[tuple[str, str], ...]
    workers: tuple[int, ...]
    warmup: int  # samples
    seconds: float  # share of --seconds


CASES = {
    "raw_jpeg": Case("small", "jpg", tuple((n, "none") for n in ("dstrain", *OTHERS, "tarfile")), (0, 1), 400, 0.5),
    "raw_latent": Case("latents", "bin", tuple((n, "none") for n in ("dstrain", *OTHERS, "tarfile")), (0, 1), 40, 0.5),
    "decoded": Case(
        "pictures",
        "jpg",
        (("dstrain", "dstrain"), ("bare", "dstrain"), *((n, d) for n in OTHERS for d in ("pillow", "dstrain"))),
        (1, 2),
        48,
        1.0,
    ),
}


class Runner:
    """A process that has imported one loader and forks for every measurement."""

    def __init__(self, loader: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "data/runner.py"), loader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __call__(self, **job: Any) -> dict[str, Any]:
        print(json.dumps(job), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the runner ended"}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def warm(folder: Path) -> None:
    """Read all files once, so that the page cache holds them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", 0) as file:
                while file.read(1 << 24):
                    pass


def compare(case: str, args: argparse.Namespace, runners: dict[str, Runner]) -> dict[str, Any]:
    """Run a case; return `[workers][entry]` with every round's figures, their spread, and dstrain's speed over it."""
    what = CASES[case]
    names = [f"{loader}, {decoder}" if decoder != "none" else loader for loader, decoder in what.entries]
    found: dict[str, Any] = {str(w): {name: [] for name in names} for w in what.workers}
    for number in range(args.rounds):
        for workers in what.workers:
            for turn in range(len(what.entries)):
                at = (turn + number) % len(what.entries)
                loader, decoder = what.entries[at]
                job = {"case": case, "data": str(args.data), "kind": what.kind, "extension": what.extension}
                job |= {"workers": workers, "decoder": decoder}
                result = runners[loader](
                    **job, warmup=min(what.warmup, args.warmup), seconds=args.seconds * what.seconds
                )
                found[str(workers)][names[at]].append(result)
                print(f"{number} {case} {workers} {names[at]}: {described(result)}", file=sys.stderr, flush=True)
    for results in found.values():
        ours = [result.get("samples_per_s") for result in results[names[0]]]
        for name in names:
            results[name] = summary(results[name], ours)
    return found


def summary(rounds: list[dict[str, Any]], ours: list[float | None]) -> dict[str, Any]:
    errors = [result["error"] for result in rounds if "error" in result]
    if errors:
        return {"error": errors[0]}
    rates = [result["samples_per_s"] for result in rounds]
    figures = {"rounds": rates, **spread(rates), "cpu_ms_a_sample": spread([result["cpu_ms"] for result in rounds])}
    figures["others_cores"] = spread([result["others_cores"] for result in rounds])
    if all(ours):
        figures["dstrain_over_it"] = spread([mine / other for mine, other in zip(ours, rates)])
    return figures


def described(result: dict[str, Any]) -> str:
    return result.get("error") or ", ".join(f"{name} {value:.4g}" for name, value in result.items())


def compare_resume(args: argparse.Namespace, runners: dict[str, Runner]) -> dict[str, Any]:
    """Return `[loader][part]` with the spread of the seconds, and the samples read in vain."""
    found: dict[str, Any] = {loader: {str(part): [] for part in PARTS} for loader in ("dstrain", *OTHERS)}
    for number in range(args.rounds):
        for part in PARTS:
            for loader in found:
                result = runners[loader](
                    case="resume", data=str(args.data), samples=args.tiny, rows=args.large, part=part
                )
                found[loader][str(part)].append(result)
                print(f"{number} resume {part} {loader}: {described(result)}", file=sys.stderr, flush=True)
    for parts in found.values():
        lead = parts[str(PARTS[0])][0].get("in_vain", 0)  # read ahead at any start, and delivered later
        for part, rounds in parts.items():
            errors = [result["error"] for result in rounds if "error" in result]
            parts[part] = (
                {"error": errors[0]}
                if errors
                else {
                    "first_s": spread([result["first_s"] for result in rounds]),
                    "open_s": spread([result["open_s"] for result in rounds]),
                    "samples": rounds[0]["samples"],
                    "in_vain": rounds[0]["in_vain"] - lead,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="what prepare.py filled")
    add("--cases", nargs="+", choices=[*CASES, "resume"], default=[*CASES, "resume"])
    add("--rounds", type=int, default=5)
    add(
        "--seconds", type=float, default=3.0, help="of a measurement of decoded samples; raw ones get half (default: 3)"
    )
    add("--warmup", type=int, default=1 << 40, help="samples before the clock starts, at most")
    add("--tiny", type=int, default=100_000, help="samples that webdataset and energon resume in")
    add("--large", type=int, default=LARGE, help="samples that the others resume in")
    add("--out", type=Path, required=True, help="JSON; it is added to, so that cases can be run one by one")
    args = parser.parse_args()
    start = time.perf_counter()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    result |= {"machine": machine(), "formats": json.loads((args.data / "formats.json").read_text())}
    result["settings"] = {name: getattr(args, name) for name in ("rounds", "seconds", "tiny", "large")}
    if "resume" in args.cases:
        prepare = [sys.executable, str(HERE / "data/resume.py"), str(args.data), str(args.tiny), str(args.large)]
        prepare += map(str, PARTS[1:])
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    runners = {loader: Runner(loader) for loader in ("dstrain", "bare", *OTHERS, "tarfile")}
    try:
        for case in args.cases:
            for kind in ("tar", "litdata", "mds"):
                warm(args.data / kind / (CASES[case].kind if case in CASES else "tiny"))
            result["cases"][case] = compare_resume(args, runners) if case == "resume" else compare(case, args, runners)
    finally:
        for runner in runners.values():
            runner.close()
    result["seconds"] = round(time.perf_counter() - start, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table.lay_out(result))


if __name__ == "__main__":
    main()
