"""Check and time every fused operation, forward and backward, and a whole Qwen-Image block, on one NVIDIA GPU.

    python benchmarks/fused_kernels.py --out kernels.json --plot kernels.png
    python benchmarks/fused_kernels.py --quick    # a smoke run
    python benchmarks/fused_kernels.py --check    # without timing; off the GPU in Triton's interpreter, at small sizes

Each operation runs with dstrain's Triton kernels, as eager bf16 code that a user writes (as in diffusers), as
torch.compile of that, and with Liger's kernel where one does the same. What is timed was compared before, at that size,
with fp64, row for row. All faces of an operation take turns in one run; times are the device's (CUDA events around work
that is queued already, with an empty cache), medians and quartiles. A copy of as many bytes takes part in the turns.

GB/s are the least bytes that an operation must move (fused/operations.py) over the time; shares are of the bandwidth
that a large copy has on the same device in the same run. Sizes that memory or the budget of time forbid are left out,
and the result says so. Compilers start with empty caches, so that the first call's seconds are those of a new machine.
"""

# Not named kernels.py: beside a script of that name transformers takes it for the Hub's package.
# ruff: noqa: E402
import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from fused import report
from fused.block import FACES, Block, glue, memory
from fused.cases import Case, Maker, Size
from fused.operations import NARROW, OPERATIONS, make_add_noise
from fused.timing import (
    Clock,
    CudaClock,
    Program,
    Times,
    Wrong,
    check,
    copy_program,
    first_call,
    interleave,
    kept_bytes,
    programs,
    ratio,
    spread,
)

from dstrain.storage import write_json

QWEN, WAN = ("Qwen-Image and FLUX", 3072, 24, 12288), ("Wan-14B", 5120, 40, 13824)
TOKENS = (4608, 16384, 65536)
TINY = ("tiny", 96, 2, 160)
ONE_PACK = ("gelu_tanh", "gelu_sigmoid", "swiglu")  # know no samples
SECONDS = 0.4  # of measuring a case
Found = dict[str, Any]


class Budget:
    """Seconds that are left, and what is known of how long things take."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + seconds
        self.took: dict[str, tuple[int, float]] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.end - self.now())

    def refuses(self, what: str, tokens: int, power: float = 1.0) -> str:
        """Why there is no time for `what` at so many tokens, with whose power its time grows; "" if there is."""
        known, seconds = self.took.get(what, (tokens, 10.0))
        need, left = 5 + seconds * (tokens / known) ** power, self.left
        return "" if need <= left else f"the budget of time: {left:.0f} s are left, about {need:.0f} s needed"

    def spent(self, what: str, tokens: int, seconds: float) -> None:
        """Remember how long it took, first calls not counted."""
        self.took[what] = tokens, max(0.0, seconds)


def sizes(tokens: int, quick: bool) -> list[Size]:
    """What is measured with so many tokens: a sample, and a pack of four."""
    found = [Size(*QWEN, tokens, 1)]
    return found if quick else [*found, Size(*QWEN, tokens, 4), Size(*WAN, tokens, 1)]


def applies(operation: str, size: Size) -> bool:
    """Whether an operation is another one at this size than at those before."""
    return not (operation in NARROW and size.model == WAN[0]) and not (operation in ONE_PACK and size.samples > 1)


def try_faces(faces: Sequence[str], attempt: Callable[[str], Found]) -> dict[str, Found]:
    """Run each face; one that fails or is wrong has its reason instead of figures, and is not timed."""
    found: dict[str, Found] = {}
    for face in faces:
        try:
            found[face] = attempt(face)
        except Wrong as error:
            found[face] = {"wrong": str(error)}
        except torch.OutOfMemoryError:
            found[face] = {"skipped": "out of memory"}
            torch.cuda.empty_cache()
        except Exception as error:  # another's kernel, or a compiler, that this machine does not suit
            found[face] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return found


def check_case(operation: str, case: Case, make: Maker, faces: Sequence[str] = ()) -> dict[str, Found]:
    """The largest error of each face."""
    if operation == "add_noise":
        case = make_add_noise(make, drawn=False)

    def attempt(face: str) -> Found:
        errors = check(case, face)
        return {"error": max(errors.values()), "errors": errors}

    return try_faces(faces or list(case.faces), attempt)


def rounds_for(runs: dict[str, Program], clock: Clock, quick: bool) -> int:
    """As many rounds as fit the time for a case."""
    if quick:
        return 5
    start = time.perf_counter()
    interleave(runs, clock, rounds=1, warmup=2)
    return max(7, min(40, int(SECONDS * 3 / max(1e-9, time.perf_counter() - start))))


def time_case(operation: str, case: Case, make: Maker, clock: Clock, bandwidth: float, quick: bool) -> Found:
    """Check all faces, then time them in turns."""
    runs = programs(case)
    starts = try_faces(list(runs), lambda face: {"first_call_s": first_call(runs[face], clock.wait)})
    checked = check_case(operation, case, make, [face for face, found in starts.items() if "first_call_s" in found])
    faces = {face: {**found, **checked.get(face, {})} for face, found in starts.items()}
    good = {face: runs[face] for face, found in faces.items() if "error" in found}
    least = case.forward_bytes, case.backward_bytes
    timed = {**good, "copy": copy_program(*least, make.device)}
    times = interleave(timed, clock, rounds_for(timed, clock, quick))
    for face, run in good.items():
        faces[face] |= figures(times[face], times["copy"], least, bandwidth)
        if run.backward is not None:
            faces[face]["kept_bytes"] = kept_bytes(run)
        if "triton" in good:
            faces[face]["times_triton"] = compare(times[face], times["triton"])
    return {
        "operation": operation, "model": make.size.model, "width": make.size.width, "tokens": make.size.tokens,
        "samples": make.size.samples, "least_bytes": least, "eager": case.eager, "left_out": case.notes,
        "rounds": len(times["copy"].forward), "copy_us": parts(times["copy"]), "faces": faces,
    }  # fmt: skip


def parts(times: Times) -> Found:
    """Microseconds of forward, backward, and both."""
    found = {"forward": spread(times.forward)}
    return {**found, "backward": spread(times.backward), "step": spread(times.step)} if times.backward else found


def compare(slow: Times, fast: Times) -> Found:
    """How many times longer: forward, backward, and both."""
    found = {"forward": ratio(slow.forward, fast.forward)}
    if slow.backward:
        found |= {"backward": ratio(slow.backward, fast.backward), "step": ratio(slow.step, fast.step)}
    return found


def figures(times: Times, copy: Times, least: tuple[int, int], bandwidth: float) -> Found:
    """Times, GB/s, and shares of what the memory can do."""
    found: Found = {"us": parts(times), "host_us": spread(times.host)}
    for part, count in zip(("forward", "backward"), least):
        if count:
            median, same = found["us"][part]["median"], spread(getattr(copy, part))["median"]
            found[part] = {
                "gb_per_s": round(count / median / 1e3, 1),
                "share_of_copy": round(count / median * 1e6 / bandwidth, 4),
                "share_of_copy_of_this_size": round(same / median, 4),
            }
    return found


def copy_bandwidth(clock: Clock, device: torch.device, size: int = 4 << 30) -> float:
    """Bytes a second, read and written, of a copy that moves so many."""
    run = {"copy": copy_program(size, 0, device)}
    return size / (spread(interleave(run, clock, rounds=15)["copy"].forward)["median"] / 1e6)


def time_block(block: Block, clock: Clock, budget: Budget, quick: bool) -> Found:
    """Check and time a whole block."""
    exact = block.exact()
    plain = block.errors("diffusers", exact)
    slow_start = "" if budget.left > 120 and not quick else "no time to compile a block"
    runs: dict[str, Program] = {}

    def attempt(face: str) -> Found:
        if slow_start and "compile" in face:
            return {"skipped": slow_start}
        run = block.program(face)
        start = first_call(run, clock.wait)
        errors = block.check(face, exact, plain)
        runs[face] = run
        return {"first_call_s": start, "error": max(errors.values()), "memory": memory(run)}

    faces = try_faces(FACES, attempt)
    exact.clear()
    times = interleave(runs, clock, 5 if quick else 12)
    for face, t in times.items():
        faces[face] |= {"us": parts(t), "host_us": spread(t.host)}
        faces[face] |= {"times_triton": compare(t, times["triton"])} if "triton" in times else {}
        try:
            faces[face]["kernels_us"] = glue(runs[face])
        except Exception as error:  # a machine may not let its counters be read
            faces[face]["kernels_us"] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    sizes = {"width": block.dim, "samples": block.samples, "image_tokens": block.image, "text_tokens": block.text}
    return {**sizes, "tokens": block.layout.tokens, "faces": faces}


def measure(args: argparse.Namespace, budget: Budget, clock: Clock, device: torch.device) -> Found:
    """Everything, small sizes first."""
    bandwidth = copy_bandwidth(clock, device)
    found: Found = {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
    found |= {name: [] for name in ("operations", "blocks", "skipped", "broken")}

    def attempt(what: str, tokens: int, kind: str, work: Callable[[], Found]) -> None:
        # Attention's time grows with the square of the tokens, and is a part of a block's.
        reason, start, first = budget.refuses(what, tokens, 1.5 if kind == "blocks" else 1.0), budget.now(), 0.0
        if not reason:
            try:
                found[kind].append(case := work())
                report.line(case)
                first = sum(face.get("first_call_s", 0.0) for face in case["faces"].values())
            except torch.OutOfMemoryError:
                reason = "out of memory"
            except Exception as error:  # what was measured before is worth keeping
                reason = f"{type(error).__name__}: {error}"[:500]
                found["broken"].append(f"{what}, {tokens} tokens: {reason}")
            torch.cuda.empty_cache()
            budget.spent(what, tokens, budget.now() - start - first)
        if reason:
            found["skipped"].append({"what": what, "tokens": tokens, "reason": reason})
            print(f"{what}, {tokens} tokens: skipped, {reason}", flush=True)

    for tokens in TOKENS[:1] if args.quick else TOKENS:
        for name in args.operations:
            for size in (s for s in sizes(tokens, args.quick) if applies(name, s)):

                def work(name: str = name, size: Size = size) -> Found:
                    make = Maker(size, device)
                    return time_case(name, OPERATIONS[name](make), make, clock, bandwidth, args.quick)

                attempt(f"{name}, {size.model}, {size.samples} samples", tokens, "operations", work)
        for samples in [] if args.no_block else [1, 4] if tokens == TOKENS[0] and not args.quick else [1]:
            text = min(512, tokens // 9) // samples

            def block(samples: int = samples, image: int = tokens // samples - text, text: int = text) -> Found:
                return time_block(Block(*QWEN[1:3], samples, image, text, device), clock, budget, args.quick)

            attempt(f"block, {samples} samples", tokens, "blocks", block)
    return found


def check_all(args: argparse.Namespace, device: torch.device) -> Found:
    """Compare all operations, and the block, with what is exact; on a GPU at the least of the sizes that are timed."""
    found: Found = {"operations": [], "blocks": []}
    tiny = [Size(*TINY, 48, n, channels=20) for n in (1, 3)]
    for name in args.operations:
        for size in (s for s in (sizes(TOKENS[0], False) if GPU else tiny) if applies(name, s)):
            make = Maker(size, device)
            faces = check_case(name, OPERATIONS[name](make), make, [] if GPU else ["triton", "eager"])
            what = {"operation": name, "model": size.model, "tokens": size.tokens, "samples": size.samples}
            found["operations"].append({**what, "faces": faces})
            report.line(found["operations"][-1])
    if not args.no_block:
        block = Block(*((3072, 24, 2, 1024, 64) if GPU else (64, 2, 2, 6, 2)), device)
        exact = block.exact()
        plain = block.errors("diffusers", exact)

        def attempt(face: str) -> Found:
            return {"error": max(block.check(face, exact, plain).values())}

        found["blocks"].append({"tokens": block.layout.tokens, "samples": 2, "faces": try_faces(FACES[:2], attempt)})
        report.line(found["blocks"][-1])
    return found


def faults(found: Found) -> list[str]:
    """What is wrong with dstrain's own kernels, and where."""
    wrong = [
        f"{case.get('operation', 'block')}, {case['tokens']} tokens, {case['samples']} samples: {reason}"
        for case in [*found["operations"], *found["blocks"]]
        for key in ("wrong", "failed")
        if (reason := case["faces"].get("triton", {}).get(key))
    ]
    return [*wrong, *found.get("broken", [])]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--check", action="store_true", help="compare with what is exact, and time nothing")
    add("--quick", action="store_true", help="the smallest size, few rounds")
    add("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), metavar="NAME")
    add("--no_block", action="store_true", help="leave the whole block out")
    add("--budget", type=float, default=420, help="seconds after which no further size begins (%(default)s)")
    add("--out", type=Path, help="JSON file to write")
    add("--plot", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    if args.plot and args.check:
        parser.error("--check times nothing: there is nothing to plot")
    if not GPU and not args.check:
        parser.error("timing needs an NVIDIA GPU; --check runs without one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    start, device = time.monotonic(), torch.device("cuda" if GPU else "cpu")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if not args.check:
            os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        budget = Budget(args.budget)
        found = check_all(args, device) if args.check else measure(args, budget, CudaClock(device), device)
    found = {"machine": report.machine(device), "seconds": round(time.monotonic() - start, 1), **found}
    if not args.check:
        found["figures_to_reach"] = report.verdicts(found)
        report.print_verdicts(found["figures_to_reach"])
    if args.out:
        write_json(args.out, found)
    if args.plot:
        report.plot(found, args.plot)
    wrong = faults(found)
    for line in wrong:
        print(f"WRONG: {line}")
    print(f"{found['seconds']:.0f} s, {'wrong' if wrong else 'all of dstrain agrees with what is exact'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
