"""The Triton side of dstrain.rng: the same Philox words, and the same normals to the last few bits."""

# mypy: allow-untyped-defs

from dstrain.kernels.backend import jit, tl
from dstrain.rng import TWO_PI

# A kernel sees no globals but constants of this type.
ANGLE = tl.constexpr(TWO_PI)
STEP = tl.constexpr(2.0**-23)


@jit
def words(seed, PURPOSE: tl.constexpr, draw, group):
    """`rng.words`: the four uint32 words of each counter, of int64 `draw` and `group` blocks that broadcast."""
    low, high = (draw & 0xFFFFFFFF).to(tl.uint32), (draw >> 32).to(tl.uint32)
    return tl.philox(seed, group.to(tl.uint32), low * 0 + PURPOSE, low, high)


@jit
def normal4(seed, PURPOSE: tl.constexpr, draw, group):
    """`rng.normal4`: normals [..., 4] of int64 `draw` and `group` blocks that broadcast."""
    w0, w1, w2, w3 = words(seed, PURPOSE, draw, group)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    # join adds a fastest axis of two: joined twice, [..., i, j] is lane 2 i + j.
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@jit
def _box_muller(radius_word, angle_word):
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(radius_word)))
    angle = _uniform(angle_word) * ANGLE
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * STEP
