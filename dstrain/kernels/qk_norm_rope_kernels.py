"""The Triton side of dstrain.kernels.qk_norm_rope, which says what the kernels do and what the letters mean."""

# mypy: allow-untyped-defs

from dstrain.kernels.backend import jit, tl
from dstrain.kernels.stream_chunks import stream_chunk

SMALLEST = 2.0**-20  # the least that a weight counts
# A kernel sees no globals but constants of this type.
FLOOR = tl.constexpr(SMALLEST)


@jit
def _weight(weight_ptr, pairs, D: tl.constexpr):
    """The weight of each pair's first and second channel, [1, d / 2]."""
    return _floored(weight_ptr, 2 * pairs, D)[None, :], _floored(weight_ptr, 2 * pairs + 1, D)[None, :]


@jit
def _floored(weight_ptr, columns, D: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=1.0).to(tl.float32)
    return tl.where(tl.abs(weight) < FLOOR, tl.where(weight < 0, -FLOOR, FLOOR), weight)


@jit
def _pairs(pointers, mask, HB: tl.constexpr, DP: tl.constexpr):
    """Load a tile [HB, DP] as the first and the second channels of its pairs, fp32 [HB, DP / 2]."""
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, (HB, DP // 2, 2)))


@jit
def _store(pointers, even, odd, mask, HB: tl.constexpr, DP: tl.constexpr):
    tl.store(pointers, tl.reshape(tl.join(even, odd), (HB, DP)), mask=mask)


@jit
def _place(places_ptr, row, rows, PLACES: tl.constexpr):
    """Where a row goes, and whether that is a row at all: on a GPU nobody has looked, and memory must stay whole."""
    place = tl.load(places_ptr + row) if PLACES else row
    return place, (place >= 0) & (place < rows)


@jit
def _table(cos_ptr, sin_ptr, place, inside, pairs, D: tl.constexpr):
    offsets, mask = place * (D // 2) + pairs, pairs < tl.where(inside, D // 2, 0)
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    return cos[None, :], tl.load(sin_ptr + offsets, mask=mask, other=0.0)[None, :]


@jit
def _tile_mask(heads, columns, inside, H: tl.constexpr, D: tl.constexpr):
    return (heads < tl.where(inside, H, 0))[:, None] & (columns < D)[None, :]


@jit
def _normed_and_turned(even, odd, w_even, w_odd, cos, sin, eps, D: tl.constexpr):
    rstd = tl.rsqrt(tl.sum(even * even + odd * odd, axis=1) / D + eps)  # [HB]
    even, odd = even * rstd[:, None] * w_even, odd * rstd[:, None] * w_odd
    return rstd, even * cos - odd * sin, even * sin + odd * cos


@jit
def forward_kernel(
    q_ptr,
    k_ptr,
    q_bias0_ptr,
    q_bias1_ptr,
    k_bias0_ptr,
    k_bias1_ptr,
    q_weight0_ptr,
    q_weight1_ptr,
    k_weight0_ptr,
    k_weight1_ptr,
    cos_ptr,
    sin_ptr,
    places_ptr,
    q_out_ptr,
    k_out_ptr,
    q_rstd_ptr,
    k_rstd_ptr,
    rows,
    first,
    size,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HB: tl.constexpr,
    DP: tl.constexpr,
    BIAS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """HB heads of a chunk of rows, of q and of k: they share the table."""
    GROUPS: tl.constexpr = (H + HB - 1) // HB
    pid = tl.program_id(0)
    start, end, second = stream_chunk(pid // GROUPS, first, rows, size)
    heads, columns = pid % GROUPS * HB + tl.arange(0, HB), tl.arange(0, DP)
    pairs = tl.arange(0, DP // 2)
    mask = _tile_mask(heads, columns, True, H, D)
    tile = heads[:, None] * D + columns[None, :]
    qw_even, qw_odd = _weight(tl.where(second, q_weight1_ptr, q_weight0_ptr), pairs, D)
    kw_even, kw_odd = _weight(tl.where(second, k_weight1_ptr, k_weight0_ptr), pairs, D)
    if BIAS:
        qb_even, qb_odd = _pairs(tl.where(second, q_bias1_ptr, q_bias0_ptr) + tile, mask, HB, DP)
        kb_even, kb_odd = _pairs(tl.where(second, k_bias1_ptr, k_bias0_ptr) + tile, mask, HB, DP)
    for i in range(0, end - start):
        row = start.to(tl.int64) + i
        place, inside = _place(places_ptr, row, rows, PLACES)
        cos, sin = _table(cos_ptr, sin_ptr, place, inside, pairs, D)
        q_even, q_odd = _pairs(q_ptr + row * (H * D) + tile, mask, HB, DP)
        k_even, k_odd = _pairs(k_ptr + row * (H * D) + tile, mask, HB, DP)
        if BIAS:
            q_even, q_odd, k_even, k_odd = q_even + qb_even, q_odd + qb_odd, k_even + kb_even, k_odd + kb_odd
        q_rstd, q_even, q_odd = _normed_and_turned(q_even, q_odd, qw_even, qw_odd, cos, sin, eps, D)
        k_rstd, k_even, k_odd = _normed_and_turned(k_even, k_odd, kw_even, kw_odd, cos, sin, eps, D)
        there = _tile_mask(heads, columns, inside, H, D)
        _store(q_out_ptr + place * (H * D) + tile, q_even, q_odd, there, HB, DP)
        _store(k_out_ptr + place * (H * D) + tile, k_even, k_odd, there, HB, DP)
        # A row that goes nowhere must not pass as one with a gradient.
        tl.store(q_rstd_ptr + row * H + heads, tl.where(inside, q_rstd, float("nan")), mask=heads < H)
        tl.store(k_rstd_ptr + row * H + heads, tl.where(inside, k_rstd, float("nan")), mask=heads < H)


@jit
def backward_kernel(
    dq_out_ptr,
    dk_out_ptr,
    q_out_ptr,
    k_out_ptr,
    q_rstd_ptr,
    k_rstd_ptr,
    q_weight0_ptr,
    q_weight1_ptr,
    k_weight0_ptr,
    k_weight1_ptr,
    cos_ptr,
    sin_ptr,
    places_ptr,
    dq_ptr,
    dk_ptr,
    bias_partial_ptr,
    weight_partial_ptr,
    rows,
    first,
    size,
    chunks,
    H: tl.constexpr,
    D: tl.constexpr,
    HB: tl.constexpr,
    DP: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    PLACES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """HB heads of a chunk of rows, of q or of k: dx, and the chunk's sums for the bias and for the weight."""
    GROUPS: tl.constexpr = (H + HB - 1) // HB
    pid = tl.program_id(0)
    of_k, group, chunk = pid % 2 == 1, pid // 2 % GROUPS, pid // (2 * GROUPS)
    dout_ptr = tl.where(of_k, dk_out_ptr, dq_out_ptr)
    out_ptr = tl.where(of_k, k_out_ptr, q_out_ptr)
    rstd_ptr = tl.where(of_k, k_rstd_ptr, q_rstd_ptr)
    dx_ptr = tl.where(of_k, dk_ptr, dq_ptr)
    weight0_ptr = tl.where(of_k, k_weight0_ptr, q_weight0_ptr)
    weight1_ptr = tl.where(of_k, k_weight1_ptr, q_weight1_ptr)

    start, end, second = stream_chunk(chunk, first, rows, size)
    heads, columns = group * HB + tl.arange(0, HB), tl.arange(0, DP)
    pairs = tl.arange(0, DP // 2)
    mask = _tile_mask(heads, columns, True, H, D)
    tile = heads[:, None] * D + columns[None, :]
    w_even, w_odd = _weight(tl.where(second, weight1_ptr, weight0_ptr), pairs, D)
    noise = UNIT * UNIT * (w_even * w_even + w_odd * w_odd)
    # 1 / w, unless the partner's rounding drowns the channel.
    inverse_even, inverse_odd = w_even / (w_even * w_even + noise), w_odd / (w_odd * w_odd + noise)
    b_even, b_odd = tl.zeros((HB, DP // 2), tl.float32), tl.zeros((HB, DP // 2), tl.float32)
    s_even, s_odd = tl.zeros((HB, DP // 2), tl.float32), tl.zeros((HB, DP // 2), tl.float32)
    for i in range(0, end - start):
        row = start.to(tl.int64) + i
        place, inside = _place(places_ptr, row, rows, PLACES)
        cos, sin = _table(cos_ptr, sin_ptr, place, inside, pairs, D)
        there = _tile_mask(heads, columns, inside, H, D)
        g0, g1 = _pairs(dout_ptr + place * (H * D) + tile, there, HB, DP)
        y0, y1 = _pairs(out_ptr + place * (H * D) + tile, there, HB, DP)
        rstd = tl.load(rstd_ptr + row * H + heads, mask=heads < H, other=0.0)[:, None]
        g_even, g_odd = g0 * cos + g1 * sin, g1 * cos - g0 * sin
        y_even, y_odd = y0 * cos + y1 * sin, y1 * cos - y0 * sin
        if WEIGHT:
            s_even += g_even * y_even
            s_odd += g_odd * y_odd
        # mean(w g xhat): turning keeps the product of two vectors, so the outputs give it as they are.
        mean = (tl.sum(g0 * y0 + g1 * y1, axis=1) / D)[:, None]
        dx_even = rstd * (g_even * w_even - y_even * inverse_even * mean)
        dx_odd = rstd * (g_odd * w_odd - y_odd * inverse_odd * mean)
        if BIAS:
            b_even += dx_even
            b_odd += dx_odd
        _store(dx_ptr + row * (H * D) + tile, dx_even, dx_odd, mask, HB, DP)
    part = tl.where(of_k, chunks + chunk, chunk).to(tl.int64)
    if BIAS:
        _store(bias_partial_ptr + part * (H * D) + tile, b_even, b_odd, mask, HB, DP)
    if WEIGHT:
        s_even = tl.sum(s_even * inverse_even, axis=0)
        s_odd = tl.sum(s_odd * inverse_odd, axis=0)
        total = tl.reshape(tl.join(s_even, s_odd), (DP,))
        tl.store(weight_partial_ptr + (part * GROUPS + group) * D + columns, total, mask=columns < D)


@jit
def sum_kernel(
    bias_partial_ptr,
    weight_partial_ptr,
    dq_bias_ptr,
    dk_bias_ptr,
    dq_weight_ptr,
    dk_weight_ptr,
    before,
    chunks,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Sum the chunks' sums of one stream, of q or k, in B columns of the bias or of the weight."""
    BIAS_TILES: tl.constexpr = (WIDTH + B - 1) // B * BIAS
    TILES: tl.constexpr = BIAS_TILES + (D + B - 1) // B * WEIGHT
    pid = tl.program_id(0)
    tile, of_k, stream = pid % TILES, pid // TILES % 2 == 1, pid // (2 * TILES)
    of_weight = tile >= BIAS_TILES
    columns = tl.where(of_weight, tile - BIAS_TILES, tile) * B + tl.arange(0, B)
    # A chunk has `each` rows of sums, of this width.
    width, each = tl.where(of_weight, D, WIDTH), tl.where(of_weight, GROUPS, 1)
    partial_ptr = tl.where(of_weight, weight_partial_ptr, bias_partial_ptr)
    first = tl.where(of_k, chunks, 0)
    start, end = first + tl.where(stream == 0, 0, before), first + tl.where(stream == 0, before, chunks)
    total = tl.zeros((R, B), tl.float32)
    for i in range(start * each, end * each, R):
        row = i + tl.arange(0, R)
        mask = (row < end * each)[:, None] & (columns < width)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
    total = tl.sum(total, axis=0)
    offsets, mask = stream * width + columns, columns < width
    if of_weight:
        tl.store(tl.where(of_k, dk_weight_ptr, dq_weight_ptr) + offsets, total, mask=mask)
    else:
        tl.store(tl.where(of_k, dk_bias_ptr, dq_bias_ptr) + offsets, total, mask=mask)
