"""The launches of adaptive layer norm by themselves: what the block calls, what a compiler and a meta device see."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, assert_near, compile_for_gpu, poisoned
from modulation_cases import EPS, Case, assert_all_near

from dstrain.kernels import modulation_ops


def index_of(case, rows=None):
    chunks = case.segments.chunks(rows or 8)
    return case.segments.of_row, chunks.bounds, chunks.starts


@DEVICES
@DTYPES
def test_raw_norm_backward_adds_the_residual_and_remakes_y(device, dtype):
    case = Case((9, 2, 12, 4), 1, 0, 64, device, dtype)
    x, shift, scale, dy, dout = (t.detach() for t in (case.x, case.shift, case.scale, case.dy, case.dout))
    none = dy.new_empty(0)
    y, mean, rstd = modulation_ops.norm_modulate_forward(x, shift, scale, case.index[0], EPS)
    torch.testing.assert_close(mean, x.float().mean(1))
    torch.testing.assert_close(rstd, (x.float().var(1, correction=0) + EPS).rsqrt())
    args = dy, x, mean, rstd, shift, scale, *index_of(case)
    with poisoned():
        dx, dshift, dscale, nothing = modulation_ops.norm_modulate_backward(*args, none, False)
        dx_and, dshift2, dscale2, y_again = modulation_ops.norm_modulate_backward(*args, dout, True)
        dx_only, *tables, _ = modulation_ops.norm_modulate_backward(*args, dout, False, False)
    assert nothing.numel() == 0 and [t.numel() for t in tables] == [0, 0]
    assert torch.equal(dshift, dshift2) and torch.equal(dscale, dscale2) and torch.equal(dx_and, dx_only)
    assert_near(y_again, y, "y")
    _, (dx_wanted, *_) = case.wanted("norm", None)
    assert_near(dx_and, dx_wanted + dout, "dx")
    assert_near(dx, dx_wanted, "dx")


@DEVICES
def test_raw_gated_norm_backward_remakes_y_and_needs_no_dout(device):
    case = Case((9, 2, 12, 4), 2, 2, 64, device)
    x, h, gate, shift, scale, *biases = (t.detach() for t in case.inputs("gated_norm"))
    of_row, bounds, starts = index_of(case)
    tables = gate, shift, scale
    out, y, mean, rstd = modulation_ops.gated_norm_modulate_forward(x, h, biases, *tables, of_row, 2, EPS)
    args = case.dy.detach(), out, h, biases, mean, rstd, *tables, of_row, bounds, starts, 2, True
    *grads, again = modulation_ops.gated_norm_modulate_backward(x.new_empty(0), *args)
    *wanted, _ = modulation_ops.gated_norm_modulate_backward(torch.zeros_like(x), *args)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))
    assert_near(again, y, "y")
    dx, dh, *others, _ = modulation_ops.gated_norm_modulate_backward(torch.zeros_like(x), *args, False)
    assert torch.equal(dx, grads[0]) and torch.equal(dh, grads[1]) and not any(t.numel() for t in others)


@DEVICES
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_of_any_size_give_the_same_sums(device, rows):
    case = Case((20, 1, 2, 11), 2, 2, 5, device)
    x, h, gate, shift, scale, *biases = (t.detach() for t in case.inputs("gated_norm"))
    of_row, bounds, starts = index_of(case, rows)
    tables, dy, dout = (gate, shift, scale), case.dy.detach(), case.dout.detach()
    out, y, mean, rstd = modulation_ops.gated_norm_modulate_forward(x, h, biases, *tables, of_row, 2, EPS)
    with poisoned():
        args = dout, dy, out, h, biases, mean, rstd, *tables, of_row, bounds, starts, 2, False
        dx, dh, dbiases, *dtables, _ = modulation_ops.gated_norm_modulate_backward(*args)
        dh_only, dbiases_only, dgate = modulation_ops.gated_residual_backward(
            dout, h, biases, gate, of_row, bounds, starts, 2
        )
    assert_all_near(case, "gated_norm", (out, y), (dx, dh, *dtables, *dbiases))
    _, (_, dh_wanted, dgate_wanted, *dbiases_wanted) = case.wanted("gated", None)
    assert_near(dh_only, dh_wanted, "dh")
    assert_near(dgate, dgate_wanted, "dgate")
    assert_near(dbiases_only, torch.stack(dbiases_wanted), "dbiases")


@DEVICES
def test_sums_of_many_chunks(device):
    counts = torch.tensor([1, 130, 257, 2])
    starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).to(device, torch.int32)
    sums = torch.randn(3, int(counts.sum()), 40, device=device)
    with poisoned():
        tables, biases = [torch.empty(4, 40, device=device) for _ in range(2)], torch.empty(2, 40, device=device)
    modulation_ops._add_sums(sums, starts, 2, tables, biases)
    wanted = torch.stack([part.sum(1) for part in sums.double().split(counts.tolist(), 1)], 1)  # [3, 4, 40]
    for actual, sum64 in zip((*tables, biases), (wanted[0], wanted[1], wanted[2].view(2, 2, 40).sum(1))):
        assert_near(actual, sum64)


@DEVICES
def test_what_dispatch_modes_are_told_of_the_launches_is_true(device):
    case = Case((4, 3), 2, 2, 16, device)
    x, h, gate, shift, scale, *biases = (t.detach() for t in case.inputs("gated_norm"))
    dy, none = case.dy.detach(), x.new_empty(0)
    of_row, _bounds, _starts = index = index_of(case)
    tables, (mean, rstd) = (gate, shift, scale), (torch.zeros(len(x), device=device) for _ in range(2))
    for op, args in (
        ("norm_modulate_forward", (x, shift, scale, of_row, EPS)),
        ("norm_modulate_backward", (dy, x, mean, rstd, shift, scale, *index, none, False)),
        ("norm_modulate_backward", (dy, x, mean, rstd, shift, scale, *index, dy, True, False)),
        ("gated_norm_modulate_forward", (x, h, biases, *tables, of_row, 2, EPS)),
        ("gated_norm_modulate_backward", (dy, dy, x, h, biases, mean, rstd, *tables, *index, 2, False)),
        ("gated_norm_modulate_backward", (dy, dy, x, h, [], mean, rstd, *tables, *index, 2, False)),
        ("gated_norm_modulate_backward", (dy, dy, x, h, biases, mean, rstd, *tables, *index, 2, True, False)),
        ("gated_residual_forward", (x, h, biases, gate, of_row, 2)),
        ("gated_residual_backward", (dy, h, biases, gate, *index, 2)),
        ("gated_residual_backward", (dy, h, [], gate, *index, 2, False)),
    ):
        torch.library.opcheck(getattr(modulation_ops, op), args, test_utils=("test_schema", "test_faketensor"))


COMPILE = """
from dstrain.kernels import modulation_kernels as kernels, modulation_ops as ops
names = "x h bias0 bias1 gate shift scale out y dout dy dx dh table0 table1 table2 bias".split()
narrow, wide, tile = ops._row_sizes(width, 32), ops._row_sizes(width, 16), ops._tile_sizes(width)
for dtype in dtypes:
    pointers = {name + "_ptr": "*" + dtype for name in names}
    pointers |= {name + "_ptr": "*i32" for name in ("of_row", "bounds", "starts")}
    pointers |= {name + "_ptr": "*fp32" for name in ("mean", "rstd", "sums")}

    def one(kernel, **constants):
        own, left = ({k: v for k, v in d.items() if k in kernel.arg_names} for d in (pointers, ones))
        rest = {k: v for k, v in scalars.items() if k in kernel.arg_names}
        return ptx(kernel, own, rest, **left, **constants)

    one(kernels.norm_forward_kernel, GATED=True, BIASES=2, **narrow)
    backward = dict(DOUT=True, GATED=True, BIASES=2, TABLES=True, AGAIN=True, STAGES=2)
    text = one(kernels.norm_backward_kernel, **wide, **backward)
    assert width < 3072 or "cp.async" in text  # rows to come are fetched while one is worked on
    one(kernels.norm_backward_kernel, aligned=False, **wide, **backward)
    one(kernels.residual_forward_kernel, BIASES=2, **tile)
    one(kernels.residual_backward_kernel, BIASES=2, TABLES=True, **tile)
    one(kernels.sum_chunks_kernel, D=width, TABLES=3, R=ops.SUM_ROWS, TILE=ops.SUM_COLUMNS, num_warps=8)
"""


@pytest.mark.parametrize("width", [3072, 5120])
def test_kernels_compile_for_a_gpu_without_one(width):
    assert modulation_ops._row_sizes(width, 16)["TILE"] * modulation_ops._row_sizes(width, 16)["TILES"] == width
    scalars = dict.fromkeys(("gate_stride", "shift_stride", "scale_stride"), "i32=16")
    scalars |= dict.fromkeys(("rows", "chunks", "segments", "each"), "i32") | {"eps": "fp32"}
    compile_for_gpu(f"width, dtypes, scalars, ones = {width}, ('bf16', 'fp32'), {scalars}, {{}}" + COMPILE)


def test_kernels_compile_where_counts_are_one():
    # Triton makes constants of integers that are 1, and constants have no methods.
    ones = dict.fromkeys(("gate_stride", "shift_stride", "scale_stride", "rows", "chunks", "segments", "each"), 1)
    compile_for_gpu(f"width, dtypes, scalars, ones = 40, ('bf16',), {{'eps': 'fp32'}}, {ones}" + COMPILE)


def test_chunks_fill_a_gpu_and_none_of_it_waits_for_a_few():
    for lengths in ((4096,), (512, 4096), (65536,), (300, 200, 4096, 4096), (64,) * 64):
        rows = modulation_ops._chunk_rows(lengths, 264)
        count = sum(-(-length // rows) for length in lengths)
        assert 8 <= rows <= 64 and count > 0.95 * 264
        assert count / (-(-count // 264) * 264) > 0.95
