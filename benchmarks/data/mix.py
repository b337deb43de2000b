"""The mix of shapes and captions that the data benchmarks use, where no real one is at hand; all of it documented here.

Aspect ratios have the modes of photographs and screens, with some spread around each. Sizes are log-uniform. Captions
are log-normal in tokens, as machine-written ones are: a median of 60, a tenth over 190, cut at 1,024.
"""

import numpy as np

MODES = {(1, 1): 0.25, (3, 2): 0.2, (2, 3): 0.15, (4, 3): 0.12, (3, 4): 0.1, (16, 9): 0.1, (9, 16): 0.05, (21, 9): 0.03}
_SPREAD = 0.06  # standard deviation of log(ratio) around a mode
_CAPTION_MEDIAN, _CAPTION_SIGMA, CAPTION_MOST = 60, 0.9, 1024


def ratios(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return n ratios of width to height."""
    modes = np.array([width / height for width, height in MODES])
    return rng.choice(modes, n, p=list(MODES.values())) * np.exp(rng.normal(0, _SPREAD, n))


def sizes(rng: np.random.Generator, n: int, least: float, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Return widths and heights in pixels, int64 [n], of areas between `least` and `most`."""
    ratio = ratios(rng, n)
    area = np.exp(rng.uniform(np.log(least), np.log(most), n))
    return np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)


def caption_tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return the lengths of n captions in tokens, int64 [n]."""
    lengths = rng.lognormal(np.log(_CAPTION_MEDIAN), _CAPTION_SIGMA, n)
    return np.clip(np.rint(lengths), 4, CAPTION_MOST).astype(np.int64)


def caption(rng: np.random.Generator, words: list[str]) -> str:
    """Return 20 to 200 words."""
    return " ".join(words[i] for i in rng.integers(len(words), size=rng.integers(20, 201)))
