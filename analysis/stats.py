"""What the seeds and the test images allow to be said: pure functions of arrays, randomness passed in.

s = seeds, n = test images, k = classes, b = bootstrap draws
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

LEVEL = 0.95  # of every interval
DRAWS = 2000
SPREAD = 10  # a spread of doses by more than this factor has a logarithmic axis


@dataclass(frozen=True)
class Summary:
    mean: float  # NaN where n is 0
    sd: float  # over seeds, ddof 1; NaN where n is below 2
    n: int  # how many seeds have a value


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    over: str  # what was resampled: the interval speaks of nothing else

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


def image_draws(images: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(b, n) how often each image occurs in each bootstrap draw of n images with replacement."""
    return rng.multinomial(images, np.full(images, 1 / images), size=draws)


def bootstrap_miou(confusion: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(b,) mIoU in per cent of each draw, from the per-image matrices (n, k, k) and `image_draws`.

    The class set of a draw depends on its labels alone: a class without a labelled pixel in the draw is left out,
    whatever was predicted. So two networks are always compared on the same classes, also when a rare class is in few
    images and drops out of the draw.
    """
    images, classes, _ = confusion.shape
    flat = confusion.reshape(images, -1).astype(float)
    matrix = (counts.astype(float) @ flat).reshape(-1, classes, classes)
    hit, labelled = np.diagonal(matrix, axis1=1, axis2=2), matrix.sum(axis=2)
    union = labelled + matrix.sum(axis=1) - hit
    present = labelled > 0
    share = np.divide(hit, union, out=np.zeros_like(hit), where=present)
    return 100 * share.sum(axis=1) / present.sum(axis=1)


def gain_interval(gains: np.ndarray, rng: np.random.Generator) -> Interval:
    """95 % percentile interval of the mean gain, from the gain of each seed in each image draw (s, b).

    Hierarchical: each draw also draws s seeds with replacement (outside), and all of them see the same drawn images
    (inside), since every seed is tested on the same images. With one seed it is an interval over test images alone and
    says nothing about another seed. With few seeds it is rather too narrow than too wide.
    """
    seeds = len(gains)
    means = seed_means(gains[None], rng)[0]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), "training seeds and test images" if seeds > 1 else "test images")


def seed_means(drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(v, b) means over seeds that are drawn with replacement, the same ones for all v, from (v, s, b) image draws."""
    _, seeds, draws = drawn.shape
    chosen = rng.integers(seeds, size=(draws, seeds))
    return drawn[:, chosen, np.arange(draws)[:, None]].mean(axis=2)


def dose_axis(x: np.ndarray, doses: np.ndarray) -> np.ndarray:
    """Where values lie on the axis that doses (v,) are drawn and fitted on.

    As they are; but doses above 0 that spread over more than a factor of ten, such as weights of 0 to 30 or patches of
    4 to 64, are spread by their logarithm, with 0 as far below the smallest as a factor of ten.
    """
    positive = doses[doses > 0]
    if not positive.size or positive.max() <= SPREAD * positive.min():
        return x
    unit = np.asarray(x, float) / positive.min()
    return np.where(unit <= 1, unit, 1 + np.log10(np.maximum(unit, 1)))


def dose_at(place: np.ndarray, doses: np.ndarray) -> np.ndarray:
    """The values at places on that axis: the inverse of `dose_axis`."""
    positive = doses[doses > 0]
    if not positive.size or positive.max() <= SPREAD * positive.min():
        return place
    return positive.min() * np.where(place <= 1, place, 10 ** (np.maximum(place, 1) - 1))


def broken_stick(x: np.ndarray, y: np.ndarray, places: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Where a line that is level at first begins to fall, and how steeply: (b,) and (b,) from x (v,) and y (v, b).

    Least squares of y = level - slope * max(0, x - bend) over bends from the first x to the last but one, since behind
    that any bend fits. A negative slope is a line that rises.
    """
    bends = np.linspace(x[0], x[-2], places)
    past = np.maximum(0, x[None, :] - bends[:, None])  # (p, v)
    centred = past - past.mean(axis=1, keepdims=True)
    moved = y - y.mean(axis=0)
    slope = -(centred @ moved) / (centred**2).sum(axis=1, keepdims=True)  # (p, b)
    error = (moved**2).sum(axis=0) - slope**2 * (centred**2).sum(axis=1, keepdims=True)
    best = error.argmin(axis=0)
    return bends[best], slope[best, np.arange(y.shape[1])]
