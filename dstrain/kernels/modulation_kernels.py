"""The Triton side of dstrain.kernels.modulation.

A program of the norms holds whole rows in registers: R rows of D columns as TILES pieces of [R, TILE], since a block of
Triton's must be a power of two wide and 3072 or 5120 are not. Nothing is read twice. Table gradients are made in two
launches: each chunk of rows writes its fp32 sums [D], one a quantity, and `sum_chunks_kernel` adds those up. A chunk
lies in one segment, so its rows share their tables, and no sum depends on timing.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# ruff: noqa: RUF005, SIM108 - Triton does not know the shorter forms

from dstrain.kernels.backend import jit, tl


@jit
def _load(ptr, starts, known, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr):
    """Rows [R] that begin at `starts`, in fp32, 0 outside: TILES times [R, TILE]. WHOLE: no element is outside."""
    tiles = ()
    for t in tl.static_range(TILES):
        columns = t * TILE + tl.arange(0, TILE)
        at = ptr + (starts[:, None] + columns[None, :])
        if WHOLE:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=known[:, None] & (columns < D)[None, :], other=0.0)
        tiles = tiles + (tile.to(tl.float32),)
    return tiles


@jit
def _store(ptr, starts, known, tiles, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr):
    for t in tl.static_range(TILES):
        columns = t * TILE + tl.arange(0, TILE)
        at = ptr + (starts[:, None] + columns[None, :])
        tile = tiles[t].to(ptr.dtype.element_ty)
        if WHOLE:
            tl.store(at, tile)
        else:
            tl.store(at, tile, mask=known[:, None] & (columns < D)[None, :])


@jit
def _tile_bias(bias0_ptr, bias1_ptr, second, columns, inside, BIASES: tl.constexpr):
    """The bias of each row's stream in these columns, [R, TILE] in fp32."""
    at = tl.zeros_like(second).to(tl.int32)[:, None] + columns[None, :]
    if BIASES == 1:
        return tl.load(bias0_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # Each row reads one of the two: a pointer chosen by the row would hide from the compiler how it is aligned.
    of_first = tl.load(bias0_ptr + at, mask=inside & ~second[:, None], other=0.0)
    return of_first.to(tl.float32) + tl.load(bias1_ptr + at, mask=inside & second[:, None], other=0.0).to(tl.float32)


@jit
def _load_bias(
    bias0_ptr, bias1_ptr, second, known, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BIASES: tl.constexpr
):
    """The bias of each row's stream, TILES times [R, TILE] in fp32; rows of the second stream are `second` [R]."""
    tiles = ()
    for t in tl.static_range(TILES):
        columns = t * TILE + tl.arange(0, TILE)
        inside = known[:, None] & (columns < D)[None, :]
        tiles = tiles + (_tile_bias(bias0_ptr, bias1_ptr, second, columns, inside, BIASES),)
    return tiles


@jit
def _zeros(R: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (tl.zeros([R, TILE], tl.float32),)
    return tiles


@jit
def _plus_product(sums, a, b, TILES: tl.constexpr):
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + (sums[t] + a[t] * b[t],)
    return tiles


@jit
def _plus(a, b, TILES: tl.constexpr):
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + (a[t] + b[t],)
    return tiles


@jit
def _times(a, b, TILES: tl.constexpr):
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + (a[t] * b[t],)
    return tiles


@jit
def _rounded(tiles, ptr, TILES: tl.constexpr):
    """What of `tiles` will be read again once they are stored at `ptr`."""
    out = ()
    for t in tl.static_range(TILES):
        out = out + (tiles[t].to(ptr.dtype.element_ty).to(tl.float32),)
    return out


@jit
def _mean(tiles, D: tl.constexpr, TILES: tl.constexpr):
    """Mean over the columns, [R, 1]."""
    total = tiles[0]
    for t in tl.static_range(1, TILES):
        total = total + tiles[t]
    return (tl.sum(total, axis=1) / D)[:, None]


@jit
def _statistics(x, eps, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Mean and 1 / standard deviation of each row, [R, 1]; x is in registers, so the mean is taken off first."""
    mean = _mean(x, D, TILES)
    squares = ()
    for t in tl.static_range(TILES):
        away = x[t] - mean
        if D % TILE != 0:
            away = tl.where((t * TILE + tl.arange(0, TILE) < D)[None, :], away, 0.0)
        squares = squares + (away * away,)
    return mean, 1.0 / tl.sqrt_rn(_mean(squares, D, TILES) + eps)


@jit
def _normed(x, mean, rstd, TILES: tl.constexpr):
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + ((x[t] - mean) * rstd,)
    return tiles


@jit
def _modulated(normed, shift, scale, TILES: tl.constexpr):
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + (normed[t] * (1.0 + scale[t]) + shift[t],)
    return tiles


@jit
def _norm_grad(dy, normed, scale, rstd, D: tl.constexpr, TILES: tl.constexpr):
    """Gradient of the normed and modulated rows with respect to the rows."""
    wanted = ()  # the gradient of `normed`; 0 outside the row because dy is
    for t in tl.static_range(TILES):
        wanted = wanted + (dy[t] * (1.0 + scale[t]),)
    along_one = _mean(wanted, D, TILES)
    along_normed = _mean(_times(wanted, normed, TILES), D, TILES)
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + ((wanted[t] - along_one - normed[t] * along_normed) * rstd,)
    return tiles


@jit
def norm_forward_kernel(
    x_ptr,
    h_ptr,
    bias0_ptr,
    bias1_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    of_row_ptr,
    out_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    gate_stride,
    shift_stride,
    scale_stride,
    rows,
    each,
    eps,
    D: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    R: tl.constexpr,
    GATED: tl.constexpr,
    BIASES: tl.constexpr,
):
    """y = LN(x) (1 + scale) + shift, of R rows. GATED: x is first replaced by out = x + gate (h + bias), rounded."""
    WHOLE: tl.constexpr = R == 1 and D % TILE == 0
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    known = row < rows
    m = tl.load(of_row_ptr + row, mask=known, other=0)
    segment = m.to(tl.int64)

    x = _load(x_ptr, row * D, known, D, TILE, TILES, WHOLE)
    if GATED:
        h = _load(h_ptr, row * D, known, D, TILE, TILES, WHOLE)
        if BIASES:
            h = _plus(h, _load_bias(bias0_ptr, bias1_ptr, m >= each, known, D, TILE, TILES, BIASES), TILES)
        gate = _load(gate_ptr, segment * gate_stride, known, D, TILE, TILES, WHOLE)
        # Statistics are those of what is kept: the backward sees nothing else.
        x = _rounded(_plus_product(x, gate, h, TILES), out_ptr, TILES)
        _store(out_ptr, row * D, known, x, D, TILE, TILES, WHOLE)

    mean, rstd = _statistics(x, eps, D, TILE, TILES)
    tl.store(mean_ptr + row[:, None], mean, mask=known[:, None])
    tl.store(rstd_ptr + row[:, None], rstd, mask=known[:, None])
    shift = _load(shift_ptr, segment * shift_stride, known, D, TILE, TILES, WHOLE)
    scale = _load(scale_ptr, segment * scale_stride, known, D, TILE, TILES, WHOLE)
    y = _modulated(_normed(x, mean, rstd, TILES), shift, scale, TILES)
    _store(y_ptr, row * D, known, y, D, TILE, TILES, WHOLE)


@jit
def _store_sums(ptr, quantity, chunks, chunk, sums, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Write sums over a chunk's rows to [quantity, chunk] of the partial sums, fp32 [Q, K, D]."""
    start = (chunk + quantity * chunks).to(tl.int64) * D
    for t in tl.static_range(TILES):
        columns = t * TILE + tl.arange(0, TILE)
        tl.store(ptr + start + columns, tl.sum(sums[t], axis=0), mask=columns < D)


@jit
def norm_backward_kernel(
    dout_ptr,
    dy_ptr,
    x_ptr,
    h_ptr,
    bias0_ptr,
    bias1_ptr,
    mean_ptr,
    rstd_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    bounds_ptr,
    dx_ptr,
    dh_ptr,
    y_ptr,
    sums_ptr,
    gate_stride,
    shift_stride,
    scale_stride,
    chunks,
    each,
    D: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    R: tl.constexpr,
    DOUT: tl.constexpr,
    GATED: tl.constexpr,
    BIASES: tl.constexpr,
    TABLES: tl.constexpr,
    AGAIN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk of `norm_forward_kernel` backwards; x is what was normed. DOUT: dx takes in dout. AGAIN: y is remade.

    TABLES: sums over the chunk's rows, of shift, scale and, if GATED, gate and bias, in this order.
    """
    WHOLE: tl.constexpr = R == 1 and D % TILE == 0
    chunk = tl.program_id(0)
    first = tl.load(bounds_ptr + chunk * 3)
    last = tl.load(bounds_ptr + chunk * 3 + 1)
    m = tl.load(bounds_ptr + chunk * 3 + 2) + tl.zeros([1], tl.int32)
    segment = m.to(tl.int64)
    scale = _load(scale_ptr, segment * scale_stride, m >= 0, D, TILE, TILES, D % TILE == 0)
    if AGAIN:
        shift = _load(shift_ptr, segment * shift_stride, m >= 0, D, TILE, TILES, D % TILE == 0)
    if GATED:
        gate = _load(gate_ptr, segment * gate_stride, m >= 0, D, TILE, TILES, D % TILE == 0)
        if TABLES:
            dgate = _zeros(R, TILE, TILES)
            if BIASES:
                bias = _load_bias(bias0_ptr, bias1_ptr, m >= each, m >= 0, D, TILE, TILES, BIASES)
                dbias = _zeros(R, TILE, TILES)
    if TABLES:
        dshift = _zeros(R, TILE, TILES)
        dscale = _zeros(R, TILE, TILES)

    for start in tl.range(first, last, R, num_stages=STAGES):
        row = (start + tl.arange(0, R)).to(tl.int64)
        known = row < last
        dy = _load(dy_ptr, row * D, known, D, TILE, TILES, WHOLE)
        x = _load(x_ptr, row * D, known, D, TILE, TILES, WHOLE)
        mean = tl.load(mean_ptr + row, mask=known, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=known, other=0.0)[:, None]
        normed = _normed(x, mean, rstd, TILES)
        if AGAIN:
            _store(y_ptr, row * D, known, _modulated(normed, shift, scale, TILES), D, TILE, TILES, WHOLE)

        dx = _norm_grad(dy, normed, scale, rstd, D, TILES)
        if DOUT:
            dx = _plus(dx, _load(dout_ptr, row * D, known, D, TILE, TILES, WHOLE), TILES)
        _store(dx_ptr, row * D, known, dx, D, TILE, TILES, WHOLE)
        if GATED:
            _store(dh_ptr, row * D, known, _times(dx, gate, TILES), D, TILE, TILES, WHOLE)
        if TABLES:
            dshift = _plus(dshift, dy, TILES)
            dscale = _plus_product(dscale, dy, normed, TILES)
            if GATED:
                h = _load(h_ptr, row * D, known, D, TILE, TILES, WHOLE)
                if BIASES:
                    h = _plus(h, bias, TILES)
                    dbias = _plus(dbias, dx, TILES)
                dgate = _plus_product(dgate, dx, h, TILES)

    if TABLES:
        _store_sums(sums_ptr, 0, chunks, chunk, dshift, D, TILE, TILES)
        _store_sums(sums_ptr, 1, chunks, chunk, dscale, D, TILE, TILES)
        if GATED:
            _store_sums(sums_ptr, 2, chunks, chunk, dgate, D, TILE, TILES)
            if BIASES:
                _store_sums(sums_ptr, 3, chunks, chunk, _times(dbias, gate, TILES), D, TILE, TILES)


@jit
def residual_forward_kernel(
    x_ptr,
    h_ptr,
    bias0_ptr,
    bias1_ptr,
    gate_ptr,
    of_row_ptr,
    out_ptr,
    gate_stride,
    rows,
    each,
    D: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    BIASES: tl.constexpr,
):
    """out = x + gate (h + bias), of R rows and TILE columns."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None]
    if D % TILE != 0:
        inside = inside & (columns < D)[None, :]
    m = tl.load(of_row_ptr + row, mask=row < rows, other=0)
    at = row[:, None] * D + columns[None, :]
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BIASES:
        h += _tile_bias(bias0_ptr, bias1_ptr, m >= each, columns, inside, BIASES)
    gate = tl.load(gate_ptr + (m.to(tl.int64) * gate_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x + gate.to(tl.float32) * h).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def residual_backward_kernel(
    dout_ptr,
    h_ptr,
    bias0_ptr,
    bias1_ptr,
    gate_ptr,
    bounds_ptr,
    dh_ptr,
    sums_ptr,
    gate_stride,
    chunks,
    each,
    D: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    BIASES: tl.constexpr,
    TABLES: tl.constexpr,
):
    """TILE columns of one chunk. TABLES: sums over the chunk's rows, of gate and, if there are any, biases."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    first = tl.load(bounds_ptr + chunk * 3)
    last = tl.load(bounds_ptr + chunk * 3 + 1)
    m = tl.load(bounds_ptr + chunk * 3 + 2)
    known_columns = (columns < D)[None, :]
    gate = tl.load(gate_ptr + m.to(tl.int64) * gate_stride + columns[None, :], mask=known_columns, other=0.0)
    gate = gate.to(tl.float32)
    if TABLES:
        dgate = tl.zeros([R, TILE], tl.float32)
        if BIASES:
            dbias = tl.zeros([R, TILE], tl.float32)
            bias = _tile_bias(bias0_ptr, bias1_ptr, tl.zeros([1], tl.int32) + m >= each, columns, known_columns, BIASES)

    for start in range(first, last, R):
        row = (start + tl.arange(0, R)).to(tl.int64)
        inside = (row < last)[:, None]
        if D % TILE != 0:
            inside = inside & known_columns
        at = row[:, None] * D + columns[None, :]
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dh_ptr + at, (dout * gate).to(dh_ptr.dtype.element_ty), mask=inside)
        if TABLES:
            h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if BIASES:
                h += bias
                dbias += dout
            dgate += dout * h

    if TABLES:
        at = chunk.to(tl.int64) * D + columns
        tl.store(sums_ptr + at, tl.sum(dgate, axis=0), mask=columns < D)
        if BIASES:
            at = (chunk + chunks).to(tl.int64) * D + columns
            tl.store(sums_ptr + at, tl.sum(dbias * gate, axis=0), mask=columns < D)


@jit
def sum_chunks_kernel(
    sums_ptr,
    starts_ptr,
    table0_ptr,
    table1_ptr,
    table2_ptr,
    bias_ptr,
    chunks,
    segments,
    each,
    D: tl.constexpr,
    TABLES: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add up partial sums [Q, K, D]: of each segment for the first TABLES quantities, of each stream for the biases."""
    item = tl.program_id(0)
    quantity = tl.minimum(item // segments, TABLES)
    place = item - quantity * segments
    run = tl.where(quantity < TABLES, 1, each)
    first = tl.load(starts_ptr + place * run)
    last = tl.load(starts_ptr + (place + 1) * run)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums_ptr += (quantity * chunks).to(tl.int64) * D

    total = tl.zeros([R, TILE], tl.float32)
    for start in range(first, last, R):
        chunk = start + tl.arange(0, R)
        inside = (chunk < last)[:, None] & (columns < D)[None, :]
        total += tl.load(sums_ptr + chunk.to(tl.int64)[:, None] * D + columns[None, :], mask=inside, other=0.0)

    result = tl.sum(total, axis=0)
    at = place.to(tl.int64) * D + columns
    if quantity == TABLES:
        tl.store(bias_ptr + at, result.to(bias_ptr.dtype.element_ty), mask=columns < D)
    elif quantity == 0:
        tl.store(table0_ptr + at, result.to(table0_ptr.dtype.element_ty), mask=columns < D)
    elif quantity == 1:
        tl.store(table1_ptr + at, result.to(table1_ptr.dtype.element_ty), mask=columns < D)
    else:
        tl.store(table2_ptr + at, result.to(table2_ptr.dtype.element_ty), mask=columns < D)
