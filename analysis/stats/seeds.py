"""What training seeds, and test images besides, allow to be said of a mean: t intervals, p-values, marks in a table.

s = seeds
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy import optimize, special

LEVEL = 0.95  # of every interval
RECORDED = 10  # recordings that an interval over them needs: the spread of fewer is hardly known

SEEDS = "training seeds"  # on this very test set
IMAGES = "test images"  # of these very networks
SEEDS_AND_IMAGES = "training seeds and test images"
TINY = 1e-12  # the smallest p-value that is told from 0


@dataclass(frozen=True)
class Summary:
    mean: float  # NaN where n is 0
    sd: float  # over seeds, ddof 1; NaN where n is below 2
    n: int  # how many seeds have a value


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    over: str  # what would be another one next time: the interval speaks of nothing else

    @property
    def verdict(self) -> str:
        """`gain`, `loss`, or `within noise` when the interval includes 0."""
        if self.low <= 0 <= self.high:
            return "within noise"
        return "gain" if self.low > 0 else "loss"


def summary(values: pd.Series | np.ndarray) -> Summary:
    """Mean, standard deviation (ddof 1) and count of the values that exist."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    mean = float(known.mean()) if known.size else float("nan")
    return Summary(mean, float(known.std(ddof=1)) if known.size > 1 else float("nan"), int(known.size))


def paired_gain(subject: pd.Series, reference: pd.Series) -> pd.Series:
    """`subject` - `reference` at equal seed; both are indexed by seed, and a seed that one of them lacks is out."""
    return (subject - reference).dropna()


# ---------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, in points of mIoU, and what it may be off by.

    The variance of the mean has two parts. `seed` is sd^2 / s, what other training seeds would change; it holds also
    what single networks make of single images. `image` is what other test images would change for all seeds alike,
    since all seeds are tested on the same images, and more seeds do not lower it. A quantile for both together is the
    mean of Student's for each, weighted by the parts: W. G. Cochran, G. M. Cox, Experimental Designs, 2nd ed. 1957,
    section 4.14. It covers rather more than it says; Welch and Satterthwaite's degrees of freedom cover less at three
    seeds (`python -m benchmarks.coverage`).
    """

    mean: float  # NaN where n is 0
    sd: float  # over seeds, ddof 1; NaN where n is below 2
    n: int  # seeds
    image: float  # variance of the mean by test images; NaN where only this very test set is meant
    units: int  # images, or recordings, that the image part was drawn from; 0 where there is none
    over: str  # SEEDS, IMAGES (one seed) or SEEDS_AND_IMAGES

    @property
    def seed(self) -> float:
        """Variance of the mean by training seeds; NaN where n is below 2."""
        return self.sd**2 / self.n if self.n > 1 else float("nan")

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN where nothing tells it."""
        return math.sqrt(sum(part for part, _ in self._parts)) if self._parts else float("nan")

    @property
    def _parts(self) -> list[tuple[float, int]]:
        """Variances that are known, each with its degrees of freedom."""
        parts = [(self.seed, self.n - 1), (self.image, self.units - 1)]
        return [(variance, freedom) for variance, freedom in parts if not math.isnan(variance)]

    def quantile(self, level: float = LEVEL) -> float:
        """How many standard errors the interval of that level reaches to either side."""
        total = sum(variance for variance, _ in self._parts)
        weights = [(variance / total if total else 1 / len(self._parts), freedom) for variance, freedom in self._parts]
        return sum(weight * float(special.stdtrit(freedom, (1 + level) / 2)) for weight, freedom in weights)

    def interval(self, level: float = LEVEL) -> Interval | None:
        """Mean -+ quantile x error; None where nothing tells the error."""
        if math.isnan(self.error):
            return None
        half = self.quantile(level) * self.error
        return Interval(self.mean - half, self.mean + half, self.over)

    def p(self, against: float = 0.0) -> float:
        """Two-sided p-value of the mean being `against`: 1 - the level whose interval ends there.

        NaN where nothing tells the error.
        """
        if math.isnan(self.error):
            return float("nan")
        if self.error == 0:  # the same to the last digit at every seed and on every image
            return float(self.mean == against)
        t = abs(self.mean - against) / self.error
        if self.quantile(1 - TINY) <= t:
            return TINY
        if t == 0:
            return 1.0
        log = optimize.brentq(lambda log: self.quantile(1 - math.exp(log)) - t, math.log(TINY), 0.0)
        return math.exp(float(log))  # type: ignore[arg-type]


def over_seeds(values: pd.Series | np.ndarray) -> Estimate:
    """Of the mean of one value per seed, for other training seeds on this very test set: Student's t.

    With one value there is no interval.
    """
    total = summary(values)
    return Estimate(total.mean, total.sd, total.n, float("nan"), 0, SEEDS)


@dataclass(frozen=True)
class Spread:
    """How the values of seeds move together when other test images are drawn."""

    covariance: np.ndarray  # (s, s) of the seeds' values over the draws
    units: int  # how many images, or recordings, each draw has

    @property
    def common(self) -> float:
        """Variance of the mean that the images make for all seeds alike; what a seed has besides is in its values."""
        seeds = len(self.covariance)
        total, own = float(self.covariance.sum()), float(np.trace(self.covariance))
        found = own if seeds == 1 else max(0.0, (total - own) / (seeds * (seeds - 1)))
        return found * self.units / (self.units - 1)  # a bootstrap's variance is too small by that


def spread(drawn: np.ndarray, units: int) -> Spread:
    """Of the seeds' values in each draw of the test images (s, b); draws without a value are left out."""
    return Spread(np.atleast_2d(np.cov(drawn[:, ~np.isnan(drawn).any(axis=0)])), units)


def over_seeds_and_images(values: pd.Series | np.ndarray, *spreads: Spread) -> Estimate:
    """Of the mean of one value per seed, for other training seeds and other test images of the same kind.

    With one seed it is over test images alone and says nothing about another seed.

    Args:
        values: (s,) of the full test set, none missing.
        spreads: over draws of single images and, where they are known, of whole recordings; the largest counts, as
            neighbouring frames are nearly the same picture. One of fewer than RECORDED units is left out (unless no
            other is given), and one of fewer than two always: its spread is hardly known.
    """
    total = summary(values)
    known = [one for one in spreads if one.units >= RECORDED] or [one for one in spreads if one.units > 1]
    if not known:
        return over_seeds(values)
    if any(one.covariance.shape != (total.n, total.n) for one in known) or np.size(values) != total.n:
        raise ValueError(f"{np.size(values)} values need a covariance of that side each, and none may be missing")
    largest = max(known, key=lambda one: one.common)
    over = IMAGES if total.n == 1 else SEEDS_AND_IMAGES
    return Estimate(total.mean, total.sd, total.n, largest.common, largest.units, over)


def gain_interval(values: pd.Series | np.ndarray, drawn: np.ndarray, units: int) -> Interval:
    """95 % interval of the mean gain, from each seed's gain (s,), and in each draw of the test images (s, b).

    See `over_seeds_and_images`. It is what the tables offer, since it covers in simulations with three seeds already,
    where a percentile bootstrap over seeds does not (`python -m benchmarks.coverage`).
    """
    found = over_seeds_and_images(values, spread(drawn, units)).interval()
    if found is None:
        raise ValueError("one value on one image has no interval")
    return found


# ---------------------------------------------------------------------------------------------- many at once

Row = TypeVar("Row")


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values adjusted for there being several of them; NaN counts for nothing and stays NaN.

    [S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6 (1979)]
    """
    values = np.asarray(p, float)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return adjusted


def best_rows(means: Mapping[Row, float], against_best: Mapping[Row, Estimate], level: float = LEVEL) -> list[Row]:
    """The rows to mark as best: the one with the highest mean, and all that are not significantly worse.

    Args:
        means: of every row; NaN for one without a value, which is never marked.
        against_best: each other row's gain over the row with the highest mean. A row that is not in it, since it shares
            no seed with the best, is not marked: nothing is known of it. Holm's correction is over these.
    """
    known = {row: mean for row, mean in means.items() if not math.isnan(mean)}
    if not known:
        return []
    best = max(known, key=lambda row: known[row])
    others = [row for row in known if row != best and row in against_best]
    adjusted = holm([against_best[row].p() for row in others])
    worse = {
        row
        for row, p in zip(others, adjusted, strict=True)
        if math.isnan(p) or (p < 1 - level and against_best[row].mean < 0)
    }
    return [row for row in known if row == best or (row in others and row not in worse)]
