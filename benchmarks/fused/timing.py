"""Timing in turns on a GPU, and the check that comes before it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, Protocol

import torch
from fused.cases import Case, Face, Tensors
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

PIECE = 1 << 25  # elements that are compared at once in fp64: gigabytes at the largest sizes
BOUND = 2.0**-6  # largest error of a kernel in bf16, which rounds by 2^-9; see `error_of`
LOOSE = 0.25  # of what others' code may be off: bf16 sums are, but a wrong operation is off by more
DESTROYS = ("liger",)  # faces whose backward writes into what they are given


class Wrong(Exception):
    """A face that does not compute what it should."""


@dataclass
class Program:
    """What is timed: a forward, and a backward of its results unless it is None."""

    forward: Callable[[], tuple[Tensor, ...]]
    backward: Callable[[tuple[Tensor, ...]], Sequence[Tensor]] | None


def program(face: Face, inputs: Tensors, upstream: Sequence[Tensor]) -> Program:
    """A face on inputs; `upstream` has a gradient for each result, or is empty."""
    wanted = [x for x in inputs.values() if x.requires_grad]

    def backward(outputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        return torch.autograd.grad(outputs, wanted, upstream)

    return Program(lambda: face(inputs), backward if upstream else None)


def programs(case: Case) -> dict[str, Program]:
    """One for each face; those that would spoil the inputs of the others have copies."""
    upstream = upstream_of(case)
    found = {}
    for name, face in case.faces.items():
        inputs, grads = case.inputs_of(name), upstream
        if name in DESTROYS:
            inputs = {key: x.detach().clone().requires_grad_(x.requires_grad) for key, x in inputs.items()}
            grads = [g.clone() for g in upstream]
        found[name] = program(face, inputs, grads)
    return found


def upstream_of(case: Case) -> list[Tensor]:
    """Random gradients of the results, the same for all faces."""
    if not case.backward_bytes:
        return []
    with torch.no_grad():
        outputs = case.faces["triton"](case.inputs)
    meta = outputs[0].is_meta
    generator = None if meta else torch.Generator(outputs[0].device).manual_seed(99)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) for x in outputs]


def error_of(actual: Tensor, exact: Tensor) -> float:
    """The largest |actual - exact| / (|exact| + root mean square of exact); infinite where either is not finite."""
    actual, exact = actual.double(), exact.double()
    scale = exact.abs() + exact.square().mean().sqrt() + 1e-30
    error = ((actual - exact).abs() / scale).amax().item() if exact.numel() else 0.0
    return error if math.isfinite(error) else math.inf


def check(case: Case, face: str) -> dict[str, float]:
    """Compare all results and gradients of a face with fp64, row for row; return the errors. Wrong if too large."""
    inputs = {key: x.detach().clone().requires_grad_(x.requires_grad) for key, x in case.inputs_of(face).items()}
    upstream = upstream_of(case)
    run = program(case.faces[face], inputs, [g.clone() for g in upstream])
    kept = run.forward()
    outputs = tuple(x.detach().clone() for x in kept) if face in DESTROYS else kept
    grads: dict[str, Tensor] = {}
    if run.backward:
        wanted = [key for key, x in inputs.items() if x.requires_grad]
        grads = case.joined(dict(zip(wanted, run.backward(kept))))
    errors = compare(case, outputs, grads, upstream)
    bound = case.bound or BOUND
    limit = bound if face == "triton" else max(LOOSE, bound)
    wrong = {name: e for name, e in errors.items() if not e <= limit}
    if wrong:
        raise Wrong(f"off by {', '.join(f'{e:.2g} ({name})' for name, e in wrong.items())}, at most {limit:.2g}")
    return errors


def pieces(case: Case) -> Iterator[tuple[int, int]]:
    """Cut the rows so that what fp64 needs fits beside the rest."""
    first = next(iter(case.rows.values()))
    rows, step = len(first), max(1, PIECE // max(1, first[0].numel()))
    sample = case.sample_rows or rows
    return (
        (a, min(a + step, start + sample))
        for start in range(0, rows, sample)
        for a in range(start, start + sample, step)
    )


def compare(case: Case, outputs: Sequence[Tensor], grads: Tensors, upstream: Sequence[Tensor]) -> dict[str, float]:
    """The error of each result and gradient."""
    shared = {key: case.shared[key].detach().double().requires_grad_() for key in case.shared}
    errors = dict.fromkeys([*(f"result {i}" for i in range(len(outputs))), *(f"d {key}" for key in grads)], 0.0)
    totals: list[Any] = [0.0] * len(outputs)

    def note(name: str, actual: Tensor, exact: Tensor) -> None:
        errors[name] = max(errors[name], error_of(actual.detach(), exact.detach()))

    for a, b in pieces(case):
        rows = {key: case.rows[key][a:b].detach().double().requires_grad_() for key in case.rows}
        exact = case.exact({**rows, **shared}, a, b)
        at: Any = slice(a, b) if case.order is None else case.order[a:b]
        for i, x in enumerate(exact):
            if case.sums:
                totals[i] = totals[i] + x.detach()
            else:
                note(f"result {i}", outputs[i][at], x)
        if grads:
            torch.autograd.backward(exact, [(g if case.sums else g[at]).double() for g in upstream])
            for key in case.rows.keys() & grads.keys():
                note(f"d {key}", grads[key][a:b], rows[key].grad)
    for i, total in enumerate(totals if case.sums else ()):
        note(f"result {i}", outputs[i], total)
    for key in shared.keys() & grads.keys():
        note(f"d {key}", grads[key], shared[key].grad)
    return errors


class Clock(Protocol):
    """What tells how long the device takes."""

    def __call__(self, work: Callable[[], Any], lead: float) -> tuple[Any, Callable[[], float], float]:
        """Run; return the result, what tells the device's microseconds once all is done, and the host's seconds."""

    def wait(self) -> None:
        """Until all is done."""


class CudaClock:
    """CUDA events around work that is queued behind a wait, so that the host's time is not in it.

    Before it a buffer larger than the cache is read: no input is left there, nor is anything to write back.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.zeros(max(64 << 20, 4 * cache) // 4, device=device)
        self._flush()
        self.cycles = 1e9
        self.cycles = 1e9 * 0.01 / max(1e-4, self._seconds_of_a_wait())

    def _flush(self) -> None:
        self.buffer.amax()

    def _seconds_of_a_wait(self) -> float:
        """Of one that should take 10 ms."""
        torch.cuda._sleep(1000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(int(0.01 * self.cycles))
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def __call__(self, work: Callable[[], Any], lead: float) -> tuple[Any, Callable[[], float], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush()
        if lead:
            torch.cuda._sleep(int(lead * self.cycles))
        start.record()
        begin = time.perf_counter()
        result = work()
        host = time.perf_counter() - begin
        end.record()
        return result, lambda: 1e3 * start.elapsed_time(end), host

    def wait(self) -> None:
        torch.cuda.synchronize()


@dataclass
class Times:
    """Microseconds of each round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # to queue both

    @property
    def step(self) -> list[float]:
        """Forward and backward together."""
        return [sum(pair) for pair in zip(self.forward, self.backward)] if self.backward else self.forward


def interleave(runs: dict[str, Program], clock: Clock, rounds: int, warmup: int = 3) -> dict[str, Times]:
    """Time all in turns, A B C A B C: what the machine does meanwhile hits all of them."""
    times = {name: Times() for name in runs}
    leads = {name: [0.0, 0.0] for name in runs}  # for which the device waits until the host has queued the work
    for k in range(-warmup, rounds):
        ready = []
        for name, run in runs.items():
            t, lead = times[name], leads[name]
            outputs, elapsed, host = clock(run.forward, lead[0])
            hosts, read = [host], [(t.forward, elapsed)]
            if (backward := run.backward) is not None:
                _, elapsed, host = clock(lambda f=backward, x=outputs: f(x), lead[1])
                hosts.append(host)
                read.append((t.backward, elapsed))
            del outputs
            if k >= 0:
                t.host.append(1e6 * sum(hosts))
                ready += read
            elif k > -warmup or warmup == 1:  # the very first calls are slow
                lead[: len(hosts)] = [max(old, min(0.2, 1.5 * new + 5e-5)) for old, new in zip(lead, hosts)]
        clock.wait()
        for values, elapsed in ready:
            values.append(elapsed())
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times longer one takes than the other: median and quartiles over the rounds, pair by pair."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def copy_program(forward_bytes: int, backward_bytes: int, device: torch.device) -> Program:
    """Copies that move as many bytes as an operation must: what the memory can do at this size."""
    halves = [max(1, n // 2) for n in (forward_bytes, backward_bytes)]
    source, target = (torch.empty(max(halves), dtype=torch.uint8, device=device) for _ in range(2))

    def copy(n: int) -> tuple[Tensor]:
        return (target[:n].copy_(source[:n]),)

    return Program(lambda: copy(halves[0]), (lambda _: copy(halves[1])) if backward_bytes else None)


def kept_bytes(run: Program, ignored: Sequence[Tensor] = ()) -> int:
    """Bytes of memory that autograd holds on to after a forward, inputs among them, `ignored` not."""
    kept: dict[int, int] = {}
    alive = []
    own = {x.untyped_storage()._cdata for x in ignored}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)  # else another may get its address
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        outputs = run.forward()
    del outputs
    return sum(kept.values())


def first_call(run: Program, wait: Callable[[], None]) -> float:
    """Seconds of the first forward and backward, compilation among them."""
    start = time.perf_counter()
    outputs = run.forward()
    if run.backward is not None:
        run.backward(outputs)
    wait()
    return time.perf_counter() - start
