"""What is decided about a step from its figures alone: a spike of the loss, data to leave out, numbers not finite.

Plain arithmetic on figures that are the same on all ranks, so all ranks decide alike; each guard's state goes into the
checkpoint, so that a resumed run decides as the undisturbed one would.
"""

from dataclasses import dataclass
from math import exp, isfinite, log, sqrt
from typing import Any

import numpy as np

from dstrain.config import GuardConfig
from dstrain.errors import CheckpointError

SILENT = 50  # steps that are only looked at
NEW_LEVEL = 20  # spikes in a row: then it is no spike, and what was usual before is forgotten
SMALLEST = log(3)  # less than three times the usual is no spike, however regular the loss was
_BINS = 4
# From the median absolute difference to a standard deviation; a range's mean has a heavier tail than the whole step's.
_SCALES = 1.4826 / sqrt(2) * np.array([1.2] * _BINS + [0.9])
_KNOWN = 20  # values of a bin, before which nothing is said about it
_WHOLE = _BINS  # the column of the whole step, after those of the ranges
_FLOORS = np.array([0.01] * _BINS + [0.5])  # of the scales: a loss without noise must not make them 0


@dataclass(frozen=True)
class Spike:
    """A step whose loss was far above what is usual at its noise levels.

    bin: the range of sigma, or None if it is the whole step. value: the mean loss. median: what was usual.
    deviations: how far above, in robust standard deviations of its logarithm, see `Spikes`.
    """

    bin: int | None
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        where = "" if self.bin is None else f" for sigma in [{self.bin / _BINS:g}, {(self.bin + 1) / _BINS:g})"
        return f"the loss{where} is {self.value:.4g}, usual is {self.median:.4g} ({self.deviations:.0f} deviations)"


class Spikes:
    """Finds spikes of the loss by range of sigma, and of the whole step.

    The logarithm of a range's mean loss is compared with its median over the last `window` // 4 steps. How far it
    strays, times the root of the number of samples behind the mean, is measured in robust standard deviations: from the
    median difference of one step to the next over the last `window` steps, which a drift or a steep start does not
    widen. The whole step strays by the mean over the ranges, the steadier ones counting more. Medians do not see a few
    strange values; and a spike is not added to them.

    What it can tell, at 5 deviations, where single losses scatter by a factor e^0.7 (one standard deviation): ten times
    the loss of a whole step from 16 samples on, and of one range from about 16 samples in it. One sample's never: that
    happens by itself.

    Args:
        deviations: how many robust standard deviations make a spike.
        window: steps that are remembered.
    """

    def __init__(self, deviations: float, window: int = 200) -> None:
        assert window >= 4 * _KNOWN
        self._deviations, self._window = deviations, window
        self._forget()

    def _forget(self) -> None:
        self._levels = np.full((self._window // 4, _BINS), np.nan)  # log of the mean loss, newest last
        self._strays = np.full((self._window, _BINS + 1), np.nan)  # of the ranges, and of the whole step
        self._steps = self._in_a_row = 0

    def judge(self, bins: Any) -> Spike | None:
        """Look at a step's sums of losses and counts of samples by sigma, [2, 4] (tracking.metrics.sigma_bins).

        One that is not finite is passed over. Takes about 0.15 ms.
        """
        sums, counts = np.asarray(bins, dtype=np.float64)
        if not (np.isfinite(sums).all() and counts.any()):
            return None
        means = np.divide(sums, counts, out=np.zeros(_BINS), where=counts > 0)
        # Rounded: what is stored is short, and sums in another order are the same.
        levels = np.log(means, out=np.full(_BINS, np.nan), where=means > 0).round(4)
        usual = _medians(self._levels, _KNOWN // 2)
        scales = _SCALES * _medians(np.abs(np.diff(self._strays, axis=0)), _KNOWN)
        known = scales == scales
        scales = np.maximum(np.where(known, scales, 1.0), _FLOORS)

        away = np.append(levels - usual, 0.0)  # nan where there is no sample, or nothing is known yet
        weights = np.where(away == away, np.append(counts, 0.0), 0.0) / scales**2
        total = weights.sum()
        away[_WHOLE] = np.nansum(weights * away) / total if total else np.nan
        strays = (away * np.sqrt(np.append(counts, total))).round(3)

        deviations = np.where(known & (away > SMALLEST) & (self._steps >= SILENT), strays / scales, 0.0)
        highest = int(deviations.argmax())
        if deviations[highest] <= self._deviations:
            self._in_a_row = 0
            self._add(levels, strays)
            return None
        self._in_a_row += 1
        if self._in_a_row == NEW_LEVEL:
            self._forget()
        striking = np.flatnonzero(away[:_WHOLE] > SMALLEST)
        place = int(striking[0]) if len(striking) == 1 else highest  # one range can be enough to lift the whole step
        value = float(sums.sum() / counts.sum() if place == _WHOLE else means[place])
        bin = None if place == _WHOLE else place
        return Spike(bin, value, value / exp(float(away[place])), float(deviations[highest]))

    def usual(self) -> list[float]:
        """Return what is usual in each range of sigma now; nan where it is not known."""
        return [exp(level) for level in _medians(self._levels, _KNOWN // 2).tolist()]

    def _add(self, levels: np.ndarray, strays: np.ndarray) -> None:
        self._levels = np.vstack([self._levels[1:], levels])
        self._strays = np.vstack([self._strays[1:], strays])
        self._steps += 1

    def state(self) -> list[Any]:
        """Return what has been seen, for JSON: about 10 kB."""
        seen = [_rows(table, self._steps) for table in (self._levels, self._strays)]
        return [self._steps, self._in_a_row, *seen]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state`; another window takes what fits."""
        self._forget()
        steps, self._in_a_row, *seen = state
        for table, rows in zip((self._levels, self._strays), seen, strict=True):
            if rows := rows[-len(table) :]:
                table[-len(rows) :] = np.array(rows, dtype=np.float64)  # None becomes nan
        self._steps = steps


def _medians(table: np.ndarray, least: int) -> np.ndarray:
    """Medians of the columns of [n, k], without their nan; nan where fewer than `least` are left."""
    ordered = np.sort(table, axis=0)  # nan last
    found = []
    for column, n in enumerate((table == table).sum(0).tolist()):
        found.append((ordered[(n - 1) // 2, column] + ordered[n // 2, column]) / 2 if n >= least else np.nan)
    return np.array(found)


def _rows(table: np.ndarray, steps: int) -> list[list[float | None]]:
    return [[None if x != x else x for x in row] for row in table[max(0, len(table) - steps) :].tolist()]


class SkippedData:
    """Which batch a step takes, after batches were left out.

    Kept as (from_step, shift): from that step on, batches `shift` further than otherwise. Steps count on without gaps,
    so the learning rate and the number of steps are those of the undisturbed run.
    """

    def __init__(self) -> None:
        self._skips: list[tuple[int, int]] = []

    def data_step(self, step: int) -> int:
        """Return the number of the batch that `step` takes."""
        return step + sum(shift for start, shift in self._skips if start <= step)

    def skip(self, back_to: int, last: int) -> int:
        """Leave out the batches of the steps [back_to, last], after going back to `back_to`; return how many.

        Skips that begin later are part of a history that no longer is: their batches lie among those left out here, or
        behind them and unused. One that begins at `back_to` stays, since this one adds to it.
        """
        if not back_to <= last:
            raise ValueError(f"cannot leave out steps {back_to} to {last}")
        beyond = self.data_step(last) + 1
        self.go_back(back_to)
        shift = beyond - self.data_step(back_to)
        self._skips.append((back_to, shift))
        return shift

    def go_back(self, step: int) -> None:
        """Forget what was decided after `step`."""
        self._skips = [(start, shift) for start, shift in self._skips if start <= step]

    def state(self) -> list[Any]:
        """Return the skips, for JSON."""
        return [list(skip) for skip in self._skips]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state`."""
        self._skips = [(int(start), int(shift)) for start, shift in state]
        if not all(0 <= n < 1 << 40 for skip in self._skips for n in skip):
            raise ValueError("a skip is negative or beyond all data")


class NonFinite:
    """Counts steps that were left out because their loss or gradient was not finite.

    limit: how many in a row are borne; one more and the run is to halt.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_a_row = self.total = 0

    def judge(self, *figures: float) -> bool:
        """Count a step by its loss and gradient norm; whether it is to be left out."""
        bad = not all(map(isfinite, figures))
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.total += bad
        return bad

    @property
    def must_halt(self) -> bool:
        """Whether there were more in a row than are borne."""
        return self.in_a_row > self._limit

    def state(self) -> list[Any]:
        """Return the counts, for JSON."""
        return [self.in_a_row, self.total]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state`."""
        self.in_a_row, self.total = state


class Guards:
    """The guards of a run, and their state in a checkpoint's manifest."""

    def __init__(self, config: GuardConfig) -> None:
        self.spikes = Spikes(config.spike_deviations)
        self.nonfinite = NonFinite(config.nonfinite_steps)
        self.skipped = SkippedData()

    def state(self) -> dict[str, Any]:
        """Return what all of them have seen, for JSON."""
        return {name: guard.state() for name, guard in vars(self).items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; a guard that it lacks begins anew."""
        try:
            for name, guard in vars(self).items():
                if name in state:
                    guard.restore(state[name])
        except (TypeError, ValueError, OverflowError) as e:
            raise CheckpointError(f"what the checkpoint says of the guards cannot be used ({e!r:.200})") from e
