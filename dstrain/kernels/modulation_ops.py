"""The launches of dstrain.kernels.modulation, as custom ops: torch.compile passes over them, dispatch modes count them.

They check nothing: rows are contiguous [S, D], tables [M, D] have rows without gaps (they may lie apart), all of one
dtype. Gradients of tables and biases are summed in fp32, in an order that does not depend on timing: each of the chunks
`bounds` and `starts` by itself (`norm_chunks`, `residual_chunks`), then those of a segment or stream. With tables=False
these gradients are left out. A result that is not wanted has 0 elements.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dstrain.kernels import modulation_kernels as kernels
from dstrain.kernels.backend import on_device, triton
from dstrain.kernels.segments import Chunks, Segments

PIPELINE_BYTES = 65536  # shared memory that a program may fill with rows that it will need next
SUM_ROWS, SUM_COLUMNS = 128, 32  # of sums of chunks that a program adds up at a time


def norm_chunks(segments: Segments) -> Chunks:
    """Chunks for the backward of the norms: one for each processor of the GPU at a time, and none of these idle.

    A program keeps its processor busy by fetching rows ahead; half the chunks are half the sums to write and read.
    """
    device = segments.of_row.device
    cuda = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 132
    return segments.chunks(_chunk_rows(segments.lengths, processors))


@lru_cache(maxsize=64)
def _chunk_rows(lengths: tuple[int, ...], at_once: int) -> int:
    def time(rows: int) -> int:  # in rows: each chunk also reads its tables and writes its sums
        return -(-sum(-(-length // rows) for length in lengths) // at_once) * (rows + 4)

    return min(range(8, 65), key=time)


def residual_chunks(segments: Segments) -> Chunks:
    """Chunks for the backward of `gated_residual`, whose programs also share out the columns."""
    return segments.chunks(128)


def _row_sizes(width: int, elements: int) -> dict[str, int]:
    """How a program holds R whole rows: in pieces that are powers of two and waste little, some `elements` a thread."""
    tiles = [1 << n for n in range(6, 32) if 1 << n >= min(1024, width) and -(-width // (1 << n)) <= 8]
    tile = min(tiles, key=lambda size: (-(-width // size) * size, -size))
    pieces = -(-width // tile)
    rows = max(1, 2048 // (tile * pieces))
    # A thread should have at least four neighbours of each piece, or it loads too few bytes at a time.
    warps = min(16, rows * tile // 128, triton.next_power_of_2(-(-rows * tile * pieces // (32 * elements))))
    return {"D": width, "TILE": tile, "TILES": pieces, "R": rows, "num_warps": max(4, warps)}


def _tile_sizes(width: int) -> dict[str, int]:
    tile = min(128, triton.next_power_of_2(width))
    return {"D": width, "TILE": tile, "R": 2048 // tile}


def _two(biases: list[Tensor], other: Tensor) -> list[Tensor]:
    return [*biases, other, other][:2]


def _launch_norm(
    x: Tensor,
    h: Tensor,
    biases: list[Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    of_row: Tensor,
    streams: int,
    eps: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the statistics of what was normed; fill `out` unless it has no elements."""
    y, (mean, rstd) = torch.empty_like(x), _empty_statistics(x)
    sizes, strides = _row_sizes(x.shape[1], 32), [table.stride(0) for table in tables]
    tensors = x, h, *_two(biases, x), *tables, of_row, out, y, mean, rstd
    with on_device(x.device):
        kernels.norm_forward_kernel[(triton.cdiv(len(x), sizes["R"]),)](
            *tensors,
            *strides,
            len(x),
            len(tables[0]) // streams,
            eps,
            GATED=out.numel() > 0,
            BIASES=len(biases),
            **sizes,
        )
    return y, mean, rstd


def _launch_norm_backward(
    grads: tuple[Tensor, Tensor],
    x: Tensor,
    h: Tensor,
    biases: list[Tensor],
    statistics: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    bounds: Tensor,
    streams: int,
    results: tuple[Tensor, Tensor, Tensor],
    sums: Tensor,
) -> None:
    """Fill dx, dh, y and the sums of chunks, those that have elements, from dout, if it has any, and dy."""
    (dout, dy), (_dx, dh, y) = (grad.contiguous() for grad in grads), results
    sizes = _row_sizes(x.shape[1], 16)
    flags = {"DOUT": dout.numel() > 0, "GATED": dh.numel() > 0, "TABLES": sums.numel() > 0, "AGAIN": y.numel() > 0}
    # Rows to come are copied to shared memory meanwhile, as far as they fit.
    reads = 2 + flags["DOUT"] + (flags["GATED"] and flags["TABLES"])
    stages = 1 + PIPELINE_BYTES // (reads * sizes["TILE"] * sizes["TILES"] * sizes["R"] * x.itemsize)
    tensors = dout, dy, x, h, *_two(biases, x), *statistics, *tables, bounds, *results, sums
    with on_device(x.device):
        kernels.norm_backward_kernel[(len(bounds),)](
            *tensors,
            *(table.stride(0) for table in tables),
            len(bounds),
            len(tables[0]) // streams,
            BIASES=len(biases),
            STAGES=min(3, stages),
            **flags,
            **sizes,
        )


def _empty_sums(x: Tensor, quantities: int, bounds: Tensor, wanted: bool) -> Tensor:
    """Memory for the sums of each chunk, [Q, K, D] fp32."""
    return x.new_empty((quantities, len(bounds), x.shape[1]) if wanted else 0, dtype=torch.float32)


def _add_sums(sums: Tensor, starts: Tensor, streams: int, tables: list[Tensor], biases: Tensor) -> None:
    """Fill gradients of tables and, if there are any, biases from the sums of chunks."""
    if not sums.numel():
        return
    _quantities, chunks, width = sums.shape
    segments = len(starts) - 1
    grid = len(tables) * segments + (streams if biases.numel() else 0), triton.cdiv(width, SUM_COLUMNS)
    targets = [*tables, *tables, *tables][:3]
    with on_device(sums.device):
        kernels.sum_chunks_kernel[grid](
            sums,
            starts,
            *targets,
            biases,
            chunks,
            segments,
            segments // streams,
            D=width,
            TABLES=len(tables),
            R=SUM_ROWS,
            TILE=SUM_COLUMNS,
            num_warps=8,
        )


@torch.library.custom_op("dstrain::norm_modulate_forward", mutates_args=())
def norm_modulate_forward(
    x: Tensor, shift: Tensor, scale: Tensor, of_row: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [S, D], and mean and 1 / standard deviation of each row [S] fp32."""
    return _launch_norm(x, x, [], (scale, shift, scale), of_row, 1, eps, x.new_empty(0))


@norm_modulate_forward.register_fake
def _(x: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_empty_statistics(x)


@torch.library.custom_op("dstrain::norm_modulate_backward", mutates_args=())
def norm_modulate_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor,
    scale: Tensor,
    of_row: Tensor,
    bounds: Tensor,
    starts: Tensor,
    residual_grad: Tensor,
    again: bool,
    tables: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dshift, dscale, and y once more if `again`; residual_grad is added to dx unless it has no elements."""
    dx, y, none = torch.empty_like(x), _empty(x, again), x.new_empty(0)
    dshift, dscale = _empty(shift, tables), _empty(scale, tables)
    sums = _empty_sums(x, 2, bounds, tables)
    grads, statistics, results = (residual_grad, dy), (mean, rstd), (dx, none, y)
    _launch_norm_backward(grads, x, x, [], statistics, (scale, shift, scale), bounds, 1, results, sums)
    _add_sums(sums, starts, 1, [dshift, dscale], none)
    return dx, dshift, dscale, y


@norm_modulate_backward.register_fake
def _(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _mean, _rstd, shift, scale, _of_row, _bounds, _starts, _residual_grad, again, tables = _with_default(others, 10)
    return torch.empty_like(x), _empty(shift, tables), _empty(scale, tables), _empty(x, again)


@torch.library.custom_op("dstrain::gated_norm_modulate_forward", mutates_args=())
def gated_norm_modulate_forward(
    x: Tensor,
    h: Tensor,
    biases: list[Tensor],
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    of_row: Tensor,
    streams: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out and y [S, D], and mean and 1 / standard deviation of each row of out [S] fp32."""
    out = torch.empty_like(x)
    return out, *_launch_norm(x, h, biases, (gate, shift, scale), of_row, streams, eps, out)


@gated_norm_modulate_forward.register_fake
def _(x: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), *_empty_statistics(x)


@torch.library.custom_op("dstrain::gated_norm_modulate_backward", mutates_args=())
def gated_norm_modulate_backward(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    h: Tensor,
    biases: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    of_row: Tensor,
    bounds: Tensor,
    starts: Tensor,
    streams: int,
    again: bool,
    tables: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dh, dbiases [streams, D], dgate, dshift, dscale, and y once more if `again`.

    dout may have no elements. h is read for the gradients of tables and biases only.
    """
    dx, dh, y = torch.empty_like(out), torch.empty_like(out), _empty(out, again)
    dgate, dshift, dscale = (_empty(table, tables) for table in (gate, shift, scale))
    dbiases = _empty_biases(out, biases, tables)
    sums = _empty_sums(out, 4 if biases else 3, bounds, tables)
    statistics, results = (mean, rstd), (dx, dh, y)
    _launch_norm_backward((dout, dy), out, h, biases, statistics, (gate, shift, scale), bounds, streams, results, sums)
    _add_sums(sums, starts, streams, [dshift, dscale, dgate], dbiases)
    return dx, dh, dbiases, dgate, dshift, dscale, y


@gated_norm_modulate_backward.register_fake
def _(
    dout: Tensor, dy: Tensor, out: Tensor, h: Tensor, biases: list[Tensor], *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _mean, _rstd, *modulation, _of_row, _bounds, _starts, _streams, again, tables = _with_default(others, 11)
    dgate, dshift, dscale = (_empty(table, tables) for table in modulation)
    dx, dh, dbiases = torch.empty_like(out), torch.empty_like(out), _empty_biases(out, biases, tables)
    return dx, dh, dbiases, dgate, dshift, dscale, _empty(out, again)


@torch.library.custom_op("dstrain::gated_residual_forward", mutates_args=())
def gated_residual_forward(
    x: Tensor, h: Tensor, biases: list[Tensor], gate: Tensor, of_row: Tensor, streams: int
) -> Tensor:
    """Return out [S, D]."""
    out = torch.empty_like(x)
    sizes = _tile_sizes(x.shape[1])
    grid = triton.cdiv(len(x), sizes["R"]), triton.cdiv(x.shape[1], sizes["TILE"])
    tensors = x, h, *_two(biases, x), gate, of_row, out
    scalars = gate.stride(0), len(x), len(gate) // streams
    with on_device(x.device):
        kernels.residual_forward_kernel[grid](*tensors, *scalars, **sizes, BIASES=len(biases))
    return out


@gated_residual_forward.register_fake
def _(x: Tensor, *_others: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dstrain::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    dout: Tensor,
    h: Tensor,
    biases: list[Tensor],
    gate: Tensor,
    of_row: Tensor,
    bounds: Tensor,
    starts: Tensor,
    streams: int,
    tables: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh, dbiases [streams, D] and dgate; dx is dout. h is read for the gradients of table and biases only."""
    dout = dout.contiguous()
    dh, dbiases, dgate = torch.empty_like(dout), _empty_biases(dout, biases, tables), _empty(gate, tables)
    sums = _empty_sums(dout, 2 if biases else 1, bounds, tables)
    sizes = _tile_sizes(dout.shape[1])
    grid = len(bounds), triton.cdiv(dout.shape[1], sizes["TILE"])
    tensors = dout, h, *_two(biases, h), gate, bounds, dh, sums
    scalars = gate.stride(0), len(bounds), len(gate) // streams
    with on_device(dout.device):
        kernels.residual_backward_kernel[grid](*tensors, *scalars, **sizes, BIASES=len(biases), TABLES=tables)
    _add_sums(sums, starts, streams, [dgate], dbiases)
    return dh, dbiases, dgate


@gated_residual_backward.register_fake
def _(dout: Tensor, h: Tensor, biases: list[Tensor], gate: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_others, tables = _with_default(others, 5)
    return torch.empty_like(h), _empty_biases(h, biases, tables), _empty(gate, tables)


def _with_default(others: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    # A dispatcher leaves out what is equal to its default: tables=True.
    return others if len(others) == count else (*others, True)


def _empty(like: Tensor, wanted: bool) -> Tensor:
    return like.new_empty(like.shape if wanted else 0)


def _empty_biases(x: Tensor, biases: list[Tensor], wanted: bool) -> Tensor:
    return x.new_empty((len(biases), x.shape[1]) if biases and wanted else 0)


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
