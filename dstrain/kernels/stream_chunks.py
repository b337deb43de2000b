"""How kernels whose programs take some rows each find them among the rows of one or two streams."""

# mypy: allow-untyped-defs

from dstrain.kernels.backend import jit, tl


@jit
def stream_chunk(chunk, first, rows, size):
    """The first row and the end of a chunk of at most `size` rows, and whether it is in the second stream.

    Streams lie end to end, `first` rows of the first in front; no chunk lies in both.
    """
    before = tl.cdiv(first, size)
    second = chunk >= before
    start = tl.where(second, first + (chunk - before) * size, chunk * size)
    return start, tl.minimum(start + size, tl.where(second, rows, first)), second
