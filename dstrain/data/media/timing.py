"""When the frames of a video are shown, and which of them make a clip: integer arithmetic, the same everywhere."""

from bisect import bisect_left
from collections.abc import Iterable
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np

from dstrain.data.reasons import BadSample, Reason


def clip_frames(frames: np.ndarray | int, fps: np.ndarray | float, frames_wanted: int, fps_wanted: float) -> np.ndarray:
    """Return how many frames, int64 [...], a clip has that is cut from videos of `frames` frames at `fps` a second.

    At most `frames_wanted`, which is 4 k + 1 as the result is; 0 where there are none. fps_wanted: 0 as stored.
    Rates count in 1/1000 Hz, so that the planner and the decoder agree.
    """
    assert frames_wanted % 4 == 1
    available = available_frames(frames, fps, fps_wanted)
    return np.where(available > 0, np.minimum(frames_wanted, (available - 1) // 4 * 4 + 1), 0)


def available_frames(frames: np.ndarray | int, fps: np.ndarray | float, fps_wanted: float) -> np.ndarray:
    """Return the number of frames, int64 [...], after resampling: those nearer to a stored one than half its period."""
    frames = np.asarray(frames, np.int64)
    stored, wanted = np.rint(np.asarray(fps, np.float64) * 1000).astype(np.int64), round(fps_wanted * 1000)
    resampled = (2 * frames - 1) * wanted // (2 * np.maximum(stored, 1)) + 1
    return np.where((frames > 1) & (stored > 0) & (wanted > 0), resampled, frames)


class Timing:
    """When the frames of a video are shown: `times` in order, in units of `base` seconds.

    fps: their mean rate in 1/s, in steps of 1/1000; 0 for a single frame.
    Raises BadSample if there are none, or two at one time.
    """

    def __init__(self, times: Iterable[int], base: Fraction) -> None:
        self.times = sorted(times)
        self.base = base
        if not self.times:
            raise BadSample(Reason.VIDEO_DAMAGED, "there are no frames")
        if any(a == b for a, b in pairwise(self.times)):
            raise BadSample(Reason.VIDEO_DAMAGED, "two frames are shown at one time")
        seconds = (self.times[-1] - self.times[0]) * base
        self.fps = round(float((len(self.times) - 1) / seconds), 3) if seconds else 0.0

    @cached_property
    def _middles(self) -> list[int]:
        return [a + b - 2 * self.times[0] for a, b in pairwise(self.times)]  # twice the time between neighbours

    def nearest(self, numbers: range, fps: float) -> list[int]:
        """Return the times of the frames shown nearest to the given ones of the resampled video."""
        wanted = round(fps * 1000)
        if not wanted or not self.fps:
            return [self.times[number] for number in numbers]
        period = Fraction(1000, wanted) / self.base
        return [self.times[bisect_left(self._middles, 2 * number * period)] for number in numbers]
