"""Target sizes: never enlarged in silence, multiples of 16, and exact in integers."""

from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.media.resolution import Resolution, colour
from dstrain.errors import ConfigError

SIDE = st.integers(1, 1 << 15)


def size(width: int, height: int, /, **options: object) -> tuple[int, int]:
    widths, heights = Resolution(**options).sizes(np.array([width]), np.array([height]))  # type: ignore[arg-type]
    return int(widths[0]), int(heights[0])


@given(SIDE, SIDE, st.integers(256, 1 << 24))
@settings(max_examples=300, deadline=None)
def test_the_aspect_is_kept_and_nothing_grows(width: int, height: int, max_pixels: int) -> None:
    w, h = size(width, height, max_pixels=max_pixels)
    assert w % 16 == h % 16 == 0 and w <= width and h <= height and w * h <= max_pixels
    if width * height <= max_pixels:
        exact = (width, height)
    else:  # the largest whole numbers whose squares do not pass w * max / h and h * max / w
        exact = isqrt(width * max_pixels // height), isqrt(height * max_pixels // width)
    expected = exact[0] // 16 * 16, exact[1] // 16 * 16
    assert (w, h) == (expected if all(expected) and width * height >= 256 else (0, 0))


@given(SIDE, SIDE, st.integers(256, 1 << 22))
@settings(max_examples=200, deadline=None)
def test_too_small_is_left_out_or_enlarged_on_request(width: int, height: int, min_pixels: int) -> None:
    options = {"max_pixels": 1 << 22, "min_pixels": min_pixels}
    small = width * height < min_pixels
    assert (size(width, height, **options) == (0, 0)) or not small
    w, h = size(width, height, upscale=True, **options)
    if small and w:
        assert w * h <= min_pixels and abs(w / h / (width / height) - 1) < 16 / min(w, h) + 16 / max(w, h)
        assert w + 16 >= width and h + 16 >= height


def test_an_exact_size() -> None:
    options = {"width": 64, "height": 32}
    assert size(64, 32, **options) == size(900, 700, **options) == (64, 32)
    assert size(63, 900, **options) == size(900, 31, **options) == (0, 0)
    assert size(1, 1, upscale=True, **options) == (64, 32)
    assert size(0, 5, upscale=True, **options) == (0, 0)


@given(
    st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=5), st.integers(256, 1 << 22), st.integers(256, 1 << 14),
    st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_proof_from_totals_is_never_wrong(
    pictures: list[tuple[int, int]], max_pixels: int, min_pixels: int, exact: bool, upscale: bool
) -> None:
    options = {"width": 64, "height": 48} if exact else {}
    resolution = Resolution(max_pixels, min(min_pixels, max_pixels), upscale=upscale, **options)
    w, h = np.array(pictures).T
    widths, heights = resolution.sizes(w, h)
    areas = w * h
    if resolution.takes_all(int(np.minimum(w, h).min()), int(areas.min()), int(areas.max())):
        assert (widths > 0).all()
    assert (widths * heights).max() <= resolution.most_pixels(int(areas.max()))


def test_the_proof_holds_for_ordinary_pictures() -> None:
    assert Resolution().takes_all(256, 1 << 16, 1 << 24)
    assert not Resolution(min_pixels=1 << 17).takes_all(256, 1 << 16, 1 << 24)
    assert not Resolution().takes_all(20, 20 * 4000, 1 << 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 255}, "max_pixels = 255 is less than one token"),
        ({"max_pixels": 512, "min_pixels": 1024}, "min_pixels = 1024 is more than max_pixels = 512"),
        ({"width": 64}, "width = 64 and height = 0: give both"),
        ({"width": 64, "height": 40}, "multiples of 16"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Resolution(**options)  # type: ignore[arg-type]


def test_colours() -> None:
    assert colour("white") == (255, 255, 255) and colour("#0a10fF") == (10, 16, 255) and colour("Grey") == (128,) * 3
    for text in ("#fff", "reddish", "", "#1234567"):
        with pytest.raises(ConfigError, match="is not a colour"):
            colour(text)
