"""The benchmark of fused operations: its formulas of bytes, its checks, its turns, and what it reports."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dstrain.kernels.backend import INTERPRETED

FOLDER = Path(__file__).parents[2] / "benchmarks"
META, CPU = torch.device("meta"), torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
WIDE = ["norm_modulate", "gated_norm_modulate", "gated_residual", "qk_norm_rope", "gelu_tanh", "gelu_sigmoid", "swiglu"]


@pytest.fixture(scope="module")
def bench():
    """The script as a module; its folder is on the path meanwhile."""
    sys.path.insert(0, str(FOLDER))
    loaded = {}
    for name in ("fused_kernels", "block_traffic"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        loaded[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    module = loaded["fused_kernels"]
    module.traffic = loaded["block_traffic"]
    from fused import cases, operations, report, timing

    module.modules = cases, operations, report, timing
    yield module
    sys.path.remove(str(FOLDER))
    for name in [n for n in sys.modules if n == "fused" or n.startswith("fused.")]:
        del sys.modules[name]


@pytest.fixture
def timing(bench):
    return bench.modules[3]


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("operation", [*WIDE, "add_noise", "velocity_loss"])
def test_the_least_bytes_are_those_that_kernels_move(bench, operation, samples):
    """Counted at full size on the meta device; a kernel never moves less, so that its share is not flattered."""
    size = bench.Size(*bench.QWEN, 16384, samples)
    case = bench.OPERATIONS[operation](bench.Maker(size, META))
    forward, backward = bench.traffic.Traffic(), bench.traffic.Traffic()
    with forward:
        outputs = case.faces["triton"](case.inputs)
    assert case.forward_bytes <= moved(forward) <= 1.03 * case.forward_bytes
    if case.backward_bytes:
        grads = [torch.empty_like(x) for x in outputs]
        with backward:
            torch.autograd.grad(outputs, [x for x in case.inputs.values() if x.requires_grad], grads)
        assert case.backward_bytes <= moved(backward) <= 1.03 * case.backward_bytes


def moved(counted):
    return sum(n for name, n in counted.bytes.items() if "partial sums" not in name)


@interpreted
def test_the_check_passes_and_writes_what_it_found(bench, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert bench.main(["--check", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {case["operation"] for case in found["operations"]} == set(bench.OPERATIONS)
    assert {case["samples"] for case in found["operations"]} == {1, 3}
    for case in [*found["operations"], *found["blocks"]]:
        assert all(0 < face["error"] < 0.05 for face in case["faces"].values()), case
    assert found["machine"]["torch"] == torch.__version__.split("+")[0] or found["machine"]["torch"]
    assert "agrees" in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize("spoil", ["result", "one row", "gradient", "table", "not a number"])
def test_a_wrong_kernel_is_found_and_not_timed(bench, timing, spoil):
    make = bench.Maker(bench.Size(*bench.TINY, 48, 3), CPU)
    case = bench.OPERATIONS["norm_modulate"](make)
    right = case.faces["eager"]

    def wrong(t):
        if spoil == "gradient":
            return right({**t, "x": Scaled.apply(t["x"])})
        if spoil == "table":
            return right({**t, "scale": Scaled.apply(t["scale"])})
        (y,) = right(t)
        y = y.clone()
        y.data[{"result": slice(None), "one row": 47, "not a number": 3}[spoil]] *= (
            float("nan") if spoil == "not a number" else 1.1
        )
        return (y,)

    case.faces = {"triton": wrong, "eager": right}
    with pytest.raises(timing.Wrong):
        timing.check(case, "triton")
    timing.check(case, "eager")
    found = bench.time_case("norm_modulate", case, make, FakeClock(), 1e9, quick=True)
    assert "wrong" in found["faces"]["triton"]
    assert "us" not in found["faces"]["triton"]
    assert "us" in found["faces"]["eager"]
    assert bench.faults({"operations": [found], "blocks": []})


class Scaled(torch.autograd.Function):
    """The same value, with a gradient that is a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def test_an_error_is_relative_to_the_element_and_to_all(timing):
    exact = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert timing.error_of(exact, exact) == 0
    assert timing.error_of(torch.tensor([1.0, -1.0, 1.0, 1.5]), exact) == pytest.approx(0.25)
    assert timing.error_of(torch.tensor([1.0, float("nan"), 1.0, 1.0]), exact) == float("inf")
    assert timing.error_of(torch.tensor([1.0, float("inf"), 1.0, 1.0]), exact) == float("inf")


@pytest.mark.parametrize("per_sample", [False, True])
def test_pieces_cover_all_rows_and_stay_in_a_sample(bench, timing, monkeypatch, per_sample):
    case = bench.OPERATIONS["norm_modulate" if per_sample else "gelu_tanh"](
        bench.Maker(bench.Size(*bench.TINY, 48, 3), CPU)
    )
    monkeypatch.setattr(timing, "PIECE", 5 * next(iter(case.rows.values())).shape[1])
    found = list(timing.pieces(case))
    assert [row for a, b in found for row in range(a, b)] == list(range(48))
    assert all(b - a <= 5 for a, b in found)
    if per_sample:
        assert all(a // 16 == (b - 1) // 16 for a, b in found)


class FakeClock:
    """Work takes as many microseconds as calls of the clock were made before; the host 1 ms."""

    def __init__(self):
        self.ticks, self.leads, self.done = itertools.count(1), [], False

    def __call__(self, work, lead):
        self.done = False
        self.leads.append(lead)
        tick = float(next(self.ticks))

        def read():
            assert self.done, "read before the device was waited for"
            return tick

        return work(), read, 1e-3

    def wait(self):
        self.done = True


def test_faces_take_turns_and_the_first_rounds_do_not_count(timing):
    calls = []

    def make(name):
        def forward():
            calls.append(name)
            return (torch.ones(1),)

        return timing.Program(forward, lambda outputs: calls.append(f"d{name}"))

    clock = FakeClock()
    runs = {"a": make("a"), "b": make("b"), "c": timing.Program(make("c").forward, None)}
    times = timing.interleave(runs, clock, rounds=4, warmup=2)
    assert calls == ["a", "da", "b", "db", "c"] * 6
    assert times["a"].forward == [11, 16, 21, 26]
    assert times["b"].backward == [14, 19, 24, 29]
    assert times["c"].backward == []
    assert times["c"].step == times["c"].forward
    assert times["a"].step == [23, 33, 43, 53]
    assert times["a"].host == [2000.0] * 4
    # The device waits for the host once it is known how long that needs.
    assert clock.leads[:10] == [0.0] * 10
    assert all(lead == pytest.approx(1.55e-3) for lead in clock.leads[10:])


def test_the_clock_of_a_gpu_waits_between_its_events(timing, monkeypatch):
    """In the order that a GPU sees: an empty cache, a wait as long as the host needs, and only then the first event."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 5.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(cycles))
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    clock = timing.CudaClock(CPU)
    assert clock.buffer.nbytes == 64 << 20
    assert clock.cycles == 2e9  # what should have taken 10 ms at 1e9 a second took 5
    order.clear()
    monkeypatch.setattr(clock, "_flush", lambda: order.append("flush"))
    result, elapsed, host = clock(lambda: order.append("work") or 7, 0.001)
    assert order == ["flush", 2_000_000, "event", "work", "event"]
    assert (result, elapsed()) == (7, 5000.0)
    assert 0 <= host < 1


def test_spreads_and_ratios(timing):
    assert timing.spread([1, 2, 3, 4, 5]) == {"median": 3, "q1": 2, "q3": 4}
    assert timing.spread([7.0]) == {"median": 7, "q1": 7, "q3": 7}
    assert timing.ratio([2, 4, 9], [1, 2, 3])["median"] == 2
    with pytest.raises(ValueError, match="shorter"):
        timing.ratio([1, 2], [1])


def test_what_is_kept_is_counted_once(timing):
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    run = timing.Program(lambda: ((x * w) * x.exp(),), lambda outputs: ())
    # x, w, their product, and the exponential, which is saved twice.
    assert timing.kept_bytes(run) == 4 * 40
    assert timing.kept_bytes(run, [w]) == 3 * 40


def test_a_copy_moves_as_many_bytes(bench, timing):
    run = timing.copy_program(1000, 400, CPU)
    counted = bench.traffic.Traffic()
    with counted:
        outputs = run.forward()
    assert counted.bytes.total() == 1000
    with counted:
        run.backward(outputs)
    assert counted.bytes.total() == 1400
    assert timing.copy_program(10, 0, CPU).backward is None


def test_a_budget_refuses_what_it_cannot_pay(bench):
    clock = [0.0]
    budget = bench.Budget(100, now=lambda: clock[0])
    assert budget.refuses("a", 1000) == ""
    budget.spent("a", 1000, 30)
    clock[0] = 30
    assert budget.refuses("a", 2000) == ""
    assert "70 s are left, about 125 s needed" in budget.refuses("a", 4000)
    assert budget.refuses("a", 2000, power=1.5)
    clock[0] = 99
    assert budget.refuses("b", 1000)


def test_glue_is_what_is_left(bench):
    from fused.block import shares

    kernels = [("gemm", 60.0), ("flash_fwd", 20.0), ("elementwise", 15.0), ("norm", 5.0)]
    operators = [("aten::addmm", 40.0), ("aten::mm", 20.0), ("aten::_flash_attention_forward", 20.0), ("aten::mul", 15)]
    assert shares(kernels, operators) == {"matmuls": 60, "attention": 20, "glue": 20}
    inductor = [("triton_poi_fused_cat_scaled_dot_product_attention_0", 5.0), ("aten::mul", 5.0), *operators[:3]]
    assert shares(kernels, inductor) == {"matmuls": 60, "attention": 20, "glue": 20}
    with pytest.raises(RuntimeError, match="do not add up"):
        shares(kernels, operators[2:])
    with pytest.raises(RuntimeError, match="do not add up"):
        shares(kernels[:1], operators)


def test_a_whole_run_with_a_clock_that_is_not_one(bench, tmp_path, monkeypatch):
    """All that a GPU would do but the clock, the compilers, the kernels, and its memory's size."""
    cases, _operations, report, _timing = bench.modules
    monkeypatch.setattr(cases, "compiled", lambda function: function)
    monkeypatch.setattr(bench, "TOKENS", (64, 96))
    monkeypatch.setattr(bench, "QWEN", ("Qwen-Image and FLUX", 32, 1, 64))
    monkeypatch.setattr(bench, "WAN", ("Wan-14B", 64, 2, 64))
    monkeypatch.setattr(bench, "FACES", ("triton", "diffusers"))
    monkeypatch.setattr(bench, "SECONDS", 0)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda clock, device: 1e9)
    monkeypatch.setattr(bench, "memory", lambda run: {"kept_after_forward": 10, "peak_with_gradients": 20})
    monkeypatch.setattr(bench, "glue", lambda run: {"matmuls": 5.0, "attention": 2.0, "glue": 3.0})
    ours = bench.Block._ours
    monkeypatch.setattr(bench.Block, "_ours", lambda block, face: ours(block, "reference"))
    names = ["norm_modulate", "swiglu", "add_noise"]
    for name in names:
        monkeypatch.setitem(bench.OPERATIONS, name, without_kernel(bench.OPERATIONS[name]))
    add_noise = bench.make_add_noise
    monkeypatch.setattr(bench, "make_add_noise", lambda make, drawn: without_kernel(add_noise)(make, drawn=drawn))
    real = bench.OPERATIONS["swiglu"]

    def out_of_memory(make):
        if make.size.tokens == 96:
            raise torch.OutOfMemoryError("no more")
        return real(make)

    monkeypatch.setitem(bench.OPERATIONS, "swiglu", out_of_memory)
    args = bench.argparse.Namespace(quick=False, operations=names, no_block=False)
    found = bench.measure(args, bench.Budget(1e4), FakeClock(), CPU)
    assert not bench.faults(found)
    ran = [(c["operation"], c["model"], c["tokens"], c["samples"]) for c in found["operations"]]
    assert len(ran) == len(set(ran)) == 12
    assert ("add_noise", "Wan-14B", 64, 1) not in ran
    assert [s["reason"] for s in found["skipped"]] == ["out of memory"] * 2
    assert [(b["tokens"], b["samples"]) for b in found["blocks"]] == [(64, 1), (64, 4), (96, 1)]
    first = found["operations"][0]
    assert set(first["faces"]) >= {"triton", "eager", "compile"}
    triton = first["faces"]["triton"]
    assert triton["forward"]["gb_per_s"] == pytest.approx(
        first["least_bytes"][0] / triton["us"]["forward"]["median"] / 1e3, abs=0.1
    )
    assert triton["times_triton"]["step"] == {"median": 1, "q1": 1, "q3": 1}
    assert triton["kept_bytes"] > 0
    assert triton["first_call_s"] > 0

    found["machine"] = report.machine(CPU)
    report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    reached = {f["what"]: f for f in report.verdicts(found)}
    assert reached["glue, times faster than eager"]["measured"] == 1
    assert reached["glue, times faster than eager"]["reached"] is False
    assert reached["share of copy bandwidth, least of all"]["reached"] is None  # no operation was large
    report.print_verdicts(list(reached.values()))
    json.dumps(found)


def without_kernel(make_case):
    def make(*args, **named):
        case = make_case(*args, **named)
        case.faces["triton"] = case.faces["eager"]
        return case

    return make


def test_arguments_that_make_no_sense(bench, monkeypatch):
    monkeypatch.setattr(bench, "GPU", False)
    for argv in ([], ["--check", "--plot", "x.png"], ["--check", "--operations", "nothing"]):
        with pytest.raises(SystemExit):
            bench.parse_args(argv)


def test_samples_share_the_tokens_equally(bench):
    assert bench.Size("m", 8, 1, 8, 96, 4).length == 24
    with pytest.raises(ValueError, match="not 4 samples"):
        _ = bench.Size("m", 8, 1, 8, 100, 4).length
    for tokens in bench.TOKENS:
        assert all(size.length for size in bench.sizes(tokens, quick=False))
