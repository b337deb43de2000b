"""Rows of a pack and the chunks that gradients are summed in."""

import pytest
import torch

from dstrain.kernels.segments import Segments


def test_chunks_cover_every_row_once_and_stay_in_their_segment():
    segments = Segments((3, 1, 70, 5), "cpu", streams=2)
    assert segments.of_row.tolist() == [0] * 3 + [1] + [2] * 70 + [3] * 5
    assert segments.rows == 79 and segments.stream_rows == (4, 75)
    for size in (1, 32, 100):
        chunks = segments.chunks(size)
        rows = [r for first, end, _ in chunks.bounds.tolist() for r in range(first, end)]
        assert rows == list(range(79))
        for first, end, segment in chunks.bounds.tolist():
            assert 0 < end - first <= size and set(segments.of_row[first:end].tolist()) == {segment}
        for segment in range(4):
            own = chunks.bounds[chunks.starts[segment] : chunks.starts[segment + 1]]
            assert set(own[:, 2].tolist()) == {segment}
    assert segments.chunks(32) is segments.chunks(32)


@pytest.mark.parametrize(("lengths", "streams"), [((), 1), ((3, 0), 1), ((3, 2, 1), 2), ((3,), 0)])
def test_what_cannot_be_laid_out_is_refused(lengths, streams):
    with pytest.raises(ValueError, match="segments"):
        Segments(lengths, torch.device("cpu"), streams)
